"""kdnb.chain against a list of all sequences at V = 3, T = 4, written in plain Python."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import softmax

from kdnb import chain as C
from kdnb.core import estimate, expected_log_probs, make_rng, measure

V, T = 3, 4


def listed(p):
    "Every possible sequence (as a tuple without padding) and its probability: the definition, factor by factor."
    first, steps = p.initial.numpy(), [p.step(t).numpy() for t in range(p.length - 1)]
    found = {}

    def grow(prefix, prob):
        if len(prefix) == p.length or prefix[-1] == p.stop:
            found[prefix] = prob
            return
        for v in range(p.v):
            grow((*prefix, v), prob * steps[len(prefix) - 1][prefix[-1], v])

    for v in range(p.v):
        grow((v,), first[v])
    return found


def as_draws(p, sequences):
    "Sequences as a batch of draws, padded with the stop symbol."
    ids = torch.tensor([[*s, *[p.stop or 0] * (p.length - len(s))] for s in sequences])
    return C.Sequences(ids, torch.tensor([len(s) for s in sequences]))


def expectation(prob, value):
    "Σ p·value with 0·(−inf) = 0."
    return sum(a * b for a, b in zip(prob, value, strict=True) if a > 0)


def log(a):
    return math.log(a) if a > 0 else -math.inf


def by_position(seed):
    rng = make_rng(seed)
    return C.MarkovChain(torch.rand(V, generator=rng).softmax(-1), (2 * torch.randn(T - 1, V, V, generator=rng)).softmax(-1), T)


CHAINS = {
    "endless": lambda seed: C.random_chain(V, T, make_rng(seed)),
    "stop": lambda seed: C.random_chain(V, T, make_rng(seed), stop_prob=0.3),
    "by position": by_position,
}


@pytest.fixture(params=CHAINS)
def pair(request):
    return CHAINS[request.param](1), CHAINS[request.param](2)


def test_log_prob_and_normalisation(pair):
    p, _ = pair
    every = listed(p)
    assert sum(every.values()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(p.log_prob(as_draws(p, every)).exp(), list(every.values()), rtol=1e-12)


def test_padding_does_not_count():
    p = CHAINS["stop"](1)
    x = p.sample(200, make_rng(3))
    padded = C.Sequences(torch.where(torch.arange(T) < x.length[:, None], x.ids, -1), x.length)
    assert torch.equal(p.log_prob(x), p.log_prob(padded))
    for ours, theirs in zip(C.count(x, p)[:2], C.count(padded, p)[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_expectations_match_the_list(pair):
    p, q = pair
    every, other = listed(p), listed(q)
    prob, length = list(every.values()), [len(s) for s in every]
    cross = expectation(prob, [log(other[s]) for s in every])
    own = expectation(prob, [log(a) for a in prob])
    mean_length = expectation(prob, length)
    np.testing.assert_allclose(C.exact_length(p), mean_length, rtol=1e-12)
    for per, unit in (("sequence", 1), ("token", mean_length)):
        np.testing.assert_allclose(C.exact_cross(p, q, per), cross / unit, rtol=1e-12)
        np.testing.assert_allclose(C.exact_precision(p, q, per), cross / unit, rtol=1e-12)
        np.testing.assert_allclose(C.exact_recall(q, p, per), cross / unit, rtol=1e-12)
        np.testing.assert_allclose(C.exact_entropy(p, per), -own / unit, rtol=1e-12)
        np.testing.assert_allclose(C.exact_kl(p, q, per), (own - cross) / unit, rtol=1e-10)


def test_marginals_and_expected_counts_match_the_list(pair):
    p, _ = pair
    marginal, first, then = np.zeros((T, V)), np.zeros(V), np.zeros((V, V))
    for s, a in listed(p).items():
        first[s[0]] += a
        for t in range(T):
            marginal[t, s[t] if t < len(s) else p.stop] += a
        for i, j in itertools.pairwise(s):
            then[i, j] += a
    np.testing.assert_allclose(C.marginals(p), marginal, atol=1e-14)
    counts = C.expected_counts(p)
    np.testing.assert_allclose(counts.initial, first, atol=1e-14)
    np.testing.assert_allclose(counts.transition, then, atol=1e-14)


@pytest.mark.parametrize("tau", [0.2, 1.0, 2.5])
def test_tempering_per_sequence_is_the_listed_power(pair, tau):
    p, _ = pair
    every = listed(p)
    power = {s: a ** (1 / tau) for s, a in every.items()}
    tempered = listed(p.temper(tau))
    for s in every:
        assert tempered[s] == pytest.approx(power[s] / sum(power.values()), rel=1e-11)


@pytest.mark.parametrize("tau", [0.2, 1.0, 2.5])
def test_tempering_per_token_is_a_softmax_of_each_row(pair, tau):
    p, _ = pair
    q = p.sharpen(tau)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(q.transition, softmax(np.log(p.transition.numpy()) / tau, axis=-1), rtol=1e-12)
        np.testing.assert_allclose(q.initial, softmax(np.log(p.initial.numpy()) / tau, axis=-1), rtol=1e-12)
    assert (q.length, q.stop) == (p.length, p.stop)


def test_per_token_over_per_sequence_is_the_product_of_normalisers():
    p, tau = CHAINS["endless"](3), 0.4
    z_first, z = (p.initial ** (1 / tau)).sum(), (p.transition ** (1 / tau)).sum(-1)
    big_z = sum(a ** (1 / tau) for a in listed(p).values())
    token, sequence = listed(p.sharpen(tau)), listed(p.temper(tau))
    for s in token:
        ratio = big_z / (z_first * math.prod(z[i] for i in s[:-1]))
        assert token[s] / sequence[s] == pytest.approx(ratio.item(), rel=1e-10)


def test_low_temperature_finds_the_greedy_and_the_most_probable_sequence():
    p = CHAINS["stop"](4)
    every = listed(p)
    cold = listed(p.temper(0.002))
    assert max(cold, key=cold.get) == max(every, key=every.get)
    greedy = [p.initial.argmax().item()]
    while len(greedy) < T and greedy[-1] != p.stop:
        greedy.append(p.transition[greedy[-1]].argmax().item())
    cold = listed(p.sharpen(0.002))
    assert max(cold, key=cold.get) == tuple(greedy)


def test_sampling_frequencies(pair):
    p, _ = pair
    n = 40_000
    x = p.sample(n, make_rng(5))
    assert x.ids.shape == (n, T)
    assert x.length.shape == (n,)
    every = listed(p)
    seen = dict.fromkeys(every, 0)
    for ids, length in zip(x.ids.tolist(), x.length.tolist(), strict=True):
        seen[tuple(ids[:length])] += 1  # KeyError: an impossible sequence
    chi = sum((seen[s] - n * a) ** 2 / (n * a) for s, a in every.items() if a > 0)
    cells = sum(a > 0 for a in every.values())
    assert chi < cells + 5 * math.sqrt(2 * cells)  # false alarm about 1e-6, seed fixed
    assert all(seen[s] == 0 for s, a in every.items() if a == 0)


def test_a_symbol_of_probability_zero_is_never_drawn():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).expand(20_000, -1)
    assert set(C._draw(p, make_rng(6)).tolist()) == {1, 3}


def test_rao_blackwell_has_the_exact_expectation(pair):
    p, q = pair
    every = listed(p)
    (score,) = p.expected_log_prob([q], as_draws(p, every))
    np.testing.assert_allclose(expectation(every.values(), score.tolist()), C.exact_cross(p, q, "sequence"), rtol=1e-12)


def test_the_ruler_agrees_with_the_exact_values(pair):
    p, q = pair
    r = measure(p, q, 4000, make_rng(7))
    exact = {
        "precision": C.exact_precision(p, q), "recall": C.exact_recall(p, q), "student_entropy": C.exact_entropy(p), "truth_entropy": C.exact_entropy(q),
        "kl_student_truth": C.exact_kl(p, q), "kl_truth_student": C.exact_kl(q, p),
    }
    for name, value in r._asdict().items():
        assert abs(value.mean - exact[name].item()) < 5 * value.se + 1e-12, name  # false alarm 6e-7 each, seed fixed
    plain, weights = expected_log_probs(p, [q], p.sample(4000, make_rng(8)), rao_blackwell=False)
    assert estimate(plain[0], weights).se > r.precision.se


def test_a_batch_is_its_members():
    one, two = CHAINS["stop"](9), CHAINS["stop"](10)
    both = C.MarkovChain(torch.stack([one.initial, two.initial]), torch.stack([one.transition, two.transition]), T, one.stop)
    tau = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    for verb in ("sharpen", "temper"):
        q = getattr(both, verb)(tau)
        assert q.initial.shape == (3, 2, V)
        x = both.sample(50, make_rng(11))
        cross, score, (expected,) = C.exact_cross(both, q), q.log_prob(x), both.expected_log_prob([q], x)
        fitted = C.fit_chain(C.expected_counts(q)).chain
        for i, j in itertools.product(range(3), range(2)):
            p1 = (one, two)[j]
            q1 = getattr(p1, verb)(tau[i].item())
            x1 = C.Sequences(x.ids[j], x.length[j])
            np.testing.assert_allclose(cross[i, j], C.exact_cross(p1, q1), rtol=1e-12)
            np.testing.assert_allclose(score[i, j], q1.log_prob(x1), rtol=1e-10)
            np.testing.assert_allclose(expected[i, j], p1.expected_log_prob([q1], x1)[0], rtol=1e-10)
            np.testing.assert_allclose(fitted.transition[i, j], C.fit_chain(C.expected_counts(q1)).chain.transition, rtol=1e-10)


def test_a_seed_gives_the_same_draws():
    p = CHAINS["stop"](1)
    assert torch.equal(p.sample(100, make_rng(0)).ids, p.sample(100, make_rng(0)).ids)
    assert not torch.equal(p.sample(100, make_rng(0)).ids, p.sample(100, make_rng(1)).ids)


def test_counts_of_a_sample():
    p = CHAINS["stop"](1)
    x = p.sample(500, make_rng(12))
    first, then = np.zeros(V), np.zeros((V, V))
    for ids, length in zip(x.ids.tolist(), x.length.tolist(), strict=True):
        first[ids[0]] += 1
        for i, j in itertools.pairwise(ids[:length]):
            then[i, j] += 1
    counts = C.count(x, p)
    np.testing.assert_array_equal(counts.initial, first)
    np.testing.assert_array_equal(counts.transition, then)
    fit = C.fit_chain(counts)
    np.testing.assert_allclose(fit.log_likelihood, fit.chain.log_prob(x).sum(), rtol=1e-12)
    np.testing.assert_allclose(fit.chain.transition[:-1], then[:-1] / then[:-1].sum(1, keepdims=True), rtol=1e-12)
    assert fit.n_iter == 0
    assert fit.converged


def test_full_size_maximum_likelihood_recovers_the_chain():
    for name in ("endless", "stop"):
        p = CHAINS[name](13)
        np.testing.assert_allclose(C.fit_chain(C.expected_counts(p)).chain.transition, p.transition, rtol=1e-10)


def test_the_fit_of_a_by_position_chain_is_its_best_stationary_student():
    p = CHAINS["by position"](14)
    best = C.fit_chain(C.expected_counts(p)).chain

    def loss(logits):
        q = C.MarkovChain(p.initial, torch.tensor(logits.reshape(V, V)).softmax(-1), T)
        return -C.exact_cross(p, q, "sequence").item()

    found = minimize(loss, np.zeros(V * V), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(-C.exact_cross(p, best, "sequence").item(), found.fun, atol=1e-9)
    np.testing.assert_allclose(best.transition.numpy(), softmax(found.x.reshape(V, V), axis=-1), atol=1e-5)


def test_low_rank_em_reaches_the_optimum_of_gradient_ascent():
    "Stochastic factors as softmaxes, L-BFGS from 24 starts: another algorithm, the same maximum."
    p = C.random_chain(6, 8, make_rng(15))
    n = C.expected_counts(p).transition
    best = math.inf
    for seed in range(24):
        theta = (2.0 * torch.randn(2, 6, 2, generator=make_rng(seed), dtype=torch.float64)).requires_grad_()
        optimiser = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe")

        def closure(theta=theta, optimiser=optimiser):
            optimiser.zero_grad()
            loss = -(n * (theta[0].softmax(-1) @ theta[1].mT.softmax(-1)).log()).sum()
            loss.backward()
            return loss

        best = min(best, optimiser.step(closure).item(), closure().item())
    fit = C.fit_chain(C.expected_counts(p), 2, rng=make_rng(16))
    assert fit.converged
    assert torch.linalg.matrix_rank(fit.chain.transition, atol=1e-8) == 2
    np.testing.assert_allclose(-(n * fit.chain.transition.log()).sum(), best, atol=1e-6)


def test_rank_with_a_stop_symbol_and_with_a_batch():
    tau = torch.tensor([0.5, 1.0], dtype=torch.float64)
    p = C.random_chain(7, 6, make_rng(17), stop_prob=0.2)
    fit = C.fit_chain(C.expected_counts(p.sharpen(tau)), 2, rng=make_rng(18))
    assert fit.converged.shape == (2,)
    assert (fit.chain.transition[:, 6, 6] == 1).all()
    alone = C.fit_chain(C.expected_counts(p.sharpen(0.5)), 2, rng=make_rng(19))
    np.testing.assert_allclose(fit.log_likelihood[0], alone.log_likelihood, atol=1e-6)


def test_em_never_lowers_the_likelihood():
    counts = C.expected_counts(C.random_chain(8, 8, make_rng(20)))
    values = [C.fit_chain(counts, 3, n_init=1, rng=make_rng(21), max_iter=m).log_likelihood.item() for m in (1, 2, 5, 20, 100)]
    assert values == sorted(values)


def test_rank_one_is_the_pooled_frequency():
    counts = C.expected_counts(C.random_chain(5, 6, make_rng(22), stop_prob=0.1))
    pooled = counts.transition.sum(0) / counts.transition.sum()
    fit = C.fit_chain(counts, 1)
    np.testing.assert_allclose(fit.chain.transition[:-1], pooled.expand(4, -1), rtol=1e-12)


def test_rows_never_visited_are_uniform_and_pseudo_counts_tend_to_it():
    counts = C.Counts(torch.tensor([1.0, 0, 0]).double(), torch.tensor([[0.0, 2, 0], [2, 0, 0], [0, 0, 0]]).double(), 5, None)
    bare, nearly = (C.fit_chain(counts, pseudo_count=a).chain.transition for a in (0.0, 1e-9))
    np.testing.assert_allclose(bare[2], 1 / 3)
    np.testing.assert_allclose(bare, nearly, atol=1e-8)


def test_entropy_rate_of_a_two_symbol_chain_and_of_a_cycle():
    a, b = 0.2, 0.05
    p = C.MarkovChain([0.5, 0.5], [[1 - a, a], [b, 1 - b]], 5)
    h = [-(u * math.log(u) + (1 - u) * math.log(1 - u)) for u in (a, b)]
    np.testing.assert_allclose(C.stationary(p), [b / (a + b), a / (a + b)], rtol=1e-12)
    np.testing.assert_allclose(C.entropy_rate(p), (b * h[0] + a * h[1]) / (a + b), rtol=1e-12)
    cycle = C.MarkovChain([1.0, 0.0, 0.0], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], 4)
    np.testing.assert_allclose(C.stationary(cycle), 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(C.entropy_rate(cycle), 0, atol=1e-14)


def test_tempering_curves_of_the_truth_itself():
    p = CHAINS["stop"](23)
    tau = torch.tensor([0.4, 0.7, 1.0], dtype=torch.float64)
    frame = C.tempering_curves(p, p, tau, lambda q: q, per="sequence")
    assert list(frame.columns) == ["tempering", "tau", "entropy", "precision", "recall", "student_entropy", "kl_student_truth", "kl_truth_student"]
    row = frame[(frame.tempering == "per sequence") & (frame.tau == 0.4)].iloc[0]
    every, power = listed(p), {s: a ** (1 / 0.4) for s, a in listed(p).items()}
    z = sum(power.values())
    np.testing.assert_allclose(row.precision, sum(power[s] / z * math.log(every[s]) for s in every if every[s] > 0), rtol=1e-10)
    np.testing.assert_allclose(row.recall, sum(every[s] * math.log(power[s] / z) for s in every if every[s] > 0), rtol=1e-10)
    np.testing.assert_allclose(frame.kl_student_truth, -frame.student_entropy - frame.precision, atol=1e-12)


def test_a_large_chain_is_finite_at_extreme_temperatures():
    p = C.random_chain(64, 32, make_rng(24), spread=4.0)
    for q in (p.sharpen(0.01), p.temper(0.01), p.sharpen(100.0), p.temper(100.0)):
        assert math.isfinite(C.exact_precision(q, p))
        np.testing.assert_allclose(q.transition.sum(-1), 1, atol=1e-12)
    assert C.exact_kl(p, p).abs() < 1e-12


def test_impossible_events_are_minus_infinity_not_nan():
    p = C.MarkovChain([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], 3)
    q = C.MarkovChain([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 3)
    assert C.exact_cross(p, q) == -math.inf
    assert C.exact_cross(q, p) == pytest.approx(-math.log(2))
    assert q.log_prob(C.Sequences(torch.tensor([[0, 1, 1]]), torch.tensor([3]))) == -math.inf


OK = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: C.MarkovChain([0.6, 0.5], OK, 4), "initial must hold probabilities that sum to 1, got [0.6, 0.5] at []; divide each row by its sum"),
    (lambda: C.MarkovChain([0.5, 0.5], [[0.5, 0.5], [1.5, -0.5]], 4), "transition must hold probabilities that sum to 1, got [1.5, -0.5] at [1]"),
    (lambda: C.MarkovChain([0.5, math.nan], OK, 4), "initial must hold probabilities that sum to 1, got [0.5, nan]"),
    (lambda: C.MarkovChain([0.5, 0.5], OK, 1), "length must be >= 2, got 1"),
    (lambda: C.MarkovChain([0.2, 0.3, 0.5], OK, 4), "transition must have shape (3, 3) or (3, 3, 3), got (2, 2)"),
    (lambda: C.MarkovChain([0.5, 0.5], OK, 4, 2), "stop must be a symbol in [0, 2), got 2"),
    (lambda: C.MarkovChain([0.5, 0.5], OK, 4, 1), "transition must never leave the stop symbol; set row 1 to 1 at 1 and 0 elsewhere"),
    (lambda: by_position(0).sharpen(0.0), "tau must be > 0, got 0.0"),
    (lambda: by_position(0).temper(math.nan), "tau must be > 0, got nan"),
    (lambda: by_position(0).log_prob(C.Sequences(torch.tensor([[0, 3, 1, 1]]), torch.tensor([4]))), "ids must be symbols in [0, 3), got 0 to 3"),
    (lambda: by_position(0).log_prob(C.Sequences(torch.tensor([[0, 1, 1]]), torch.tensor([3]))),
     "ids must have 4 positions, got 3; this chain has one transition per position"),
    (lambda: C.exact_kl(CHAINS["endless"](0), CHAINS["stop"](0)),
     "q must have the symbols, length and stop of p, {'v': 3, 'length': 4, 'stop': None}, got {'v': 3, 'length': 4, 'stop': 2}"),
    (lambda: C.exact_entropy(by_position(0), per="word"), 'per must be "token" or "sequence", got \'word\''),
    (lambda: C.entropy_rate(CHAINS["stop"](0)), "p must have no stop symbol, got stop=2; in the long run it would be nothing else"),
    (lambda: C.entropy_rate(by_position(0)), "p must have the same transition at every position, got 3 of them"),
    (lambda: C.stationary(C.MarkovChain([0.5, 0.5], [[1.0, 0.0], [0.0, 1.0]], 4)), "transition must have one stationary distribution; this chain splits"),
    (lambda: C.fit_chain(C.expected_counts(by_position(0)), 4), "rank must be between 1 and the number of symbols 3, got 4"),
    (lambda: C.fit_chain(C.expected_counts(by_position(0)), 2), "rng must be given for rank 2, got None; EM starts at random points"),
    (lambda: C.fit_chain(C.expected_counts(by_position(0)), pseudo_count=-1.0), "pseudo_count must be >= 0, got -1.0"),
    (lambda: C.random_chain(3, 4, make_rng(0), stop_prob=1.0), "stop_prob must be between 0 and 1, got 1.0"),
])
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
