"""The ruler against closed forms, SciPy and the bootstrap."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kdnb.core import (
    Distribution,
    Estimate,
    combine,
    difference,
    distill,
    entropy,
    estimate,
    estimate_controlled,
    kl,
    make_rng,
    measure,
    precision,
    recall,
    ruler,
    verdict,
)


class Normal:
    """N(mean, sd²) in one dimension, with its cross-entropies in closed form."""

    def __init__(self, mean, sd):
        self.mean, self.sd = mean, sd

    def sample(self, n, rng):
        return self.mean + self.sd * torch.randn(n, generator=rng, dtype=torch.float64)

    def log_prob(self, x):
        return -0.5 * ((x - self.mean) / self.sd) ** 2 - math.log(self.sd * math.sqrt(2 * math.pi))

    def sharpen(self, tau):
        return Normal(self.mean, self.sd * math.sqrt(tau))

    def expected(self, q):
        return -0.5 * (self.sd**2 + (self.mean - q.mean) ** 2) / q.sd**2 - math.log(q.sd * math.sqrt(2 * math.pi))


P, Q = Normal(0.0, 1.0), Normal(0.4, 0.7)


def test_an_interval_is_scipys():
    values = np.random.default_rng(0).normal(size=57)
    e = estimate(values)
    np.testing.assert_allclose((e.lo, e.hi), stats.t.interval(0.95, 56, values.mean(), stats.sem(values)), rtol=1e-12)
    np.testing.assert_allclose(e.se, stats.sem(values), rtol=1e-12)
    assert e.n == 57


def test_batched_estimates_are_the_single_ones():
    values = np.random.default_rng(1).normal(size=(3, 40))
    batch = estimate(values)
    for i, row in enumerate(values):
        one = estimate(row)
        np.testing.assert_allclose([batch.mean[i], batch.se[i], batch.lo[i], batch.hi[i]], one[:4], rtol=1e-12)


def test_controlled_estimates_of_a_batch_are_the_single_ones():
    rng = np.random.default_rng(0)
    c, m = rng.normal(size=(3, 2, 90)) - 4, rng.integers(1, 9, (3, 2, 90))
    y = torch.as_tensor(2 * c[..., :40] + rng.normal(size=(3, 2, 40)))
    many = estimate_controlled(y, torch.as_tensor(c), m)
    assert many.n == 40
    assert np.shape(many.mean) == (3, 2)
    for at in np.ndindex(3, 2):
        one = estimate_controlled(y[at], c[at], m[at])
        np.testing.assert_allclose([f[at] for f in many[:4]], one[:4], rtol=1e-12)


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_a_control_that_knows_everything_leaves_the_error_of_all_draws(far):
    """y = 3 − 2c: the mean is 3 − 2 of all draws' mean, and so is the error; offsets of a million cost nine digits of the residuals."""
    c = np.random.default_rng(0).normal(size=400) + far
    found, every = estimate_controlled(3 - 2 * c[:30], c), estimate(3 - 2 * c)
    np.testing.assert_allclose(found.mean, every.mean, rtol=1e-12)
    np.testing.assert_allclose(found.se, every.se * np.sqrt(30 / 28 * 399 / 400), rtol=1e-6)


def test_a_controlled_estimate_is_the_plain_one_with_nothing_more_to_know():
    rng = np.random.default_rng(0)
    y, c, m = rng.normal(size=50), rng.normal(size=50), rng.integers(1, 9, 50)
    found, plain = estimate_controlled(y, c, m), estimate(y, m)
    np.testing.assert_allclose([found.mean, found.se], [plain.mean, plain.se * np.sqrt(49 / 48)], rtol=1e-10)
    batch = estimate_controlled(np.stack([y, np.where(np.arange(50) == 7, -np.inf, y)]), np.stack([c, c]), m)  # one problem's infinity is no other's
    np.testing.assert_allclose(batch.mean, [plain.mean, -np.inf])
    np.testing.assert_allclose(batch.lo, [plain.mean - stats.t.ppf(0.975, 48) * found.se, -np.inf])


def test_a_ratio_clusters_its_error():
    """Against 4,000 bootstrap resamples of whole sequences (relative error about 1 %)."""
    rng = np.random.default_rng(2)
    m = rng.integers(1, 12, 300)
    y = -1.5 * m + rng.normal(size=300) * m  # tokens of a sequence go together
    draw = rng.integers(0, 300, (4000, 300))
    bootstrap = (y[draw].sum(1) / m[draw].sum(1)).std()
    e = estimate(y, m)
    np.testing.assert_allclose(e.se, bootstrap, rtol=0.05)
    assert e.mean == y.sum() / m.sum()


def test_intervals_cover():
    """95 % intervals of 20 draws cover in 94–96 % of 20,000 repetitions: five standard errors of the coverage."""
    values = np.random.default_rng(3).normal(size=(20_000, 20))
    e = estimate(values)
    covered = ((e.lo < 0) & (e.hi > 0)).mean()
    assert abs(covered - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 20_000)


@pytest.mark.parametrize(("values", "weights", "message"), [
    ([1.0], None, "values must hold at least 2 draws, got 1; one draw has no standard error"),
    (3.0, None, "values must hold at least 2 draws, got 1"),
    ([1.0, math.nan], None, r"values must be numbers, got nan at \[1\]"),
    ([1.0, 2.0], [1.0, 0.0], r"weights must be > 0, got 0.0 at \[1\]"),
    ([1.0, 2.0], [1.0, math.nan], r"weights must be > 0, got nan at \[1\]"),
])
def test_what_is_no_sample_is_refused(values, weights, message):
    with pytest.raises(ValueError, match=message):
        estimate(values, weights)


def test_an_impossible_draw_is_minus_infinity_not_nan():
    e = estimate([-1.0, -math.inf, -2.0])
    assert (e.mean, e.se, e.lo, e.hi) == (-math.inf, math.inf, -math.inf, math.inf)


@pytest.mark.parametrize(("measured", "exact"), [
    (precision(Q, P, 20_000, make_rng(0)), Q.expected(P)),
    (recall(Q, P, 20_000, make_rng(1)), P.expected(Q)),
    (entropy(Q, 20_000, make_rng(2)), -Q.expected(Q)),
    (kl(Q, P, 20_000, make_rng(3)), Q.expected(Q) - Q.expected(P)),
], ids=["precision", "recall", "entropy", "kl"])
def test_the_ruler_is_right(measured, exact):
    assert abs(measured.mean - exact) < 4 * measured.se  # false alarm 6e-5, seed fixed


def test_the_identities_hold_to_rounding():
    r = measure(Q, P, 1000, make_rng(4))
    np.testing.assert_allclose(r.kl_truth_student.mean, -r.truth_entropy.mean - r.recall.mean, rtol=1e-12)
    np.testing.assert_allclose(r.kl_student_truth.mean, -r.student_entropy.mean - r.precision.mean, rtol=1e-12)


def test_a_perfect_student_scores_minus_the_entropy():
    r = measure(P, P, 20_000, make_rng(5))
    exact = -0.5 * math.log(2 * math.pi * math.e)
    for e in (r.precision, r.recall):
        assert abs(e.mean - exact) < 4 * e.se
    assert (r.kl_student_truth.mean, r.kl_truth_student.mean) == (0.0, 0.0)


def test_totals_that_were_scored_before_give_the_same_ruler():
    x, y = Q.sample(500, make_rng(6)), P.sample(500, make_rng(7))
    r = ruler(Q.log_prob(x), P.log_prob(x), P.log_prob(y), Q.log_prob(y))
    np.testing.assert_allclose(r.precision.mean, P.log_prob(x).mean(), rtol=1e-12)
    np.testing.assert_allclose(r.recall.mean, Q.log_prob(y).mean(), rtol=1e-12)


def test_seeds_are_a_second_level():
    """Means of seeds, however noisy inside, give the spread between them."""
    per_seed = [estimate([m - 1.0, m + 1.0]) for m in (1.0, 2.0, 6.0)]
    e = combine(per_seed)
    np.testing.assert_allclose((e.mean, e.se, e.n), (3.0, np.std([1, 2, 6], ddof=1) / math.sqrt(3), 3))
    stacked = estimate(np.array([[m - 1.0, m + 1.0] for m in (1.0, 2.0, 6.0)]))
    assert combine(stacked) == e
    shifted = estimate(np.array([[m - 0.9, m + 1.1] for m in (1.0, 2.0, 6.0)]))
    d = difference(shifted, stacked)
    np.testing.assert_allclose((d.mean, d.se), (0.1, 0), atol=1e-12)
    with pytest.raises(ValueError, match="a and b must hold the same seeds, got shapes"):
        difference(per_seed, per_seed[:2])


@pytest.mark.parametrize(("lo", "hi", "said"), [(0.1, 0.2, "held"), (-0.2, -0.1, "did not hold"), (-0.1, 0.1, "cannot tell"), (0.0, 0.1, "cannot tell")])
def test_a_verdict_needs_the_whole_interval(lo, hi, said):
    assert verdict(Estimate((lo + hi) / 2, 0.1, lo, hi, 5)) == said


@pytest.mark.parametrize(("seed", "error", "message"), [
    (-1, ValueError, "seed must be >= 0, got -1"), (True, TypeError, "seed must be an integer, got True"),
])
def test_seeds_are_checked(seed, error, message):
    with pytest.raises(error, match=message):
        make_rng(seed)


def test_streams_have_names():
    draws = {names: tuple(torch.rand(2, generator=make_rng(0, *names)).tolist()) for names in ((), ("a",), ("b",), ("a", 1), ("a", 11))}
    assert len(set(draws.values())) == len(draws)


@pytest.mark.parametrize("per", ["word", None])
def test_per_is_token_or_sequence(per):
    with pytest.raises(ValueError, match='per must be "token" or "sequence", got'):
        measure(Q, P, 9, make_rng(0), per=per or "")


def test_the_loop_trades_recall_for_precision():
    """A teacher that equals the truth in the limit: the student is N(0, τ)."""

    def fit(x, model):
        return Normal(x.mean().item(), x.std(correction=0).item())

    made = distill(P, fit, teacher=None, student=None, select=0.25, n=100_000, n_student=200_000, rng=make_rng(8))
    assert isinstance(made.student, Distribution)
    np.testing.assert_allclose(made.selective.sd, made.teacher.sd / 2, rtol=1e-12)
    np.testing.assert_allclose(made.student.expected(P), Normal(0, 0.5).expected(P), atol=0.01)  # sampling noise of 1e5 draws
    np.testing.assert_allclose(P.expected(made.student), P.expected(Normal(0, 0.5)), atol=0.05)
