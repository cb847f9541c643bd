"""Guards of kdnb.neighbours.mixkd. Oracles: enumeration with moments of the Beta distribution, drawing, the two-mixture density."""

import re

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from kdnb.core import make_rng
from kdnb.mixture import Mixture
from kdnb.neighbours import mixkd as M
from kdnb.neighbours.common import fit_logistic


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=make_rng(seed, "normal"), dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 5.0])
def test_constant_and_squares_by_enumeration(alpha):
    "SciPy's moments of Beta(α, α), all pairs."
    second, cross = beta.moment(2, alpha, alpha), 0.5 - beta.moment(2, alpha, alpha)
    np.testing.assert_allclose(M.mix_constant(alpha), 2 * second, rtol=1e-12)
    r = normal(9, seed=1)
    pairs = np.mean([second * (a**2 + b**2) + 2 * cross * a * b for a in r.tolist() for b in r.tolist()])
    np.testing.assert_allclose(M.mixed_square(r, alpha), pairs, rtol=1e-12)


def test_squares_by_drawing():
    "Five standard errors: false alarm below 1e-6."
    x, w = normal(2, 6, 3, seed=2), normal(3, seed=3)
    drawn = (M.mix_pairs(x, 200_000, 0.4, make_rng(4)).x @ w + 0.3).square()
    apart = drawn.mean(-1) - M.mixed_square(x @ w + 0.3, 0.4)
    assert (apart.abs() < 5 * drawn.std(-1) / 200_000**0.5).all()


def test_the_formula_needs_an_affine_residual():
    x = normal(6, 2, seed=5)
    drawn = M.mix_pairs(x, 200_000, 0.4, make_rng(6)).x.square().sum(-1).square()
    assert abs(drawn.mean() - M.mixed_square(x.square().sum(-1), 0.4)) > 20 * drawn.std() / 200_000**0.5


def test_limits_of_the_constant():
    np.testing.assert_allclose([M.mix_constant(1e-9), M.mix_constant(1e9)], [1, 0.5], atol=1e-8)
    for call in (lambda: M.mix_constant(float("nan")), lambda: M.mix_pairs(normal(3, 2), 4, float("nan"), make_rng(0))):
        with pytest.raises(ValueError, match=re.escape("alpha must be > 0, got nan")):
            call()


def test_mixtures_are_what_they_say():
    "Shares by a Kolmogorov–Smirnov test (fixed seed, false alarm 1e-4); mixing keeps the mean and shrinks the covariance to c (five standard errors)."
    x = normal(2, 50, 3, seed=7)
    mixed = M.mix_pairs(x, 40_000, 0.4, make_rng(8))
    assert kstest(mixed.share[0].numpy(), beta(0.4, 0.4).cdf).pvalue > 1e-4
    b = 1
    by_hand = mixed.share[b, :, None] * x[b][mixed.first[b]] + (1 - mixed.share[b, :, None]) * x[b][mixed.second[b]]
    np.testing.assert_allclose(mixed.x[b], by_hand, rtol=1e-12)
    cov, expected = torch.cov(mixed.x[b].mT), M.mix_constant(0.4) * torch.cov(x[b].mT, correction=0)
    np.testing.assert_allclose(cov, expected, atol=5 * 2 / 40_000**0.5)
    assert abs(mixed.x[b].mean(0) - x[b].mean(0)).max() < 5 * (cov.diagonal().max() / 40_000) ** 0.5


@pytest.mark.parametrize("n", [4, 30])
def test_mixtures_say_nothing_new_about_an_affine_teacher(n):
    "The least-squares student of least norm, with fewer examples than unknowns and with more."
    x, w = normal(n, 8, seed=9), normal(9, seed=10)
    both = torch.cat([x, M.mix_pairs(x, 200, 0.4, make_rng(11)).x])
    wide = [torch.cat([a, torch.ones(len(a), 1, dtype=torch.float64)], -1) for a in (x, both)]
    fits = [torch.linalg.pinv(a, rtol=1e-10) @ (a @ w) for a in wide]
    np.testing.assert_allclose(fits[0], fits[1], atol=1e-8)
    assert ((fits[0] - w).norm() < 1e-8) == (n >= 9)


def test_truth_is_two_mixtures():
    x = 2 * normal(3, 10, 2, seed=12)
    corners = Mixture([0.25] * 4, [[i, j] for i in (-1.0, 1.0) for j in (-1.0, 1.0)], [0.1] * 4)
    edges = Mixture([0.25] * 4, [[0.0, -1], [0, 1], [-1, 0], [1, 0]], [0.1] * 4)
    np.testing.assert_allclose(M.true_log_odds(x), edges.log_prob(x) - corners.log_prob(x), rtol=1e-9, atol=1e-9)


def test_teacher_against_torch_and_learns():
    x, y = M.draw_examples(300, 2, make_rng(13))
    teacher = M.fit_teacher(x, y, make_rng(14))
    by_torch = torch.nn.functional.linear(torch.nn.functional.linear(x[1], teacher.hidden[1, :2].mT, teacher.hidden[1, 2]).relu(), teacher.out[1, :32].mT, teacher.out[1, 32])
    np.testing.assert_allclose(M.teacher_log_odds(teacher, x)[1], by_torch[:, 0], rtol=1e-10)
    right = ((M.teacher_log_odds(teacher, x) > 0) == (y > 0.5)).double().mean()
    best = ((M.true_log_odds(x) > 0) == (y > 0.5)).double().mean()
    assert right > best - 0.03
    alone = M.fit_teacher(x, y, make_rng(14), steps=0)
    assert ((M.teacher_log_odds(alone, x) > 0) == (y > 0.5)).double().mean() < 0.75


def test_arms():
    x, y = M.draw_examples(15, 2, make_rng(15))
    fresh, _ = M.draw_examples(40, 2, make_rng(16))
    teacher = M.fit_teacher(x, y, make_rng(17), steps=20)
    arms = M.ask_arms(x, y, fresh, teacher, 0.4, make_rng(18), taus=[0.5])
    assert {name: [t.x.shape[1] for t in terms] for name, terms in arms.items()} == {
        "direct": [15], "direct, mixup": [15, 40], "distilled": [15], "distilled, τ = 0.5": [15], "student mixup": [15, 40], "teacher mixup": [15, 40],
        "both": [15, 40, 40], "jitter": [15, 40], "wide jitter": [15, 40], "fresh": [15, 40],
    }
    mixed = M.mix_pairs(x, 40, 0.4, make_rng(18))
    i, j, share = (a[0] for a in (mixed.first, mixed.second, mixed.share))
    told = arms["student mixup"][1]
    np.testing.assert_allclose(told.x, mixed.x)
    np.testing.assert_allclose(told.labels[0], share * y[0][i] + (1 - share) * y[0][j], rtol=1e-12)
    for name in ("teacher mixup", "jitter", "wide jitter", "fresh"):
        np.testing.assert_allclose(arms[name][1].labels, torch.sigmoid(M.teacher_log_odds(teacher, arms[name][1].x)), rtol=1e-12)
    p = arms["distilled"][0].labels
    np.testing.assert_allclose(arms["distilled, τ = 0.5"][0].labels, p**2 / (p**2 + (1 - p) ** 2), atol=1e-9)


def test_wide_jitter_is_as_far_away_as_mixtures():
    "Mean squares within five standard errors."
    x, y = M.draw_examples(30, 1, make_rng(19))
    fresh, _ = M.draw_examples(20_000, 1, make_rng(20))
    arms = M.ask_arms(x, y, fresh, M.fit_teacher(x, y, make_rng(21), steps=1), 0.4, make_rng(22))
    near = x[0][M.mix_pairs(x, 20_000, 0.4, make_rng(22)).first[0]]
    square = {name: (arms[name][1].x[0] - near).square().sum(-1) for name in ("teacher mixup", "wide jitter", "jitter")}
    apart = square["teacher mixup"].mean() - square["wide jitter"].mean()
    assert abs(apart) < 5 * ((square["teacher mixup"].var() + square["wide jitter"].var()) / 20_000) ** 0.5
    np.testing.assert_allclose(square["jitter"].mean(), 0.2, rtol=0.05)


def test_student_weighs_terms_the_same():
    x, y = M.draw_examples(10, 1, make_rng(23))
    more, told = M.draw_examples(20, 1, make_rng(24))

    def features(x):
        return M.random_features(x, make_rng(25))

    found = M.train_student([M.Questions(x, y), M.Questions(more, told)], features)
    twice = [torch.cat([a, a, b], 1) for a, b in ((x, more), (y, told))]  # ten examples twice against twenty
    np.testing.assert_allclose(found, fit_logistic(features(twice[0]), twice[1], ridge=1e-3), atol=1e-7)
