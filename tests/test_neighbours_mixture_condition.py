"""Guards of kdnb.neighbours.mixture_condition. Oracles: finite differences, moments of split data, brute-force integrals, closed forms of one Gaussian, the mixture's own density."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2

from kdnb.core import make_rng
from kdnb.exact import exact_measure, moment_match
from kdnb.mixture import Mixture
from kdnb.neighbours import mixture_condition as M

CORNERS = [[3.0, 3], [-3, -3], [3, -3], [-3, 3]]
TRUTH = Mixture([0.25] * 4, CORNERS, 0.25 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2))
FULL = Mixture([0.3, 0.7], [[0.0, 1.0], [2.0, -1.0]], [[[0.5, 0.2], [0.2, 0.3]], [[1.0, -0.4], [-0.4, 0.6]]])


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_one_gaussian_per_condition_has_the_moments_of_its_points():
    rng = make_rng(1)
    x, label = normal(rng, 2, 50, 3), torch.randint(2, (2, 50), generator=rng)
    p = M.fit_conditions(x, torch.eye(2, dtype=torch.float64)[label])
    assert p.batch_shape == (2,)
    assert p.covs.shape == (2, 2, 3, 3)
    for s in (0, 1):
        for c in (0, 1):
            part = x[s][label[s] == c].numpy()
            np.testing.assert_allclose(p.weights[s, c], len(part) / 50)
            np.testing.assert_allclose(p.means[s, c], part.mean(0), atol=1e-10)
            np.testing.assert_allclose(p.covs[s, c], np.cov(part.T, bias=True), atol=1e-5)  # EM's least variance is 1e-6 of the data's
    with pytest.raises(ValueError, match=re.escape("condition must occur at least once each, got none of 1 at [0]")):
        M.fit_conditions(x, torch.eye(2, dtype=torch.float64)[torch.stack([label[0] * 0, label[1]])])


def test_two_components_per_condition_find_the_corners():
    x = TRUTH.sample(400, make_rng(2))
    same = (x[:, 0] > 0) == (x[:, 1] > 0)
    p = M.fit_conditions(x, torch.stack([same, ~same], -1).double(), 2, rng=make_rng(3))
    first, second = M.of_condition(p, 2).means
    assert sorted(first.sign().tolist()) == [[-1, -1], [1, 1]]
    assert sorted(second.sign().tolist()) == [[-1, 1], [1, -1]]
    np.testing.assert_allclose(M.of_condition(p, 2).weights.sum(-1), 1)


@pytest.mark.parametrize("kind", ["spherical", "diag", "full"])
def test_score_and_tweedie_against_central_differences(kind):
    covs = {"spherical": [0.5, 0.3], "diag": [[0.5, 0.2], [0.1, 0.4]], "full": FULL.covs}[kind]
    p, x, h = M.noised(Mixture(FULL.weights, FULL.means, covs), 0.7), 2 * normal(make_rng(4), 9, 2), 1e-5
    slope = torch.stack([(p.log_prob(x + h * e) - p.log_prob(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)], -1)
    np.testing.assert_allclose(M.score(p, x), slope, atol=1e-8)
    np.testing.assert_allclose(M.denoised(Mixture(FULL.weights, FULL.means, covs), x, 0.7), x + 0.49 * slope, atol=1e-8)


def test_noised_is_the_convolution():
    "Brute force over a grid of the noise."
    axis = np.linspace(-6, 6, 241)
    e = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    weight = np.exp(-0.5 * (e**2).sum(-1)) / (2 * np.pi) * (axis[1] - axis[0]) ** 2
    x = np.array([0.3, -0.8])
    np.testing.assert_allclose(np.exp(M.noised(FULL, 0.7).log_prob(x[None])[0]), (np.exp(FULL.log_prob(x - 0.7 * e)) * weight).sum(), rtol=1e-8)


def test_marginalising_conditionals_gives_the_whole():
    x = 4 * normal(make_rng(5), 20, 2)
    for sigma in (0.0, 0.5, 3.0):
        whole = M.noised(TRUTH, sigma)
        parts = M.of_condition(whole, 2)
        joint = parts.log_prob(x) + math.log(0.5)
        np.testing.assert_allclose(joint.logsumexp(0), whole.log_prob(x), atol=1e-11)
        np.testing.assert_allclose((joint.softmax(0)[..., None] * M.score(parts, x)).sum(0), M.score(whole, x), atol=1e-11)


def test_the_figures_of_the_notes():
    "Features: P = R = −2.84. One Gaussian per class: P −16.6, R −4.3, 59 % defects. Two per class are the truth again."
    closed = -math.log(4) - 1 - math.log(2 * math.pi * 0.25)
    ruler = exact_measure(TRUTH, TRUTH)
    np.testing.assert_allclose([ruler.precision, ruler.recall], closed, atol=1e-6)
    assert round(closed, 2) == -2.84
    half = moment_match(M.of_condition(TRUTH, 2), "full")
    one = Mixture([0.5, 0.5], half.means.squeeze(1), half.covs.squeeze(1))
    ruler = exact_measure(one, TRUTH)
    assert [round(ruler.precision.item(), 1), round(ruler.recall.item(), 1)] == [-16.6, -4.3]
    threshold = math.log(0.25 / (2 * math.pi * 0.25)) - chi2.ppf(0.999, 2) / 2
    axis = np.linspace(-18, 18, 721)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    bad = TRUTH.log_prob(grid) < threshold
    assert round((np.exp(one.log_prob(grid))[bad].sum() * (axis[1] - axis[0]) ** 2), 2) == 0.59
    assert round((np.exp(TRUTH.log_prob(grid))[bad].sum() * (axis[1] - axis[0]) ** 2), 3) == 0.001


def test_parallel_lines():
    "W1 = |θ|, Jensen–Shannon = log 2, and a mixture along the line has slope θ/s²."
    line = torch.stack([torch.zeros(32), torch.linspace(0, 1, 32)], -1).double()
    for theta in (0.5, 2.0, -3.0):
        moved = line + torch.tensor([theta, 0.0], dtype=torch.float64)
        cost = torch.cdist(line, moved)
        np.testing.assert_allclose(cost[linear_sum_assignment(cost)].mean(), abs(theta), rtol=1e-12)
        both = np.eye(2).repeat(32, 1)  # points that no line shares
        np.testing.assert_allclose(jensenshannon(both[0], both[1], base=np.e) ** 2, math.log(2), rtol=1e-12)
        slope = -M.score(Mixture([1 / 32] * 32, line, [0.09] * 32), moved)
        np.testing.assert_allclose(slope[:, 0], theta / 0.09, rtol=1e-9)


def test_flow_of_one_gaussian_is_linear():
    "For N(0, s²) the flow scales by √(s² + σ²); Heun's error is second order."
    s, d = 1.5, 2
    p = Mixture([1.0], [[0.0, 0.0]], [s**2])
    z = normal(make_rng(6), 5, d)
    errors = []
    for n in (20, 40):
        levels = M.noise_levels(n)
        drawn = M.flow_sample(lambda x, sigma: M.denoised(p, x, sigma), z, levels, s)
        assert (levels[0], len(levels)) == (pytest.approx(20.0), n + 1)
        errors.append((drawn - z * math.hypot(s, levels[-1])).abs().max().item())
    assert errors[1] < errors[0] / 3 < 0.02
    x = z * 2
    np.testing.assert_allclose(M.flow_log_prob(lambda y, sigma: M.denoised(p, y, sigma), x, M.noise_levels(80), s), M.noised(p, 0.05).log_prob(x), atol=0.02)


def test_flow_density_is_the_mixtures():
    x = TRUTH.sample(60, make_rng(7))
    found = M.flow_log_prob(lambda y, sigma: M.denoised(TRUTH, y, sigma), x, M.noise_levels(60), 3.0)
    np.testing.assert_allclose(found.mean(), M.noised(TRUTH, 0.05).log_prob(x).mean(), atol=0.01)


def test_guidance_is_the_gradient_of_the_classifier():
    "Against central differences of log p(c|x); strength 0 is the model alone."
    models, x, h = M.of_condition(M.noised(TRUTH, 1.0), 2), 3 * normal(make_rng(8), 2, 6, 2), 1e-5

    def log_class(y):
        joint = M.of_condition(M.noised(TRUTH, 0.8), 2).log_prob(y) + math.log(0.5)
        return joint - M.noised(TRUTH, 0.8).log_prob(y)

    slope = torch.stack([(log_class(x + h * e) - log_class(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)], -1)
    alone = M.guided_denoiser(models, TRUTH, 0.0)(x, 0.8)
    np.testing.assert_allclose(alone, M.denoised(models, x, 0.8), atol=1e-12)
    np.testing.assert_allclose(M.guided_denoiser(models, TRUTH, 2.0)(x, 0.8), alone + 0.64 * 2 * slope, atol=1e-7)


def test_a_network_learns_the_linear_denoiser_of_one_gaussian():
    "Against the best denoiser's own loss: within 2 % after 300 steps, for two networks that do not share a gradient."
    x = torch.randn(2, 500, 2, generator=make_rng(9))
    net = M.train_denoiser(x, torch.ones(2, 500, 1), 16, 1.0, 300, make_rng(10))
    assert [tuple(w.shape) for w, _ in net] == [(2, 4, 16), (2, 16, 16), (2, 16, 2)]
    alone = M.train_denoiser(x[:1], torch.ones(1, 500, 1), 16, 1.0, 1, make_rng(10))
    assert alone[0][0].shape == (1, 4, 16)
    sigma, noise = 0.8, torch.randn(2, 500, 2, generator=make_rng(11))
    loss = (M.network_denoiser(net, torch.ones(2, 500, 1), 1.0)(x + sigma * noise, sigma) - x).square().mean((1, 2))
    best = ((x + sigma * noise) / (1 + sigma**2) - x).square().mean((1, 2))
    assert (loss < 1.02 * best).all()


def test_a_network_starts_as_the_skip_connection():
    net = M.new_network((3,), [4, 8, 8, 2], make_rng(12))
    x = torch.randn(3, 5, 2, generator=make_rng(13))
    np.testing.assert_allclose(M.network_denoiser(net, torch.ones(3, 5, 1), 2.0)(x, 1.5).detach(), x * 4 / (4 + 2.25), rtol=1e-6)
