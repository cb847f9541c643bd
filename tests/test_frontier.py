"""Guards of kdnb.frontier. Oracles: Riemann sums over the plane, closed forms of one Gaussian, a search by SciPy."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, optimize, special

from kdnb import frontier as F
from kdnb.core import make_rng
from kdnb.em import fit_em
from kdnb.exact import exact_entropy, moment_match
from kdnb.mixture import Mixture, grid_truth

TRUTH = Mixture([0.45, 0.35, 0.2], [[-0.6, 0.0], [0.5, 0.4], [0.0, 1.5]], [[0.2, 0.3], [0.4, 0.1], [0.3, 0.3]])
PRICES = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)


def plane(reach=6.0, cells=601):
    axis = np.linspace(-reach, reach, cells)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), (axis[1] - axis[0]) ** 2


@pytest.fixture(scope="module")
def front():
    return F.frontier(TRUTH, 2, PRICES, make_rng(1), n_starts=6, steps=200)


@pytest.mark.parametrize("kind", ["spherical", "diag", "full"])
@pytest.mark.parametrize("tau", [0.15, 0.6, 1.0, 1.7])
def test_annealed_against_brute_force(kind, tau):
    covs = {"spherical": [0.3, 0.2, 0.25], "diag": TRUTH.covs, "full": [[[0.4, 0.1], [0.1, 0.3]]] * 3}[kind]
    p = Mixture(TRUTH.weights, TRUTH.means, covs)
    cool = F.anneal(p, tau)
    x, cell = plane(8.0, 801)
    power = np.exp(p.log_prob(x) / tau)
    mass = power / power.sum()
    np.testing.assert_allclose(cool.log_z, np.log(power.sum() * cell), atol=1e-7)
    np.testing.assert_allclose(np.exp(cool.log_prob(x)) * cell, mass, atol=1e-9)
    value, error = cool.entropy()
    assert error < 1e-4
    np.testing.assert_allclose(value, special.entr(mass).sum() + np.log(cell), atol=1e-6)
    points = cool.population()
    np.testing.assert_allclose(points.weights @ points.x.square(), mass @ x**2, atol=1e-6)


@pytest.mark.parametrize("tau", [0.2, 3.0])
def test_annealed_gaussian_in_closed_form(tau):
    one = Mixture([1.0], [[1.0, -2.0]], [[0.5, 0.2]])
    cool = F.anneal(one, tau)
    np.testing.assert_allclose(cool.entropy().value, math.log(2 * math.pi * math.e * tau * math.sqrt(0.1)), rtol=1e-9)
    np.testing.assert_allclose(cool.parts.covs, tau * one.covs)


def test_annealed_on_the_line_against_adaptive_quadrature():
    p = Mixture([0.7, 0.3], [[0.0], [1.5]], [[0.3], [0.1]])
    def log_p(x):
        return p.log_prob(np.array([[x]])).item()

    expected = integrate.quad(lambda x: math.exp(log_p(x) / 0.4), -5, 6, epsabs=1e-12, limit=200)[0]
    np.testing.assert_allclose(F.anneal(p, 0.4).log_z, math.log(expected), atol=1e-9)


def test_annealing_twice_multiplies_and_batches():
    x = torch.zeros(1, 2, dtype=torch.float64)
    np.testing.assert_allclose(F.anneal(TRUTH, 0.5).sharpen(0.5).log_prob(x), F.anneal(TRUTH, 0.25).log_prob(x))
    batch = F.anneal(TRUTH.expand(3), 0.5)
    assert batch.sample(7, make_rng(0), proposals=4).shape == (3, 7, 2)
    assert batch.log_z.shape == (3,)
    np.testing.assert_allclose(batch.log_z, F.anneal(TRUTH, 0.5).log_z.expand(3))


def test_draws_of_the_annealed_density():
    "Five standard errors of each mean: false alarm below 1e-5."
    cool = F.anneal(TRUTH, 0.5)
    x, points = cool.sample(20_000, make_rng(2)), cool.population()
    mean = points.weights @ points.x
    sd = (points.weights @ (points.x - mean).square()).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * sd / 20_000**0.5).all()


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_temperature(tau):
    with pytest.raises(ValueError, match=re.escape(f"tau must be a finite number > 0, got {tau}; 1 leaves the density as it is")):
        F.anneal(TRUTH, tau)


@pytest.mark.parametrize("knob", list(F.KNOBS))
def test_every_knob_against_brute_force(knob):
    "Moments and entropy of the selective teacher from its density on a grid."
    value = {"weights": 3.0, "density": 0.4, "top": 1.5, "shrink": 0.5}[knob]
    x, cell = plane()
    density = np.exp(TRUTH.log_prob(x))
    if knob == "density":
        density = density ** (1 / value)
    else:
        w = {"weights": np.array([0.45, 0.35, 0.2]) ** 3, "top": np.array([0.45, 0.175, 0.0]), "shrink": TRUTH.weights.numpy()}[knob]
        density = np.exp(Mixture(w / w.sum(), TRUTH.means, TRUTH.covs * (value if knob == "shrink" else 1)).log_prob(x))
    mass = density / density.sum()
    (points, weights), entropy = F.select(TRUTH.expand(2), knob, value)
    np.testing.assert_allclose(entropy, [special.entr(mass).sum() + np.log(cell)] * 2, atol=1e-4)
    np.testing.assert_allclose(weights[1] @ points[1].square(), mass @ x**2, atol=1e-5)


def test_knobs_at_rest_leave_the_teacher():
    resting = {"weights": 1.0, "density": 1.0, "top": 3.0, "shrink": 1.0}
    for knob, value in resting.items():
        np.testing.assert_allclose(F.select(TRUTH.expand(1), knob, value).entropy, exact_entropy(TRUTH).value[None], atol=1e-5)


@pytest.mark.parametrize(("knob", "value", "message"), [
    ("beta", 1.0, "knob must be one of weights, density, top, shrink, got 'beta'"),
    ("top", 0.0, "value of the knob must be a finite number > 0, got 0.0"),
    ("weights", math.nan, "value of the knob must be a finite number > 0, got nan"),
])
def test_a_bad_knob(knob, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        F.select(TRUTH.expand(1), knob, value)


def test_one_component_students_are_moment_matches():
    teachers = fit_em(TRUTH.expand(3).sample(60, make_rng(3)), 3, rng=make_rng(4)).mixture
    frame = F.knob_curves(TRUTH, teachers, {"weights": [1.0, 4.0]})
    student = moment_match(teachers.sharpen(4.0))
    x, cell = plane(7.0, 701)
    for i, row in enumerate(frame[frame.value == 4].itertuples()):
        log_q, log_p = student[i].log_prob(x), TRUTH.log_prob(x)
        np.testing.assert_allclose([row.recall, row.precision], [(np.exp(log_p) * log_q).sum() * cell, (np.exp(log_q) * log_p).sum() * cell], atol=1e-5)
        assert row.seed == i


def test_at_entropy_interpolates_and_admits_defeat():
    path = pd.DataFrame({"knob": "k", "seed": 3, "teacher_entropy": [2.0, 1.0, 0.5], "precision": [0.0, 4.0, 5.0]})
    for drop, expected in ((0.25, 1.0), (1.0, 4.0), (1.25, 4.5)):
        np.testing.assert_allclose(F.at_entropy(path, drop, ("precision",)).precision, [expected])
    assert F.at_entropy(path, 1.6, ("precision",)).precision.isna().all()
    for drop in (0.0, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"drop must be > 0 nats, got {drop}; at 0 every knob leaves the same teacher")):
            F.at_entropy(path, drop)


def test_gradients_of_both_integrals():
    board = F._board(TRUTH, 0.1)
    theta = F._starts(TRUTH, 2, 1, board, make_rng(5))
    assert torch.autograd.gradcheck(lambda t: F._recall_precision(t, board), theta.requires_grad_(), atol=1e-6)


def test_free_parameters_invert():
    board = F._board(TRUTH, 0.1)
    means, sd = torch.tensor([[[0.1, 0.2]]], dtype=torch.float64), torch.tensor([[[0.3, 0.5]]], dtype=torch.float64)
    log_w, mu, back = F._student(F._free(means, sd, board), board)
    np.testing.assert_allclose(log_w, 0)
    np.testing.assert_allclose(mu, means)
    np.testing.assert_allclose(back, sd)


def test_frontier_of_two_components_against_scipy(front):
    x, cell = plane(5.0, 121)
    log_p = TRUTH.log_prob(x)

    def loss(theta, w):
        share = special.expit(theta[0])
        log_q = Mixture([share, 1 - share], theta[1:5].reshape(2, 2), np.exp(2 * theta[5:].clip(-1.5, 1)).reshape(2, 2)).log_prob(x)
        return -((1 - w) * np.exp(log_p) @ log_q + w * np.exp(log_q) @ log_p) * cell

    for row in front.frame[front.frame.w < 0.5].itertuples():  # dearer precision makes spikes that this grid does not resolve
        starts = [np.r_[0.0, means, np.log([0.5] * 4)] for means in ([-0.6, 0, 0.5, 0.4], [0, 0.2, 0, 1.5], [-0.6, 0, 0, 1.5])]
        searched = -min(optimize.minimize(loss, start, (row.w,), method="L-BFGS-B", options={"maxiter": 60}).fun for start in starts)
        assert searched - 1e-4 <= row.value <= searched + 0.05


def test_no_student_is_beyond_the_frontier(front):
    "Random students and the truth's own parts, all at least as wide as the frontier's."
    rng = np.random.default_rng(6)
    q = Mixture(rng.dirichlet([1, 1], 200), rng.uniform(-1, 1.5, (200, 2, 2)), rng.uniform(0.1, 1, (200, 2, 2)))
    rows = F.ruler_frame(q, TRUTH, "random")
    distances = F.gap(rows, front)
    assert list(distances) == ["gap", "precision_gap", "recall_gap"]
    assert distances.to_numpy().min() > -1e-6
    assert (distances.precision_gap >= distances.gap).all()
    assert (distances.recall_gap >= distances.gap).all()


def test_gap_of_a_known_frontier():
    "Two prices, by hand."
    known = F.Frontier(pd.DataFrame({"w": [0.0, 0.5], "value": [1.0, 2.0]}), TRUTH)
    found = F.gap(pd.DataFrame({"recall": [0.0], "precision": [3.0]}), known)
    np.testing.assert_allclose(found, [[0.5, 1.0, 1.0]])  # slacks 1 and 0.5; /w: 1; /(1−w): 1 and 1


def test_prices_and_size_must_make_sense():
    with pytest.raises(ValueError, match=re.escape("w must be in [0, 1), got -0.5; at 1 the best student is a spike and recall has no bound")):
        F.frontier(TRUTH, 1, torch.tensor([-0.5], dtype=torch.float64), make_rng(0))
    with pytest.raises(ValueError, match=re.escape("w must be in [0, 1), got nan")):
        F.frontier(TRUTH, 1, torch.tensor([math.nan], dtype=torch.float64), make_rng(0))


def test_rivals_and_their_gaps():
    truth = grid_truth()
    x = truth.expand(3).sample(80, make_rng(7))
    teachers = fit_em(x, 2, rng=make_rng(8)).mixture
    students = F.rivals(truth, x, teachers, 2, {"weights": [1.0, 10.0]}, make_rng(9), step=0.5, tol=1e-4)
    assert list(students.knob.unique()) == ["weights", "direct", "teacher"]
    assert len(students) == 12
    front = F.frontier(truth, 2, PRICES, make_rng(10), n_starts=4, steps=100)
    gaps = F.frontier_gap(students, {2: front})
    assert list(gaps) == ["n_components", "knob", "value", "quantity", "mean", "se", "lo", "hi", "n"]
    direct = students[students.knob == "direct"]
    row = gaps[(gaps.knob == "direct") & (gaps.quantity == "gap")].iloc[0]
    np.testing.assert_allclose(row["mean"], F.gap(direct, front).gap.mean())
    assert row.lo < row["mean"] < row.hi
    assert row.n == 3
    assert (gaps["mean"] > -1e-6).all()
