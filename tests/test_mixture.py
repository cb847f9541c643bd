"""Guards of kdnb.mixture. Oracles: SciPy's normals, exact rational weights, the moments of draws."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from kdnb.core import Distribution, make_rng, measure
from kdnb.mixture import Mixture, as_points, grid_truth, sharpen_weights

KINDS = ("spherical", "diag", "full")


def random_mixture(kind, k=4, d=3, seed=0, batch=()):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(*batch, k, d, 3 * d))
    covs = {"spherical": rng.uniform(0.1, 2, (*batch, k)), "diag": rng.uniform(0.1, 2, (*batch, k, d)), "full": half @ half.swapaxes(-1, -2) / (3 * d)}[kind]
    return Mixture(rng.dirichlet(np.ones(k), batch or None), rng.normal(size=(*batch, k, d)), covs)


def full_covs(m):
    d = m.means.shape[-1]
    return {"spherical": lambda c: c[:, None, None] * np.eye(d), "diag": lambda c: c[:, :, None] * np.eye(d), "full": lambda c: c}[m.covariance](m.covs.numpy())


def scipy_log_prob(m, x):
    terms = [stats.multivariate_normal(mu, c).logpdf(x) for mu, c in zip(m.means.numpy(), full_covs(m), strict=True)]
    return logsumexp(terms, axis=0, b=m.weights.numpy()[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 8])
def test_log_prob_is_scipys(kind, d):
    m = random_mixture(kind, d=d)
    x = 3 * np.random.default_rng(1).normal(size=(200, d))
    ours = m.log_prob(x)
    assert isinstance(ours, np.ndarray)
    assert ours.shape == (200,)
    np.testing.assert_allclose(ours, scipy_log_prob(m, x), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_one_by_one(kind):
    m = random_mixture(kind, batch=(2, 3))
    x = torch.randn(2, 3, 10, 3, generator=make_rng(0), dtype=torch.float64)
    assert m.log_prob(x).shape == (2, 3, 10)
    assert m.log_prob(x[0, 0]).shape == (2, 3, 10)  # the same points for every problem
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(m.log_prob(x)[i, j], m[i, j].log_prob(x[i, j]))
            np.testing.assert_array_equal(m.cov()[i, j], m[i, j].cov())
            np.testing.assert_array_equal(m.sharpen(3.0).weights[i, j], m[i, j].sharpen(3.0).weights)


def test_far_from_the_origin_nothing_is_lost():
    m = random_mixture("full")
    x = m.sample(100, make_rng(0))
    offset = 2.0**40  # exact in float64, so only the arithmetic is tested
    near = x.mul(1024).round().div(1024)
    centred = Mixture(m.weights, m.means.mul(1024).round().div(1024), m.covs)
    moved = Mixture(m.weights, centred.means + offset, m.covs)
    np.testing.assert_array_equal(moved.log_prob(near + offset), centred.log_prob(near))


def test_a_million_deviations_away_the_log_density_is_finite():
    m = Mixture([0.5, 0.5], [[0.0], [1.0]], [1e-6, 1e-6])
    x = np.array([[1000.0], [-1000.0]])
    np.testing.assert_allclose(m.log_prob(x), scipy_log_prob(m, x), rtol=1e-14)


def test_tensor_in_tensor_out_and_single_point():
    m = grid_truth()
    out = m.log_prob(torch.zeros(1, 2))
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.float64
    expected = logsumexp([-0.5 * r / 0.025 for r in (1, 1, 1, 1, 2, 2, 2, 2)]) - math.log(8 * 2 * math.pi * 0.025)
    np.testing.assert_allclose(out, [expected], rtol=1e-14)


def test_density_integrates_to_one():
    m = random_mixture("full", d=2)
    step = 0.05
    axis = np.arange(-9, 9, step)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    np.testing.assert_allclose(np.exp(m.log_prob(grid)).sum() * step**2, 1, atol=1e-8)  # the trapezoid rule converges exponentially here


@pytest.mark.parametrize("beta", [1, 2, 7, 100])
def test_sharpened_weights_are_exact(beta):
    parts = [Fraction(p, 100) for p in (40, 30, 20, 10)]
    powers = [p**beta for p in parts]
    ours = sharpen_weights(torch.tensor([float(p) for p in parts], dtype=torch.float64), float(beta))
    np.testing.assert_allclose(ours, [float(p / sum(powers)) for p in powers], rtol=1e-13 * beta)  # an error of beta times that of log


def test_sharpen_with_weights_of_1e_300_and_beta_1e4():
    tiny = Mixture([1.0, 1e-300, 0.0], [[0.0], [1.0], [2.0]], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(tiny.sharpen(1e4).weights, [1, 0, 0])
    np.testing.assert_allclose(tiny.sharpen(1e-2).weights, np.array([1, 1e-3, 0]) / 1.001, rtol=1e-12)
    near = Mixture([0.5 + 1e-5, 0.5 - 1e-5], [[0.0], [1.0]], [1.0, 1.0])
    log_odds = 1e4 * (math.log1p(2e-5) - math.log1p(-2e-5))
    np.testing.assert_allclose(near.sharpen(1e4).weights[0], 1 / (1 + math.exp(-log_odds)), rtol=1e-10)
    assert np.isfinite(tiny.sharpen(1e4).log_prob([[2.0]])).all()


def test_sharpen_keeps_components_and_takes_one_beta_per_problem():
    m = random_mixture("diag", batch=(5,))
    betas = torch.tensor([1.0, 10.0], dtype=torch.float64)[:, None]
    s = m.sharpen(betas)
    assert s.batch_shape == (2, 5)
    assert s.means.shape == (2, 5, 4, 3)
    np.testing.assert_array_equal(s.means[1], m.means)
    np.testing.assert_allclose(s.weights[0], m.weights, rtol=1e-15)
    np.testing.assert_array_equal(s.weights[1], m.sharpen(10.0).weights)


def test_equal_weights_are_deaf_to_beta():
    np.testing.assert_array_equal(grid_truth().sharpen(1e6).weights, grid_truth().weights)


def test_weight_entropy_and_effective_modes():
    m = random_mixture("diag", k=6, batch=(3,))
    np.testing.assert_allclose(m.weight_entropy(), stats.entropy(m.weights, axis=-1), rtol=1e-12)
    one = Mixture([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0])
    assert one.weight_entropy().item() == 0
    assert one.effective_modes().item() == 1
    np.testing.assert_allclose(grid_truth().effective_modes(), 8, rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_mixtures_moments(kind):
    m = random_mixture(kind, batch=(2,))
    n = 100_000
    x = m.sample(n, make_rng(0))
    assert x.shape == (2, n, 3)
    for i in range(2):
        sd = np.sqrt(np.diag(m.cov()[i]))
        assert (np.abs((x[i].mean(0) - m.mean()[i]).numpy()) < 4 * sd / math.sqrt(n)).all()  # false alarm 6e-5 for each of 6 numbers, seed fixed
        np.testing.assert_allclose(np.cov(x[i].T), m.cov()[i], atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_density(kind):
    m = random_mixture(kind, d=1, k=3)
    x = np.sort(m.sample(5000, make_rng(2))[:, 0].numpy())
    sd = np.sqrt(full_covs(m)[:, 0, 0])
    cdf = (m.weights.numpy()[:, None] * stats.norm.cdf(x, m.means.numpy(), sd[:, None])).sum(0)
    assert stats.kstest(cdf, "uniform").pvalue > 1e-4  # false alarm 1e-4, seed fixed


def test_a_component_of_weight_zero_is_never_drawn():
    m = Mixture([0.0, 0.5, 0.0, 0.5, 0.0], [[0.0], [1.0], [2.0], [3.0], [4.0]], [1e-12] * 5)
    assert set(m.sample(2000, make_rng(0)).round().ravel().tolist()) == {1.0, 3.0}


def test_the_same_seed_gives_the_same_draws_and_repeats_differ():
    m = grid_truth().expand(2)
    np.testing.assert_array_equal(m.sample(9, make_rng(0)), m.sample(9, make_rng(0)))
    x = m.sample(9, make_rng(0))
    assert not torch.equal(x[0], x[1])


def test_the_ruler_reads_a_batch_of_mixtures():
    truth = grid_truth().expand(3)
    assert isinstance(truth, Distribution)
    ruler = measure(truth, truth, 2000, make_rng(0))
    assert ruler.precision.mean.shape == (3,)
    np.testing.assert_array_equal(ruler.kl_truth_student.mean, 0)
    entropy = math.log(8) + 1 + math.log(2 * math.pi * 0.025)  # if the components did not overlap: an upper bound, tight here
    assert (np.abs(ruler.precision.mean + entropy) < 4 * ruler.precision.se + 2e-3).all()


def test_numpy_that_cannot_be_shared_is_accepted():
    weights = np.array([0.5, 0.5])
    weights.flags.writeable = False
    m = Mixture(weights, np.zeros((2, 1), np.float32)[::-1], [1, 1])
    assert m.means.dtype == torch.float64
    weights.flags.writeable = True
    weights[0] = 9
    assert m.weights[0] == 0.5


def test_mixture_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        grid_truth().weights = torch.ones(8)


REFUSED = {
    "x must have shape (..., n, d), got (2,); a single point is x[None], a single feature x[:, None]": lambda: as_points([1.0, 2.0]),
    "x must be finite, got nan at [1, 0]; drop or repair that point": lambda: as_points([[0.0], [math.nan]]),
    "x must be finite, got -inf at [0, 1]; drop or repair that point": lambda: grid_truth().log_prob(np.array([[0.0, -np.inf]])),
    "x must have 2 features on its last axis, got shape (4, 3)": lambda: grid_truth().log_prob(np.zeros((4, 3))),
    "beta must be a finite number > 0, got 0.0; 1 leaves the weights as they are": lambda: grid_truth().sharpen(0.0),
    "beta must be a finite number > 0, got -2.0": lambda: grid_truth().sharpen(-2.0),
    "beta must be a finite number > 0, got nan": lambda: grid_truth().sharpen(math.nan),
    "beta must be a finite number > 0, got inf": lambda: grid_truth().sharpen(math.inf),
    "n must be >= 1, got 0": lambda: grid_truth().sample(0, make_rng(0)),
    "weights must sum to 1, got 0.9 at [1]; divide them by their sum": lambda: Mixture([[0.5, 0.5], [0.5, 0.4]], np.zeros((2, 2, 1)), np.ones((2, 2))),
    "weights must be >= 0, got -0.5 at [1]; a component may have weight 0": lambda: Mixture([1.5, -0.5], [[0.0], [1.0]], [1.0, 1.0]),
    "weights must be >= 0, got nan at [0]": lambda: Mixture([math.nan, 1.0], [[0.0], [1.0]], [1.0, 1.0]),
    "weights must have shape (2,) to go with means of shape (2, 1), got (3,)": lambda: Mixture([0.5, 0.5, 0.0], [[0.0], [1.0]], [1.0, 1.0]),
    "means must be finite, got nan at [0, 1]; a component without points has no mean": lambda: Mixture([1.0], [[0.0, math.nan]], [1.0]),
    "means must have shape (..., k, d), got (2,); a single component is means[None]": lambda: Mixture([1.0], [0.0, 1.0], [1.0]),
    "covs must have shape (1,), (1, 2) or (1, 2, 2) to go with means of shape (1, 2), got (2,)": lambda: Mixture([1.0], [[0.0, 1.0]], [1.0, 1.0]),
    "covs must be positive and finite, got -1 at [0, 1]; these are variances, not deviations": lambda: Mixture([1.0], [[0.0, 1.0]], [[1.0, -1.0]]),
    "covs must be symmetric, got 0.5 at [0, 0, 1]; use (c + c.mT) / 2": lambda: Mixture([1.0], [[0.0, 1.0]], [[[1.0, 0.5], [0.0, 1.0]]]),
    "covs must be symmetric, got nan at [0, 0, 0]": lambda: Mixture([1.0], [[0.0, 1.0]], [[[math.nan, 0.0], [0.0, 1.0]]]),
    "covs must be positive definite, got -1 at [0]; that is the smallest eigenvalue; add a multiple of the identity": lambda: Mixture(
        [1.0], [[0.0, 1.0]], [[[1.0, 2.0], [2.0, 1.0]]]
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        REFUSED[message]()


def test_a_single_mixture_has_no_batch_to_index():
    with pytest.raises(IndexError, match="a single mixture has no batch axis to index"):
        grid_truth()[0]
