"""Guards of kdnb.exact. Oracles: Riemann sums over the plane, SciPy's adaptive quadrature on the line, closed forms, searches."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from kdnb import exact as X
from kdnb.core import make_rng
from kdnb.em import fit_em
from kdnb.mixture import Mixture, grid_truth

KINDS = ("spherical", "diag", "full")


def random_mixture(kind="diag", k=3, d=2, seed=0, batch=(), least=0.1):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(*batch, k, d, 3 * d))
    full = half @ half.swapaxes(-1, -2) / (3 * d) + least * np.eye(d)
    covs = {"spherical": rng.uniform(least, 1, (*batch, k)), "diag": rng.uniform(least, 1, (*batch, k, d)), "full": full}[kind]
    return Mixture(rng.dirichlet(np.ones(k), batch or None), rng.normal(size=(*batch, k, d)), covs)


def brute(p, log_q, reach=9.0, cells=901):
    "E_p[log q] by a Riemann sum over a square; it shares no code with the lattices, not even their coordinates."
    axis = np.linspace(-reach, reach, cells)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return (np.exp(p.log_prob(x)) * log_q(x)).sum() * (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize(("kind_p", "kind_q"), list(itertools.product(KINDS, KINDS)))
def test_cross_against_brute_force(kind_p, kind_q):
    p, q = random_mixture(kind_p, seed=1), random_mixture(kind_q, k=4, seed=2)
    value, error = X.exact_cross(p, q)
    assert error <= 1e-8
    np.testing.assert_allclose(value, brute(p, q.log_prob), atol=2e-9)


def test_cross_on_the_line_against_adaptive_quadrature():
    p, q = random_mixture(d=1, seed=3), random_mixture(d=1, k=4, seed=4)
    def f(x):
        return math.exp(p.log_prob(np.array([[x]])).item()) * q.log_prob(np.array([[x]])).item()

    expected = sum(integrate.quad(f, a, a + 1, epsabs=1e-13)[0] for a in range(-12, 12))
    np.testing.assert_allclose(X.exact_cross(p, q).value, expected, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 8])
def test_closed_form_of_one_component(kind, d):
    "tr and log-det against a SciPy normal averaged over its own quadratic: E[log N] = log N(mean) − tr(Σ⁻¹S)/2."
    p, q = random_mixture(kind, d=d, seed=5), random_mixture(kind, k=1, d=d, seed=6)
    full = {"spherical": lambda c: c.item() * np.eye(d), "diag": lambda c: np.diag(c[0]), "full": lambda c: c[0]}[kind](q.covs.numpy())
    expected = stats.multivariate_normal(q.means[0].numpy(), full).logpdf(p.mean().numpy()) - 0.5 * np.trace(np.linalg.solve(full, p.cov().numpy()))
    value, error = X.exact_cross(p, q)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert error == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_error_bound_bounds_the_error(seed):
    rng = np.random.default_rng(seed)
    p = Mixture(rng.dirichlet(np.ones(2)), rng.normal(size=(2, 2)), rng.uniform(0.02, 1, (2, 2)))
    q = Mixture(rng.dirichlet(np.ones(5)), rng.normal(size=(5, 2)), rng.uniform(0.05, 0.5, (5, 2)))
    rough, fine = X._cross_on_lattice(p, q, 1e-3), X._cross_on_lattice(p, q, 1e-9)
    assert abs(rough.value - fine.value) <= rough.error + fine.error
    assert fine.error <= 1e-9


def test_table_agrees_with_lattice_and_hands_over_what_it_cannot_resolve():
    truth = grid_truth()
    p = random_mixture(k=2, seed=7, batch=(3, 4), least=0.05)
    narrow = Mixture(p.weights, p.means, torch.where(torch.arange(12).reshape(3, 4, 1, 1) == 5, 1e-8, p.covs))
    for many in (p, narrow):
        value, error = X.exact_cross(many, truth)
        assert value.shape == (3, 4)
        assert (error <= 1e-8).all()
        some = torch.tensor([0, 1]), torch.tensor([2, 1])  # [1, 1] is the narrow one
        np.testing.assert_allclose(value[some], X._cross_on_lattice(many[some], truth, 1e-8).value, atol=2e-8)
    assert X._cross_by_table(narrow, truth, 1e-8).error.max() > 1e-8


def test_a_batch_is_its_members():
    p, q = random_mixture("full", seed=8, batch=(2, 1)), random_mixture("diag", seed=9, batch=(3,))
    value = X.exact_cross(p, q).value
    assert value.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        np.testing.assert_allclose(value[i, j], X.exact_cross(p[i, 0], q[j]).value, atol=1e-8)


@pytest.mark.parametrize("d", [3, 8])
def test_sampled_cross_against_closed_form_and_its_error(d):
    p, q = random_mixture("diag", k=4, d=d, seed=10, least=0.5), random_mixture("full", k=1, d=d, seed=11, least=0.5)
    value, error = X.sampled_cross(p, q, make_rng(0))
    assert abs(value - X.exact_cross(p, q).value) < 1.7 * error  # five standard errors
    assert torch.equal(value, X.sampled_cross(p, q, make_rng(0)).value)
    assert X.sampled_cross(p, q, make_rng(0), n=4096).error < error


def test_measure_and_its_identities():
    student, truth = random_mixture(seed=12), grid_truth()
    r = X.exact_measure(student, truth)
    np.testing.assert_allclose(r.precision, brute(student, truth.log_prob), atol=1e-8)
    np.testing.assert_allclose(r.recall, brute(truth, student.log_prob), atol=1e-8)
    np.testing.assert_allclose(r.student_entropy, -brute(student, student.log_prob), atol=1e-8)
    np.testing.assert_allclose(r.kl_truth_student, -r.truth_entropy - r.recall, rtol=1e-14)
    np.testing.assert_allclose(r.kl_student_truth, -r.student_entropy - r.precision, rtol=1e-14)
    same = X.exact_measure(truth, truth)
    np.testing.assert_allclose([same.precision, same.recall], -same.truth_entropy, atol=1e-9)
    assert abs(same.kl_student_truth) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_moment_match_maximises_the_closed_form(kind):
    p = random_mixture("full", seed=13)
    best = X.moment_match(p, kind)
    assert best.covariance == kind

    def loss(theta):
        if kind == "full":
            root = np.array([[math.exp(theta[2]), 0], [theta[4], math.exp(theta[3])]])
            covs = [root @ root.T]
        else:
            covs = [math.exp(theta[2])] if kind == "spherical" else [np.exp(theta[2:4])]
        return -X.exact_cross(p, Mixture([1.0], [theta[:2]], covs)).value.item()

    found = optimize.minimize(loss, np.zeros(5), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13, "maxiter": 5000, "maxfev": 9000})
    np.testing.assert_allclose(-X.exact_cross(p, best).value, found.fun, atol=1e-9)
    np.testing.assert_allclose(best.means[0], found.x[:2], atol=1e-4)


@pytest.mark.parametrize(("k", "max_iter"), [(2, 1), (4, 3), (4, 500)])
def test_at_beta_one_the_teacher_is_invisible(k, max_iter):
    x = grid_truth().expand(3).sample(50, make_rng(1))
    student = X.moment_match(fit_em(x, k, rng=make_rng(2), max_iter=max_iter).mixture)
    direct = fit_em(x, 1).mixture
    np.testing.assert_allclose(student.means, direct.means, atol=1e-12)
    np.testing.assert_allclose(student.covs, direct.covs, rtol=1e-9)


def test_beta_to_infinity_keeps_the_heaviest_and_ties_are_shared():
    p = Mixture([0.3, 0.4, 0.3], [[0.0, 0.0], [1.0, 2.0], [5.0, 5.0]], [[0.1, 0.2], [0.3, 0.4], [1.0, 1.0]])
    limit = X.moment_match(p.sharpen(1e4))
    np.testing.assert_allclose(limit.means[0], [1.0, 2.0], atol=1e-12)
    np.testing.assert_allclose(limit.covs[0], [0.3, 0.4], rtol=1e-12)
    tied = X.moment_match(Mixture([0.4, 0.4, 0.2], p.means, p.covs).sharpen(1e4))
    np.testing.assert_allclose(tied.means[0], [0.5, 1.0], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_separated_entropy_brackets_the_entropy(kind):
    for seed, scale in itertools.product(range(4), (0.3, 1.0, 3.0, 10.0)):
        p = random_mixture(kind, seed=seed)
        p = Mixture(p.weights, scale * p.means, p.covs)
        bound, h = X.separated_entropy(p), X.exact_entropy(p).value
        assert bound.value - bound.error - 1e-8 <= h <= bound.value + 1e-8


def test_reweighted_entropy_is_the_entropy():
    parts = random_mixture(k=4, seed=14, batch=(2,))
    weights = torch.stack([parts.sharpen(b).weights for b in (1.0, 5.0, 1e5)])  # the last has exact zeros
    value, error = X.reweighted_entropy(parts, weights, 1e-8)
    expected = torch.stack([X.exact_entropy(parts.sharpen(b)).value for b in (1.0, 5.0, 1e5)])
    np.testing.assert_allclose(value, expected, atol=1e-7)
    assert (error <= 1e-8).all()


def test_nodes_carry_the_moments():
    p = random_mixture("full", seed=15)
    x, w = X.nodes(p)
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(w @ x, p.mean(), atol=1e-12)
    np.testing.assert_allclose((x - p.mean()).mT @ (w[:, None] * (x - p.mean())), p.cov(), rtol=1e-10)


def test_student_of_two_components_is_a_stationary_maximum():
    p = random_mixture(k=4, seed=16)
    fit = X.fit_student(p, 2, rng=make_rng(3))
    assert fit.converged
    np.testing.assert_allclose(fit.log_likelihood, X.exact_cross(p, fit.mixture).value, atol=1e-6)
    theta = [fit.mixture.weights.log(), fit.mixture.means, fit.mixture.covs.log()]
    for i, j in ((0, 0), (1, 1), (2, 0), (2, 1)):
        for sign in (-1, 1):
            moved = [a.clone() for a in theta]
            moved[i].view(-1)[j] += sign * 0.02
            q = Mixture(moved[0].softmax(-1), moved[1], moved[2].exp())
            assert X.exact_cross(p, q, 1e-6).value < X.exact_cross(p, fit.mixture, 1e-6).value


def test_students_of_a_batch():
    teacher = random_mixture(k=3, seed=17)
    fits = X.fit_student(teacher.sharpen(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), 2, rng=make_rng(4))
    assert fits.mixture.batch_shape == (3,)
    for i, beta in enumerate((1.0, 2.0, 3.0)):
        alone = X.fit_student(teacher.sharpen(beta), 2, rng=make_rng(5))
        np.testing.assert_allclose(fits.log_likelihood[i], alone.log_likelihood, atol=1e-6)
    one = X.fit_student(teacher, 1)
    np.testing.assert_allclose(one.mixture.covs, X.moment_match(teacher).covs)


def test_the_curve_of_one_and_of_many_teachers():
    truth, teachers = grid_truth(), random_mixture(k=4, seed=18, batch=(3,))
    beta = torch.tensor([1.0, 10.0], dtype=torch.float64)
    frame = X.beta_curve(truth, teachers, beta)
    assert list(frame.columns) == [
        "beta", "seed", "effective_modes", "teacher_entropy", "precision", "recall", "student_entropy", "truth_entropy", "kl_student_truth", "kl_truth_student", "error"
    ]
    assert len(frame) == 6
    row = frame[(frame.beta == 10) & (frame.seed == 2)].iloc[0]
    alone = X.beta_curve(truth, teachers[2], beta).iloc[1]
    np.testing.assert_allclose(row.drop("seed"), alone.drop("seed"), atol=1e-6)
    student = X.moment_match(teachers[2].sharpen(10.0))
    np.testing.assert_allclose(row.precision, brute(student, truth.log_prob, cells=1501), atol=1e-7)
    np.testing.assert_allclose(row.teacher_entropy, X.exact_entropy(teachers[2].sharpen(10.0)).value, atol=1e-6)


WIDE = Mixture([0.5, 0.5], [[0.0] * 3, [1.0] * 3], [1.0, 1.0])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: X.moment_match(grid_truth(), "tied"), """covariance must be "spherical", "diag" or "full", got 'tied'"""),
    (lambda: X._cross_on_lattice(WIDE, WIDE, 1e-8), "p must have 1 or 2 dimensions to be integrated on a lattice, got 3; use `sampled_cross`"),
    (lambda: X.exact_cross(WIDE, WIDE), "rng must be given in 3 dimensions, got None; there the integral is sampled"),
    (lambda: X.exact_cross(grid_truth(), WIDE), "q must have the 2 dimensions of p, got 3"),
    (lambda: X.sampled_cross(WIDE, WIDE, make_rng(0), n=1000), "n must be a power of 2, got 1000; Sobol points are balanced only then"),
    (lambda: X.nodes(WIDE), "p must have 1 or 2 dimensions to be integrated on a lattice, got 3"),
    (lambda: X.nodes(grid_truth(), step=0.0), "step must be between 0 and 4 standard deviations, got 0.0"),
])
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
