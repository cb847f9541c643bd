"""Guards of kdnb.neighbours.self_feature. Oracles: linear programming, permutations by enumeration, SciPy's Wasserstein distance, finite differences, torch's own convolution."""

import math
import re
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance

from kdnb.core import make_rng
from kdnb.neighbours import self_feature as S


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=make_rng(seed, "normal"), dtype=torch.float64)


def emd(cost):
    return (S.emd_flow(cost) * cost).sum((-2, -1))


@pytest.mark.parametrize(("i", "j"), [(1, 1), (1, 5), (4, 4), (6, 3), (3, 6), (4, 6), (16, 8)])
def test_value_by_linear_programming_and_marginals(i, j):
    cost = torch.rand(3, i, j, generator=make_rng(i, j), dtype=torch.float64)
    flow = S.emd_flow(cost)
    assert flow.shape == (3, i, j)
    assert (flow >= 0).all()
    np.testing.assert_allclose(flow.sum(-1), 1 / i, rtol=1e-12)
    np.testing.assert_allclose(flow.sum(-2), 1 / j, rtol=1e-12)
    equal = np.vstack([np.kron(np.eye(i), np.ones(j)), np.kron(np.ones(i), np.eye(j))])
    for c, value in zip(cost, emd(cost), strict=True):
        by_lp = linprog(c.flatten().numpy(), A_eq=equal, b_eq=[1 / i] * i + [1 / j] * j).fun
        np.testing.assert_allclose(value, by_lp, rtol=1e-8)


def test_value_by_enumeration():
    cost = torch.rand(5, 5, generator=make_rng(1), dtype=torch.float64)
    best = min(sum(cost[i, p[i]].item() for i in range(5)) / 5 for p in permutations(range(5)))
    np.testing.assert_allclose(emd(cost), best, rtol=1e-12)


def test_transport_does_not_see_the_order_and_l2_does():
    a, b = normal(2, 7, 3)
    order = torch.randperm(7, generator=make_rng(2))
    np.testing.assert_allclose(emd(torch.cdist(a, b[order])), emd(torch.cdist(a, b)), rtol=1e-12)
    np.testing.assert_allclose(emd(torch.cdist(a[order], a)), 0, atol=1e-12)
    assert abs((a - b[order]).norm(dim=-1).mean() - (a - b).norm(dim=-1).mean()) > 1e-3


@pytest.mark.parametrize(("i", "j"), [(8, 8), (12, 4)])
def test_one_dimension_is_the_sorted_match(i, j):
    u, v = normal(i, seed=3), normal(j, seed=4)
    found = emd(torch.cdist(u[:, None], v[:, None]))
    np.testing.assert_allclose(found, wasserstein_distance(u.numpy(), v.numpy()), rtol=1e-10)
    matched = (u.sort().values - v.sort().values.repeat_interleave(i // j)).abs().mean()
    np.testing.assert_allclose(found, matched, rtol=1e-10)


def test_gradient_is_the_flow():
    cost = torch.rand(3, 4, generator=make_rng(5), dtype=torch.float64)
    held = cost.clone().requires_grad_()
    emd(held).backward()
    slope = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        for j in range(4):
            nudge = torch.zeros(3, 4, dtype=torch.float64)
            nudge[i, j] = 1e-6
            slope[i, j] = (emd(cost + nudge) - emd(cost - nudge)) / 2e-6
    np.testing.assert_allclose(held.grad, slope, atol=1e-8)
    np.testing.assert_allclose(held.grad, S.emd_flow(cost), rtol=1e-12)


def test_truth_by_plain_densities():
    x, _ = S.draw_signals((20,), make_rng(6))
    density = np.zeros((20, 3))
    for c, motif in enumerate(S.MOTIFS.tolist()):
        for s in range(13):
            mean = np.zeros(16)
            mean[s : s + 4] = motif
            density[:, c] += np.exp(-0.5 * ((x.numpy() - mean) ** 2).sum(-1) / S.NOISE**2)
    np.testing.assert_allclose(S.true_log_prob(x).exp(), density / density.sum(-1, keepdims=True), rtol=1e-9)


def test_network_against_torch():
    nets, x = S.new_nets(2, make_rng(7)), normal(2, 3, 16, seed=8)
    found = S.run_nets(nets, x)
    for b in range(2):
        h = x[b][:, None]
        for w, channels in ((nets.first[b], 1), (nets.second[b], 8)):
            kernel = w[:-1].reshape(3, channels, -1).permute(2, 1, 0)
            h = torch.nn.functional.conv1d(h, kernel, w[-1], padding=1).relu()
            if channels == 1:
                np.testing.assert_allclose(found.shallow[b], h.mT, atol=1e-12)
                h = torch.nn.functional.avg_pool1d(h, 2)
        np.testing.assert_allclose(found.deep[b], torch.nn.functional.avg_pool1d(h.mT, 2), atol=1e-12)
        logits = torch.cat([h.amax(-1), torch.ones(3, 1, dtype=torch.float64)], -1) @ nets.head[b]
        np.testing.assert_allclose(found.log_p[b], logits.log_softmax(-1), atol=1e-12)


def test_feature_losses():
    nets, x = S.new_nets(1, make_rng(9)), normal(1, 4, 16, seed=10)
    seen = S.run_nets(nets, x)
    by_hand = torch.stack([(seen.shallow[0, n, i] - seen.deep[0, n, i // 2]).norm() for n in range(4) for i in range(16)]).mean()
    np.testing.assert_allclose(S.feature_loss(nets, seen, "position", make_rng(1))[0], by_hand, rtol=1e-12)
    order = torch.randperm(8, generator=make_rng(1))
    shuffled = seen._replace(deep=seen.deep[:, :, order])
    np.testing.assert_allclose(S.feature_loss(nets, seen, "shuffled", make_rng(1)), S.feature_loss(nets, shuffled, "position", make_rng(1)), rtol=1e-12)
    np.testing.assert_allclose(S.feature_loss(nets, seen, "transport", make_rng(1)), S.feature_loss(nets, shuffled, "transport", make_rng(1)), rtol=1e-12)
    other = seen._replace(deep=seen.deep[:, [3, 0, 1, 2]])
    np.testing.assert_allclose(S.feature_loss(nets, seen, "another", make_rng(1)), S.feature_loss(nets, other, "transport", make_rng(1)), rtol=1e-12)
    with pytest.raises(ValueError, match=re.escape("matching must be one of position, shuffled, transport, another, got 'emd'")):
        S.feature_loss(nets, seen, "emd", make_rng(1))


def test_no_gradient_into_the_deep_side():
    nets = S.Nets(*(w.requires_grad_() for w in S.new_nets(1, make_rng(11))))
    S.feature_loss(nets, S.run_nets(nets, normal(1, 4, 16, seed=12)), "transport", make_rng(1)).sum().backward()
    assert nets.second.grad is None
    assert nets.head.grad is None
    assert nets.first.grad.abs().max() > 0
    assert nets.project.grad.abs().max() > 0


def test_arms_are_paired_and_learn():
    "Two arms that are the same give the same networks; an arm trained with others is the one trained alone; the loss falls."
    x, y = S.draw_signals((2, 40), make_rng(13))
    flat = torch.full_like(y, -math.log(3))
    made = S.train_nets({"a": S.Arm(), "b": S.Arm(), "soft": S.Arm(tau=1.0)}, x, y, flat, 0, 30, 0.3)
    alone = S.train_nets({"a": S.Arm()}, x, y, flat, 0, 30, 0.3)["a"]
    for one, two, three in zip(made["a"], made["b"], alone, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9)
        np.testing.assert_allclose(one, three, rtol=1e-7, atol=1e-10)
    before, after = (-(y * S.run_nets(n, x).log_p).sum(-1).mean() for n in (S.new_nets(2, make_rng(0, "nets")), made["a"]))
    assert after < before - 0.3
    np.testing.assert_allclose(S.run_nets(made["soft"], x).log_p.exp().mean((0, 1)), 1 / 3, atol=0.05)  # told nothing but thirds


def test_smoothing_schedule():
    "Full smoothing of all steps is training on thirds; smoothing that decays moves less."
    x, y = S.draw_signals((1, 40), make_rng(14))
    flat = torch.full_like(y, -math.log(3))
    made = S.train_nets({"all": S.Arm(start=1.0, end=1.0), "thirds": S.Arm(tau=1.0), "decays": S.Arm(start=1.0), "none": S.Arm()}, x, y, flat, 0, 100, 0.0)
    np.testing.assert_allclose(made["all"].head, made["thirds"].head, rtol=1e-9)
    sure = {name: S.run_nets(nets, x).log_p.exp().amax(-1).mean() for name, nets in made.items()}
    assert sure["all"] < sure["decays"] < sure["none"]
