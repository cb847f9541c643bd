"""Guards of kdnb.neighbours.conditional. Oracles: chains of two symbols, scipy.optimize, scikit-learn, plain sampling."""

import re

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from kdnb.chain import MarkovChain, exact_entropy, exact_kl, exact_precision, exact_recall
from kdnb.core import make_rng
from kdnb.em import fit_em
from kdnb.exact import exact_measure
from kdnb.neighbours import conditional as C


def tables(*shape, seed=0):
    p = torch.rand(*shape, generator=make_rng(seed, "tables"), dtype=torch.float64)
    return (p / p.sum(-1, keepdim=True)).log()


def test_against_chains():
    student, truth = tables(5, 3, 3, seed=1), tables(5, 3, 3, seed=2)
    initial = tables(5, 3, seed=3).exp()
    found = C.conditional_ruler(student, truth, initial)
    p, q = (MarkovChain(initial, t.exp(), 2) for t in (student, truth))
    alone = torch.special.entr(initial).sum(-1)
    expected = [exact_precision(p, q, "sequence") + alone, exact_recall(p, q, "sequence") + alone, exact_entropy(p, "sequence") - alone, exact_entropy(q, "sequence") - alone,
                exact_kl(p, q, "sequence"), exact_kl(q, p, "sequence")]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_against_sampling():
    "Two labels per input by ancestral sampling: within five standard errors (false alarm below 1e-6)."
    student, truth = tables(50_000, 3, seed=4), tables(50_000, 3, seed=5)
    found = C.conditional_ruler(student, truth)
    for value, p, q in ((found.precision, student, truth), (found.recall, truth, student)):
        labels = torch.multinomial(p.exp(), 2, replacement=True, generator=make_rng(6))
        scores = q.gather(-1, labels).mean(-1)
        assert abs(value - scores.mean()) < 5 * scores.std() / len(scores) ** 0.5


def test_a_class_of_probability_zero():
    sure = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    half = torch.full((1, 2), 0.5, dtype=torch.float64).log()
    found = C.conditional_ruler(half, sure)
    assert found.precision == -torch.inf
    np.testing.assert_allclose(found.recall, np.log(0.5))
    assert found.truth_entropy == 0
    with pytest.raises(ValueError, match=re.escape("truth must hold log-probabilities that sum to 1 over the last axis, got 0.5")):
        C.conditional_ruler(half, half + np.log(0.5))
    with pytest.raises(ValueError, match=re.escape("student must hold log-probabilities that sum to 1 over the last axis, got nan")):
        C.conditional_ruler(half * torch.nan, half)


def test_sharpen_labels():
    p = tables(7, 4)
    for tau in (0.3, 1.0, 2.0):
        power = p.exp().numpy() ** (1 / tau)
        np.testing.assert_allclose(C.sharpen_labels(p, tau).exp(), power / power.sum(-1, keepdims=True), rtol=1e-12)
    with pytest.raises(ValueError, match=re.escape("tau must be > 0, got nan")):
        C.sharpen_labels(p, float("nan"))


def test_two_classes_far_out():
    z = torch.tensor([-800.0, 0.0, 800.0], dtype=torch.float64)
    np.testing.assert_allclose(C.two_classes(z), [[0.0, -800.0], [np.log(0.5)] * 2, [-800.0, 0.0]], atol=1e-12)


def problem(n=60, f=3, seed=0):
    rng = make_rng(seed, "problem")
    x = 2 * torch.randn(n, f, generator=rng, dtype=torch.float64)
    return x, torch.rand(n, generator=rng, dtype=torch.float64), torch.rand(n, generator=rng, dtype=torch.float64)


def test_fit_logistic_against_scipy_and_in_a_batch():
    x, y, w = problem()
    xb, yb, wb = (torch.stack([a, b]) for a, b in zip(problem(seed=0), problem(seed=1), strict=True))

    def loss(c):
        z = x.numpy() @ c
        return (w.numpy() * (np.logaddexp(0, z) - y.numpy() * z)).sum() + 0.005 * c @ c

    found = C.fit_logistic(x, y, w, ridge=0.01)
    np.testing.assert_allclose(found, minimize(loss, np.zeros(3), tol=1e-12).x, atol=1e-5)
    np.testing.assert_allclose(C.fit_logistic(xb, yb, wb, ridge=0.01)[0], found, atol=1e-10)


def test_fit_logistic_on_separable_hard_labels():
    x, _, _ = problem(n=100)
    y = (x[:, 0] > 0).double()
    found = C.fit_logistic(x, y, ridge=1e-6)
    theirs = LogisticRegression(C=1 / (100 * 1e-6), fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy()).coef_[0]
    np.testing.assert_allclose(found, theirs, rtol=1e-3)
    with pytest.raises(ValueError, match=re.escape("ridge must be > 0, got 0.0; separable labels have no finite fit")):
        C.fit_logistic(x, y, ridge=0.0)
    with pytest.raises(ValueError, match=re.escape("labels must be between 0 and 1, got nan")):
        C.fit_logistic(x, y * torch.nan)


def ruler(p, r):
    p, r = (torch.tensor(v, dtype=torch.float64) for v in (p, r))
    return C.ConditionalRuler(p, r, p, p, p, p)


@pytest.mark.parametrize(("dp", "dr", "words"), [
    (1, 1, "gain on both"), (-1, -1, "loss on both"), (1, -1, "trade-off: precision for recall"), (-1, 1, "trade-off: recall for precision"),
    (0, 0, "cannot tell"), (1, 0, "gain of precision alone"), (0, -1, "loss of recall alone"), (-1, 0, "loss of precision alone"), (0, 1, "gain of recall alone"),
])
def test_movement_in_words(dp, dr, words):
    noise = np.array([-0.1, 0.1, -0.05, 0.05])
    direct = ruler(noise * 3, noise)
    record = C.movement("a", 2.0, ruler(noise * 4 + dp, noise * 2 + dr), direct)
    assert C.verdict_of(record) == words
    np.testing.assert_allclose(record["d_recall"].mean, dr, atol=1e-12)
    frame = C.movement_frame([record], change=True)
    assert frame.precision[0] == record["d_precision"].mean
    assert frame.recall_hi[0] == record["d_recall"].hi


def test_common_world_is_that_of_the_experiment():
    "By hand, stream by stream, as in experiments/gmm.ipynb."
    world = C.common_world(3, seed=5)
    rng = make_rng(5, "draws")
    x = world.truth.expand(3).sample(100, rng)
    torch.testing.assert_close(world.x, x, rtol=0, atol=0)
    teacher = fit_em(x, 4, rng=make_rng(5, "starts"), n_init=10).mixture
    torch.testing.assert_close(world.teacher.means, teacher.means, rtol=0, atol=0)
    torch.testing.assert_close(world.draws, teacher.sample(1000, rng), rtol=1e-9, atol=1e-9)  # sharpening by β = 1 rounds the weights
    for student, points in ((world.direct, x), (world.plain, world.draws)):
        np.testing.assert_allclose(student.means[:, 0], points.mean(1), atol=1e-12)
        np.testing.assert_allclose(student.covs[:, 0], points.var(1, correction=0), rtol=1e-9)
    assert (exact_measure(world.direct, world.truth, 1e-6).precision < -6).all()
