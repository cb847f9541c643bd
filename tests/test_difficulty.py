"""Guards of kdnb.difficulty. Oracles: kdnb.exact in the plane (other nodes, EM and integrals), closed forms, plain sampling in eight dimensions."""

import math
import re

import numpy as np
import pytest
import torch

from kdnb import difficulty as D
from kdnb.core import make_rng
from kdnb.exact import exact_measure, fit_student, moment_match
from kdnb.mixture import Mixture


def row_of_modes(separation, imbalance, d=2):
    w = imbalance ** -torch.arange(4, dtype=torch.float64)
    means = torch.zeros(4, d, dtype=torch.float64)
    means[:, 0] = separation * torch.arange(4)
    return Mixture(w / w.sum(), means, torch.ones(4, dtype=torch.float64))


def at(frame, beta):
    return frame[frame.beta == beta].iloc[0]


@pytest.mark.parametrize(("k", "beta", "separation", "imbalance"), [(1, 4.0, 8.0, 1.5), (1, 1.0, 2.0, 1.1), (2, 3.0, 5.0, 1.3), (3, 1.0, 5.0, 1.2), (4, 2.0, 6.0, 1.5)])
def test_against_exact_in_the_plane(k, beta, separation, imbalance):
    truth = row_of_modes(separation, imbalance)
    sharp = truth.sharpen(beta)
    student = moment_match(sharp, "spherical") if k == 1 else fit_student(sharp, k, "spherical", rng=make_rng(2), n_init=12).mixture
    ruler = exact_measure(student, truth, 1e-7)
    found = at(D.difficulty_map([k], [beta], [separation], [imbalance], [2], tol=1e-10, max_iter=3000), beta)
    np.testing.assert_allclose([found.precision, found.recall], [ruler.precision, ruler.recall], atol=1e-4)


@pytest.mark.parametrize("d", [3, 8, 32])
def test_one_component_in_many_dimensions(d):
    "Recall is the closed form of a Gaussian; precision a plain mean of 200,000 draws, within five standard errors (false alarm below 1e-6)."
    truth = row_of_modes(4.0, 1.4, d)
    student = moment_match(truth.sharpen(3.0), "spherical")
    found = at(D.difficulty_map([1], [3.0], [4.0], [1.4], [d]), 3.0)
    np.testing.assert_allclose(found.recall, exact_measure(student, truth, rng=make_rng(3)).recall, rtol=1e-9)
    log_p = truth.log_prob(student.sample(200_000, make_rng(4)))
    assert abs(found.precision - log_p.mean()) < 5 * log_p.std() / 200_000**0.5


def test_two_components_in_eight_dimensions_against_a_sampled_ruler():
    "Score of the student by sampling, five standard errors; and no perturbation of it has more likelihood."
    d, truth = 8, row_of_modes(5.0, 1.3, 8)
    weights, apart = truth.weights[None], torch.full((1,), 5.0, dtype=torch.float64)
    row = D._row(weights, torch.ones(1, dtype=torch.float64), apart, d)
    q = D._fit(row, weights, apart, 2, d, 1e-12, 3000)
    precision, recall = D._measure(q, row, weights, apart, d)
    means = torch.zeros(2, d, dtype=torch.float64)
    means[:, 0] = q.mu[0]
    student = Mixture(q.weights[0], means, q.var[0])
    for value, log in ((precision, truth.log_prob(student.sample(200_000, make_rng(5)))), (recall, student.log_prob(truth.sample(200_000, make_rng(6))))):
        assert abs(value.item() - log.mean()) < 5 * log.std() / 200_000**0.5
    for name in ("mu", "var"):
        for step in (-0.01, 0.01):
            moved = q._replace(**{name: getattr(q, name) + step * torch.tensor([[1.0, 0.0]], dtype=torch.float64)})
            assert D._measure(moved, row, weights, apart, d)[1] < recall


def test_equal_weights_leave_nothing_to_do():
    frame = D.difficulty_map(beta=[1.0, 7.0], separation=[1.0, 4.0], imbalance=[1.0])
    assert len(frame) == 4 * 3 * 2 * 2
    np.testing.assert_allclose(frame[["precision_gain", "recall_gain"]], 0, atol=1e-12)
    np.testing.assert_allclose(frame.effective_modes, 4)


@pytest.mark.parametrize("d", [2, 32])
def test_a_large_student_gains_by_weights_alone(d):
    found = at(D.difficulty_map([4], [500.0], [10.0], [2.0], [d]), 500.0)
    w = np.array([8, 4, 2, 1]) / 15
    np.testing.assert_allclose(found.precision_gain, np.log(w[0]) - (w * np.log(w)).sum(), atol=1e-4)
    np.testing.assert_allclose(found.effective_modes, 1)


def test_blocks_do_not_matter_and_direct_is_added(monkeypatch):
    arguments = {"n_components": [1, 2], "beta": [3.0], "separation": [2.0, 5.0], "imbalance": [1.2, 2.0], "dimension": [2, 8]}
    whole = D.difficulty_map(**arguments)
    assert set(whole.beta) == {1.0, 3.0}
    assert list(whole) == ["n_components", "dimension", "beta", "separation", "imbalance", "effective_modes", "precision", "recall", "precision_gain", "recall_gain"]
    assert (whole[whole.beta == 1].precision_gain == 0).all()
    monkeypatch.setattr(D, "BLOCK", 3)
    np.testing.assert_allclose(D.difficulty_map(**arguments), whole, atol=1e-9)


@pytest.mark.parametrize(("axis", "value", "message"), [
    ("n_components", 5, "n_components must be between 1 and 4, got 5"),
    ("beta", 0.0, "beta must be finite and > 0, got 0.0"),
    ("beta", math.nan, "beta must be finite and > 0, got nan"),
    ("separation", 20.0, "separation must be between 0 and 12 standard deviations, got 20.0"),
    ("imbalance", 0.5, "imbalance must be finite and >= 1, got 0.5"),
    ("dimension", 1, "dimension must be >= 2, got 1"),
])
def test_bad_axes(axis, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        D.difficulty_map(**{axis: [value]})
