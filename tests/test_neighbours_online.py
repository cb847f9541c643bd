"""Online distillation: module optima, what the student feels, the collapse without an anchor, the two worlds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from kdnb.chain import MarkovChain, count, expected_counts, random_chain
from kdnb.core import make_rng
from kdnb.exact import moment_match
from kdnb.lm import llama_config, new_lm, toy_lm
from kdnb.mixture import Mixture
from kdnb.neighbours.online import (
    LowRank,
    OnlineModule,
    arithmetic_module,
    as_chain,
    cost,
    distil_lm,
    distil_table,
    forward_kl,
    geometric_module,
    log_table,
    read_by,
    recall_beyond,
    reverse_gaussian,
    reverse_kl,
    student_slope,
    visits,
)

MODULES = {"arithmetic": arithmetic_module, "geometric": geometric_module}


def pair(*shape, seed=0):
    rng = make_rng(seed, "pair")
    return (2 * torch.randn(2, *shape, generator=rng, dtype=torch.float64)).log_softmax(-1)


def random_start(v, rank, batch=(), seed=0):
    rng = make_rng(seed, "start")
    return LowRank(*(0.5 * torch.randn(*batch, n, rank, generator=rng, dtype=torch.float64) for n in (v + 1, v)))


# --- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("kind", MODULES)
def test_module_is_the_minimum(kind, mu):
    p, s = (a.exp().numpy() for a in pair(4))

    def loss(z):
        t = np.exp(z - np.logaddexp.reduce(z))
        if kind == "arithmetic":
            return np.sum(p * np.log(p / t)) + mu * np.sum(s * np.log(s / t))
        return np.sum(t * np.log(t / p)) + mu * np.sum(t * np.log(t / s))

    found = minimize(loss, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-15, "maxiter": 20_000, "maxfev": 20_000})
    t = np.exp(found.x - np.logaddexp.reduce(found.x))
    made = MODULES[kind](torch.tensor(p).log(), torch.tensor(s).log(), mu).exp().numpy()
    np.testing.assert_allclose(made, t, atol=1e-6)  # a simplex search ends near √ε
    np.testing.assert_allclose(made.sum(), 1, atol=1e-14)


def test_formulas_of_the_notes():
    log_p, log_s = pair(3, 6)
    p, s = log_p.exp(), log_s.exp()
    np.testing.assert_allclose(arithmetic_module(log_p, log_s, 0.3).exp(), (p + 0.3 * s) / 1.3, rtol=1e-13)
    power = p ** (1 / 1.3) * s ** (0.3 / 1.3)
    np.testing.assert_allclose(geometric_module(log_p, log_s, 0.3).exp(), power / power.sum(-1, keepdim=True), rtol=1e-13)


@pytest.mark.parametrize("kind", MODULES)
def test_no_pull_is_the_teacher(kind):
    log_p, log_s = pair(5)
    np.testing.assert_allclose(MODULES[kind](log_p, log_s, 0.0), log_p, atol=1e-14)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("mu", [-0.1, float("nan")])
def test_bad_pull(kind, mu):
    with pytest.raises(ValueError, match=f"mu must be >= 0, got {mu}"):
        MODULES[kind](*pair(3), mu)


def test_divergences_where_the_target_is_zero():
    sure = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    even = torch.full((1, 2), 0.5, dtype=torch.float64).log()
    np.testing.assert_allclose(forward_kl(sure, even), np.log(2))
    assert reverse_kl(sure, even).item() == torch.inf


# --- what the student feels ---------------------------------------------------------------------


def numeric_slope(log_t, log_s, loss):
    z, h = log_s.numpy(), 1e-6
    return np.array([(loss(log_t, torch.tensor(z + h * e).log_softmax(-1)) - loss(log_t, torch.tensor(z - h * e).log_softmax(-1))).item() / (2 * h) for e in np.eye(len(z))])


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
@pytest.mark.parametrize("kind", MODULES)
def test_slope_by_differences(kind, loss):
    log_p, log_s = pair(5)
    t = MODULES[kind](log_p, log_s, 0.7)
    np.testing.assert_allclose(student_slope(log_p, log_s, lambda p, s: MODULES[kind](p, s, 0.7), loss), numeric_slope(t, log_s, loss), atol=1e-8)


@pytest.mark.parametrize("mu", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("kind", "loss"), [("arithmetic", forward_kl), ("geometric", reverse_kl)])
def test_matched_pairings_are_a_smaller_step(kind, loss, mu):
    log_p, log_s = pair(4, 7)
    plain = student_slope(log_p, log_s, lambda p, s: p, loss)
    felt = student_slope(log_p, log_s, lambda p, s: MODULES[kind](p, s, mu), loss)
    np.testing.assert_allclose((1 + mu) * felt, plain, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("kind", "loss", "other"), [("arithmetic", reverse_kl, forward_kl), ("geometric", forward_kl, reverse_kl)])
def test_crossed_pairings_turn_into_the_other_divergence(kind, loss, other):
    log_p, log_s = pair(4, 7)
    far = [((1 + mu) * student_slope(log_p, log_s, lambda p, s, mu=mu: MODULES[kind](p, s, mu), loss) - student_slope(log_p, log_s, lambda p, s: p, other)).abs().max() for mu in (1e4, 1e5, 1e6)]
    np.testing.assert_allclose(far[1] / far[0], 0.1, rtol=0.1)  # first order in 1/μ
    np.testing.assert_allclose(far[2] / far[1], 0.1, rtol=0.1)


# --- chains -------------------------------------------------------------------------------------


def test_table_and_chain_are_inverse():
    p = random_chain(5, 6, make_rng(0, "chain"))
    again = as_chain(log_table(p), 6)
    np.testing.assert_allclose(again.transition, p.transition, atol=1e-15)
    np.testing.assert_allclose(again.initial, p.initial, atol=1e-15)


def test_visits_of_a_sample_by_hand():
    p = MarkovChain([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], 3)
    x = p.sample(50, make_rng(0, "draws"))
    seen = visits(count(x, p))
    left = x.ids[:, :2].flatten().tolist()
    assert seen.tolist() == [50, left.count(0), left.count(1)]
    np.testing.assert_allclose(visits(expected_counts(p)), [1, 1, 1])


def test_a_student_with_all_the_rank_becomes_the_teacher():
    p = random_chain(4, 5, make_rng(1, "chain"))
    start = LowRank(torch.zeros(5, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    for loss in (forward_kl, reverse_kl):
        s = distil_table(log_table(p), lambda s: torch.ones(5), lambda p, s: p, loss, start, steps=600, lr=0.05)
        np.testing.assert_allclose(s.exp(), log_table(p).exp(), atol=2e-3)


def test_rank_is_kept_and_seeds_do_not_mix():
    tables = torch.stack([log_table(random_chain(6, 5, make_rng(s, "chain"))) for s in (0, 1)])
    start = random_start(6, 2, (2,))
    both = distil_table(tables, lambda s: torch.ones(2, 7), lambda p, s: p, forward_kl, start, steps=60)
    alone = distil_table(tables[1], lambda s: torch.ones(7), lambda p, s: p, forward_kl, LowRank(*(a[1] for a in start)), steps=60)
    np.testing.assert_allclose(both[1], alone, atol=1e-9)
    centred = both[0] - both[0].mean(-1, keepdim=True)  # log-softmax adds a constant to each row
    assert torch.linalg.matrix_rank(centred, atol=1e-8) == 2
    assert not torch.allclose(both[0], tables[0], atol=0.1)


def test_plain_forward_distillation_is_a_minimum():
    p = log_table(random_chain(5, 6, make_rng(2, "chain")))
    start = random_start(5, 2)
    s = distil_table(p, lambda s: torch.ones(6), lambda p, s: p, forward_kl, start, steps=1000)

    def loss(flat):
        u, v = torch.tensor(flat[:12]).reshape(6, 2), torch.tensor(flat[12:]).reshape(5, 2)
        return forward_kl(p, (u @ v.mT).log_softmax(-1)).mean().item()

    found = min((minimize(loss, np.concatenate([a.flatten() for a in random_start(5, 2, seed=k)])) for k in range(2)), key=lambda f: f.fun)
    np.testing.assert_allclose(forward_kl(p, s).mean(), found.fun, atol=2e-3)


def test_matched_okd_is_plain_distillation_to_the_end():
    p = log_table(random_chain(5, 6, make_rng(3, "chain")))
    ones, start = torch.ones(6), random_start(5, 2)
    plain = distil_table(p, lambda s: ones, lambda p, s: p, forward_kl, start, steps=200)
    okd = distil_table(p, lambda s: ones, lambda p, s: arithmetic_module(p, s, 1.0), forward_kl, start, steps=200)
    np.testing.assert_allclose(okd.exp(), plain.exp(), atol=1e-4)  # Adam divides the factor out, but for its ε


def test_module_without_anchor_collapses_on_the_student():
    p = log_table(random_chain(5, 6, make_rng(4, "chain")))
    start, ones = random_start(5, 2), torch.ones(6)
    loose, held = (OnlineModule(p, mu=1.0, rank=None, anchor=a, lr=0.1) for a in (0.0, 1.0))
    ends = [distil_table(p, lambda s: ones, module, reverse_kl, start, steps=300) for module in (loose, held)]
    assert reverse_kl(loose(p, ends[0]), ends[0]).max() < 1e-3  # zero loss
    assert reverse_kl(p, ends[0]).mean() > 2 * reverse_kl(p, ends[1]).mean()  # and little learned


@pytest.mark.parametrize("rank", [1, None])
def test_trained_module_starts_at_the_teacher_and_ends_at_the_minimum(rank):
    log_p, log_s = pair(1, 4)  # one row: a correction of rank 1 is free
    module = OnlineModule(log_p, mu=0.5, rank=rank, lr=1e-12)
    np.testing.assert_allclose(module(log_p, log_s), log_p, atol=1e-10)
    module = OnlineModule(log_p, mu=0.5, rank=rank, lr=0.02)
    for _ in range(1000):
        log_t = module(log_p, log_s)
    np.testing.assert_allclose(log_t.exp(), arithmetic_module(log_p, log_s, 0.5).exp(), atol=1e-3)


def test_costs_by_hand():
    assert cost(100, 7) == (700, 100, 0, 0)
    assert cost(100, 7, online=True) == (700, 100, 700, 0)
    assert cost(30, 7, on_policy=True) == (210, 210, 0, 210)


# --- mixtures -----------------------------------------------------------------------------------


def test_reverse_gaussian_finds_one_mode_and_forward_spans_both():
    p = Mixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.0]], [[0.1, 0.1], [0.1, 0.1]])
    found = reverse_gaussian(p, Mixture([1.0], [[1.0, 0.2]], [[0.5, 0.5]]))
    np.testing.assert_allclose(found.means, [[2.0, 0.0]], atol=1e-3)
    np.testing.assert_allclose(found.covs, [[0.1, 0.1]], atol=1e-3)
    np.testing.assert_allclose(moment_match(p).covs, [[4.1, 0.1]])


def test_reverse_gaussian_objective_by_independent_quadrature():
    p = Mixture([0.7, 0.3], [[0.0], [1.0]], [[0.5], [0.2]])
    found = reverse_gaussian(p, Mixture([1.0], [[0.0]], [[1.0]]), steps=400)
    x = np.linspace(-8, 8, 20_001)[:, None]

    def loss(theta):
        q = Mixture([1.0], [[theta[0]]], [[np.exp(2 * theta[1])]]).log_prob(x)
        return np.trapezoid(np.exp(q) * (q - p.log_prob(x)), x[:, 0])

    best = minimize(loss, [0.2, -0.3])
    np.testing.assert_allclose([found.means.item(), found.covs.log().item() / 2], best.x, atol=2e-3)


def test_reverse_gaussian_in_batches_does_not_mix():
    p = Mixture([[0.5, 0.5]] * 2, [[[-1.0, 0], [1.0, 0]], [[0.0, 2], [0.5, 0]]], [[[0.3, 0.3]] * 2] * 2)
    start = Mixture([[1.0]] * 2, [[[0.3, 0.1]], [[0.2, 0.4]]], [[[1.0, 1.0]]] * 2)
    both, alone = reverse_gaussian(p, start, 0.5, steps=40), reverse_gaussian(p[1], start[1], 0.5, steps=40)
    np.testing.assert_allclose(both.means[1], alone.means, atol=1e-9)


# --- language models ----------------------------------------------------------------------------


def test_read_by_is_what_sampling_keeps():
    from kdnb.sampling import sample_lm

    lm = toy_lm(seed=1)
    drawn = sample_lm(lm, 30, rng=make_rng(0, "kept"), keep_next=True)
    read = read_by(lm, drawn._replace(next_log_prob=None))
    inside = torch.arange(drawn.ids.shape[1]) < drawn.length[:, None]
    np.testing.assert_allclose(read.next_log_prob[inside], drawn.next_log_prob[inside], atol=1e-5)
    assert not read.next_log_prob.requires_grad


def test_distil_lm_learns_leaves_its_argument_alone_and_repeats():
    lm = toy_lm(seed=2, scale=2.0)
    start = replace(new_lm(llama_config(3, 64, 1, positions=8), 0, lm))
    before = {k: v.clone() for k, v in start.model.state_dict().items()}
    lesson = read_by(lm, lm.sample(128, make_rng(0, "lesson")))
    calls = []

    def tokens(student):
        calls.append(student)
        return lesson

    once, again = (distil_lm(start, tokens, lambda p, s: arithmetic_module(p, s, 1.0), reverse_kl, rng=make_rng(0, "order"), rounds=12) for _ in range(2))
    inside = torch.arange(lesson.ids.shape[1]) < lesson.length[:, None]
    apart = [reverse_kl(lesson.next_log_prob[inside], read_by(s, lesson).next_log_prob[inside]).mean().item() for s in (start, once)]
    assert apart[1] < 0.2 * apart[0]
    assert len(calls) == 24
    assert all(torch.equal(v, before[k]) for k, v in start.model.state_dict().items())
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in once.model.state_dict().items())


# --- comparing at equal precision ---------------------------------------------------------------


def test_recall_beyond_a_curve():
    curve = [(torch.tensor([p, 10.0 + p]), torch.tensor([r, 2 * r])) for p, r in ((2.0, -4.0), (0.0, 0.0), (1.0, -1.0))]  # not in order
    np.testing.assert_allclose(recall_beyond(curve, torch.tensor([1.5, 10.5]), torch.tensor([-2.0, -2.0])), [0.5, -1.0])
    np.testing.assert_allclose(recall_beyond(curve, torch.tensor([9.0, 0.0]), torch.tensor([-4.0, 0.0])), [0.0, 0.0])  # beyond the ends: the ends
