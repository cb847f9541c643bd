"""Guards of kdnb.neighbours.denoising_score. Oracles: automatic differentiation and simulation, L-BFGS, finite differences, brute-force integrals, closed forms of one Gaussian."""

import math
import re

import numpy as np
import pytest
import torch

from kdnb.core import make_rng
from kdnb.exact import exact_measure
from kdnb.mixture import Mixture
from kdnb.neighbours import denoising_score as M

TRUTH = Mixture([0.25] * 4, [[3.0, 3], [-3, -3], [3, -3], [-3, 3]], [0.25] * 4)
FULL = Mixture([0.3, 0.7], [[0.0, 1.0], [2.0, -1.0]], [[[0.5, 0.2], [0.2, 0.3]], [[1.0, -0.4], [-0.4, 0.6]]])
CLEAN, NOISE, EYE = torch.diag(torch.tensor([2.0, 1, 0, 0, 0], dtype=torch.float64)), 0.5, torch.eye(5, dtype=torch.float64)
NOISY = CLEAN + NOISE**2 * EYE


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def best_of(loss, rank, rng):
    g = normal(rng, 6, 5, rank).requires_grad_()
    optimiser = torch.optim.LBFGS([g], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        total = loss(g).sum()
        total.backward()
        return total

    optimiser.step(closure)
    g = g[loss(g).argmin()].detach()
    return g @ g.mT


def test_fisher_divergence_by_simulation():
    "200,000 draws, five standard errors: false alarm 6e-7."
    g, s = normal(make_rng(1), 5, 2), 0.4
    a, b = NOISY + s**2 * EYE, g @ g.mT + s**2 * EYE
    x = normal(make_rng(2), 200_000, 5) @ torch.linalg.cholesky(b).mT
    gap = (x @ (torch.linalg.inv(a) - torch.linalg.inv(b))).square().sum(-1)
    assert abs(gap.mean() - M.fisher_divergence(g, NOISY, s)) < 5 * gap.std() / 200_000**0.5
    with pytest.raises(ValueError, match=re.escape("sigma_t must be > 0, got 0.0; without noise a generator of low rank has no score")):
        M.fisher_divergence(g, NOISY, 0.0)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("sigma_t", [0.2, 1.0])
def test_the_optimum_against_a_search_by_divergence_and_by_likelihood(rank, sigma_t):
    "Distillation and maximum likelihood of the same rank are one matrix."
    def likelihood(g):
        b = g @ g.mT + sigma_t**2 * EYE
        return torch.linalg.solve(b, NOISY + sigma_t**2 * EYE).diagonal(dim1=-2, dim2=-1).sum(-1) + torch.linalg.slogdet(b).logabsdet

    closed = M.distilled_covariance(NOISY, rank)
    np.testing.assert_allclose(closed, torch.diag(torch.tensor([2.25, 1.25, 0, 0, 0], dtype=torch.float64) * (torch.arange(5) < rank)), atol=1e-12)
    np.testing.assert_allclose(best_of(lambda g: M.fisher_divergence(g, NOISY, sigma_t), rank, make_rng(3)), closed, atol=1e-5)
    np.testing.assert_allclose(best_of(likelihood, rank, make_rng(4)), closed, atol=1e-5)


def test_known_noise_gives_the_clean_eigenvalues():
    np.testing.assert_allclose(M.distilled_covariance(NOISY, 2, NOISE), CLEAN, atol=1e-12)
    np.testing.assert_allclose(M.distilled_covariance(NOISY.expand(3, 5, 5), 4, NOISE), CLEAN.expand(3, 5, 5), atol=1e-12)
    with pytest.raises(ValueError, match=re.escape("rank must be between 1 and 5, got 0")):
        M.distilled_covariance(NOISY, 0)


@pytest.mark.parametrize(("name", "covariance", "precision", "recall"), [
    ("truth", CLEAN, "-0.54", "-0.54"), ("teacher", NOISY, "-38.2", "-4.0"), ("k=1", 1, "-0.11", "-48.2"), ("k=2", 2, "-0.73", "-0.56"), ("k=3", 3, "-13.2", "-1.7"),
])
def test_the_figures_of_the_notes(name, covariance, precision, recall):
    def seen(c):
        return Mixture([1.0], torch.zeros(1, 5).double(), (c + 0.01 * EYE)[None])

    ruler = exact_measure(seen(M.distilled_covariance(NOISY, covariance) if isinstance(covariance, int) else covariance), seen(CLEAN))
    for found, noted in ((ruler.precision, precision), (ruler.recall, recall)):
        assert f"{found.item():.{len(noted.split('.')[1])}f}" == noted


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_expected_gradient_against_simulation(alpha):
    "400,000 draws through automatic differentiation, denoisers fixed; within 3 % of the largest entry."
    g, s = normal(make_rng(5), 5, 2), 0.6
    shrink = [EYE - s**2 * torch.linalg.inv(c + s**2 * EYE) for c in (NOISY, g @ g.mT)]
    free, e = g.clone().requires_grad_(), normal(make_rng(6), 400_000, 5)
    x = normal(make_rng(7), 400_000, 2) @ free.mT
    M.score_identity_loss(x, *((x + s * e) @ m for m in shrink), alpha).mean().backward()
    closed = M.score_identity_gradient(g, NOISY, s, alpha)
    assert (free.grad - closed).abs().max() < 0.03 * closed.abs().max()


def test_the_basin_of_the_score_identity():
    "At α = 1.2 a direction up to six times too wide is driven back; at α = 1 any is. At the optimum nothing moves."
    top, a = EYE[:, :1], 2.25 + 0.36
    for alpha, times, back in ((1.2, 5.9, True), (1.2, 6.1, False), (1.0, 60.0, True), (1.2, 0.3, False)):
        g = math.sqrt(times * a - 0.36) * top
        assert ((g * M.score_identity_gradient(g, NOISY, 0.6, alpha)).sum() > 0).item() == back
    best = torch.diag(torch.tensor([1.5, 1.25**0.5, 0, 0, 0], dtype=torch.float64))[:, :2]
    np.testing.assert_allclose(M.score_identity_gradient(best, NOISY, 0.6), 0, atol=1e-12)


def test_the_loss_is_that_of_the_code_of_sid():
    rng = make_rng(8)
    x, real, fake = (normal(rng, 4, 3) for _ in range(3))
    by_hand = [sum((r - f) * ((r - v) - 1.2 * (r - f)) for r, f, v in zip(*rows, strict=True)) for rows in zip(real.tolist(), fake.tolist(), x.tolist(), strict=True)]
    np.testing.assert_allclose(M.score_identity_loss(x, real, fake), by_hand, rtol=1e-12)


def test_latents_have_equal_mass_and_a_generator_its_density():
    z = M.latent_grid(2, 40)
    assert z.shape == (1600, 2)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(z.square().mean(0), 1, atol=0.05)  # the outermost quantiles are cut
    line = [(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0, -1.0]]]))]
    p = M.generator_mixture(line, 1, 2000, 0.5)
    exact = Mixture([1.0], [[1.0, -1.0]], [[4.5, 0.5]])
    x = exact.sample(200, make_rng(9))
    np.testing.assert_allclose(p.log_prob(x)[0], exact.log_prob(x), atol=0.02)


def test_generators_learn_a_gaussian():
    "Data N(0, .5² I): held-out likelihood rises from the first step to the last, with a teacher and without; the teacher is left as it was."
    data = 0.5 * torch.randn(2, 600, 2, generator=make_rng(10))
    teacher = M.train_denoiser(data, torch.zeros(2, 600, 0), 16, 0.5, 300, make_rng(11))
    before = [tuple(a.clone() for a in layer) for layer in teacher]
    made, first = (M.distil_generator(teacher, 2, 16, 0.5, n, make_rng(12)) for n in (400, 1))
    assert all(torch.equal(a, b) for layer, old in zip(teacher, before, strict=True) for a, b in zip(layer, old, strict=True))
    curve = M.fit_generator(data, 1, 16, 0.05, 200, make_rng(14))
    start = M.fit_generator(data, 1, 16, 0.05, 1, make_rng(14))
    held = 0.5 * torch.randn(2, 500, 2, generator=make_rng(15)).double()
    for after, begun, latent in ((made, first, 2), (curve, start, 1)):
        gain = [M.generator_mixture(g, latent, 30 if latent == 2 else 128, 0.05).log_prob(held).mean(-1) for g in (after, begun)]
        assert (gain[0] > gain[1] + 0.1).all()


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
