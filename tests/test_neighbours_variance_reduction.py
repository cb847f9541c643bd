"""Guards of kdnb.neighbours.variance_reduction. Oracles: automatic differentiation, fixed-point iteration, simulation, scikit-learn."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from kdnb.core import make_rng
from kdnb.neighbours import variance_reduction as V


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@pytest.fixture(scope="module")
def world():
    "Forty points, three inputs, a teacher off the solution."
    rng = make_rng(11)
    a = normal(rng, 40, 3)
    b = a @ torch.ones(3, dtype=torch.float64) + normal(rng, 40)
    best = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    return a, b, best, best + 0.25 * normal(rng, 3)


def test_the_loss_is_its_two_terms():
    rng = make_rng(1)
    z, t, y = normal(rng, 6, 4), normal(rng, 6, 4), torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
    lz, lt = log_softmax(z.numpy() / 3, -1), log_softmax(t.numpy() / 3, -1)
    hard = -(y.numpy() * log_softmax(z.numpy(), -1)).sum(-1).mean()
    soft = (np.exp(lt) * (lt - lz)).sum(-1).mean()
    np.testing.assert_allclose(V.kd_loss(z, y, t, 0.3, 3.0), 0.7 * hard + 0.3 * 9 * soft, rtol=1e-12)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"weight must be between 0 and 1, got {bad}")):
            V.kd_loss(z, y, t, bad)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_identity_is_exact_for_softmax_only_at_temperature_one(weight):
    rng = make_rng(2)
    a, x, theta, y = normal(rng, 5), normal(rng, 3, 5), normal(rng, 3, 5), torch.eye(3, dtype=torch.float64)[1]
    reduced = V.reduced_gradient(V.softmax, a, y, x, theta, weight)
    for tau, equal in ((1.0, True), (2.0, weight == 0)):
        free = x.clone().requires_grad_()
        V.kd_loss(a[None] @ free.mT, y[None], a[None] @ theta.mT, weight, tau).backward()
        assert bool(torch.allclose(free.grad, reduced, rtol=0, atol=1e-14)) == equal


def test_the_identity_is_exact_for_least_squares():
    rng = make_rng(3)
    a, b, x, theta = normal(rng, 4), normal(rng, 1), normal(rng, 1, 4).requires_grad_(), normal(rng, 1, 4)
    (0.7 * 0.5 * (x @ a - b) ** 2 + 0.3 * 0.5 * (x @ a - theta @ a) ** 2).sum().backward()
    np.testing.assert_allclose(V.reduced_gradient(V.identity, a, b, x.detach(), theta, 0.3), x.grad, atol=1e-14)


def test_covariance_against_its_fixed_point(world):
    a, b, best, _ = world
    residual, gamma = (b - a @ best).numpy(), 0.05
    found = V.stationary_covariance(a, b - a @ best, gamma).numpy()
    c = np.zeros((3, 3))
    shrink = [np.eye(3) - gamma * np.outer(v, v) for v in a.numpy()]
    noise = [gamma**2 * r**2 * np.outer(v, v) for v, r in zip(a.numpy(), residual, strict=True)]
    for _ in range(2000):
        c = np.mean([s @ c @ s + e for s, e in zip(shrink, noise, strict=True)], 0)
    np.testing.assert_allclose(found, c, rtol=1e-9)
    with pytest.raises(ValueError, match=re.escape("gamma must be small enough for SGD to settle, got 2.0; its variance grows without bound")):
        V.stationary_covariance(a, b - a @ best, 2.0)


def test_the_law_against_simulation(world):
    "400 chains, 4 shares, five standard errors: false alarm below 1e-5. An iterate is the same at λ = 1 in all chains."
    a, b, best, theta = world
    v, d2 = V.stationary_covariance(a, b - a @ best, 0.05).trace().item(), (theta - best).square().sum().item()
    weights = torch.tensor([0, 0.3, V.best_weight(v, d2), 1], dtype=torch.float64)
    index = torch.randint(40, (1500, 400), generator=make_rng(4))
    share = weights[:, None].expand(-1, 400)
    trace = V.descend(lambda x, i: V.reduced_gradient(V.identity, a[i], b[i][:, None], x, theta[None], share), (best + weights[:, None, None, None] * (theta - best)).expand(4, 400, 1, 3).clone(), 0.05, index)
    chain = (trace.squeeze(-2) - best).square().sum(-1).mean(0)
    law = [V.stationary_error(v, d2, w) for w in weights.tolist()]
    assert ((chain.mean(1) - torch.tensor(law, dtype=torch.float64)).abs() <= 5 * chain.std(1) / 20 + 1e-12).all()
    assert min(law) == law[2]
    np.testing.assert_allclose(law[2], v * d2 / (v + d2), rtol=1e-12)


def test_the_figures_of_the_notes():
    "V = .0582 and ‖τ‖² = .2099 give λ* = .217 and the other two errors, .0474 and .0456."
    assert round(V.best_weight(0.0582, 0.2099), 3) == 0.217
    assert [round(V.stationary_error(0.0582, 0.2099, w), 4) for w in (0, 0.3, 0.217, 1)] == [0.0582, 0.0474, 0.0456, 0.2099]
    assert V.best_weight(0.1, 0.0) == 1


def test_precision_is_recall_for_gaussians_of_equal_variance():
    "The reason why least squares cannot tell sharpening from error."
    from kdnb.exact import exact_measure
    from kdnb.mixture import Mixture

    ruler = exact_measure(Mixture([1.0], [[0.4]], [0.3]), Mixture([1.0], [[-0.5]], [0.3]))
    np.testing.assert_allclose(ruler.precision, ruler.recall, rtol=1e-14)


def test_descend_keeps_the_second_half():
    trace = V.descend(lambda x, i: x - i, torch.zeros(1, dtype=torch.float64), 1.0, torch.arange(10), every=3)
    np.testing.assert_array_equal(trace[:, 0], [6, 9])


def test_optimum_against_scikit_learn_and_its_own_slope():
    rng = make_rng(5)
    a, y = normal(rng, 2, 80, 4), torch.eye(3, dtype=torch.float64)[torch.randint(3, (2, 80), generator=rng)]
    found = V.optimum(a, y)
    assert found.shape == (2, 3, 4)
    for i in (0, 1):
        peer = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(a[i].numpy(), y[i].argmax(1).numpy()).coef_
        np.testing.assert_allclose(found[i], peer - peer.mean(0), atol=1e-5)  # its L-BFGS stops at a slope of about 1e-6
    theta = normal(rng, 3, 4)
    soft = V.optimum(a, (a @ theta.mT).softmax(-1))
    np.testing.assert_allclose(soft, (theta - theta.mean(0)).expand(2, 3, 4), atol=1e-9)
    separable = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    with pytest.raises(ValueError, match=r"target must have an optimum, got a last step of [\d.e+]+ after 40; separable labels have none"):
        V.optimum(separable, separable)


def test_average_moments_by_hand_and_by_its_law():
    "Two steps by hand; then 4,000 chains against the stationary variance (1 − λ)² γ/(2 − γ) Var, five standard errors of a variance (false alarm below 1e-5)."
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    goal = torch.tensor([[2.5], [7.0]], dtype=torch.float64)
    found = V.average_moments(x, goal, torch.tensor(0.5, dtype=torch.float64), 0.1, torch.tensor([1, 0]))
    m = 0.5 * 2 + 0.5 * 2.5
    for v in (3, 1):
        m += -0.1 * (m - 0.5 * v - 0.5 * 2.5)
    np.testing.assert_allclose(found[0], m, rtol=1e-14)
    many, weight = 4000, 0.4
    ends = V.average_moments(x.expand(many, 2, 1), goal, torch.tensor(weight, dtype=torch.float64), 0.2, torch.randint(2, (100, many), generator=make_rng(7)))[:, 0, 0]
    law = (1 - weight) ** 2 * 0.2 / 1.8 * 1.0  # the two points have variance 1
    assert abs(ends.var().item() - law) < 5 * law * math.sqrt(2 / many)
    np.testing.assert_allclose(ends.mean(), (1 - weight) * 2 + weight * 2.5, atol=5 * math.sqrt(law / many))
