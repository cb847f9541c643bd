"""Guards of kdnb.neighbours.mixture_condition. Oracles: moments of split data, brute-force integrals, finite differences."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from kdnb.core import make_rng
from kdnb.exact import exact_measure, moment_match
from kdnb.mixture import Mixture
from kdnb.neighbours import mixture_condition as M
from kdnb.neighbours.denoising_score import denoised, noised, score

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


def test_marginalising_conditionals_gives_the_whole():
    x = 4 * normal(make_rng(5), 20, 2)
    for sigma in (0.0, 0.5, 3.0):
        whole = noised(TRUTH, sigma)
        parts = M.of_condition(whole, 2)
        joint = parts.log_prob(x) + math.log(0.5)
        np.testing.assert_allclose(joint.logsumexp(0), whole.log_prob(x), atol=1e-11)
        np.testing.assert_allclose((joint.softmax(0)[..., None] * score(parts, x)).sum(0), score(whole, x), atol=1e-11)


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
    "The slope of a mixture along the one line, on the other: θ/s²."
    line = torch.stack([torch.zeros(32), torch.linspace(0, 1, 32)], -1).double()
    for theta in (0.5, 2.0, -3.0):
        moved = line + torch.tensor([theta, 0.0], dtype=torch.float64)
        slope = -score(Mixture([1 / 32] * 32, line, [0.09] * 32), moved)
        np.testing.assert_allclose(slope[:, 0], theta / 0.09, rtol=1e-9)


def test_guidance_is_the_gradient_of_the_classifier():
    "Against central differences of log p(c|x); strength 0 is the model alone."
    models, x, h = M.of_condition(noised(TRUTH, 1.0), 2), 3 * normal(make_rng(8), 2, 6, 2), 1e-5

    def log_class(y):
        joint = M.of_condition(noised(TRUTH, 0.8), 2).log_prob(y) + math.log(0.5)
        return joint - noised(TRUTH, 0.8).log_prob(y)

    slope = torch.stack([(log_class(x + h * e) - log_class(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=torch.float64)], -1)
    alone = M.guided_denoiser(models, TRUTH, 0.0)(x, 0.8)
    np.testing.assert_allclose(alone, denoised(models, x, 0.8), atol=1e-12)
    np.testing.assert_allclose(M.guided_denoiser(models, TRUTH, 2.0)(x, 0.8), alone + 0.64 * 2 * slope, atol=1e-7)
