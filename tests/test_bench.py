"""Guards of kdnb.bench, and the benchmark notebook in miniature. Nothing here asserts a time."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kdnb.bench import Contest, alternate, in_processes

ROOT = Path(__file__).parent.parent


def test_the_ratio_is_a_geometric_mean_with_students_interval():
    ours, peer = np.array([2.0, 4.0, 9.0]), np.array([1.0, 1.0, 3.0])
    logs = np.log([2.0, 4.0, 3.0])
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / np.sqrt(3)
    found = Contest(ours, peer).ratio()
    np.testing.assert_allclose((found.mean, found.lo, found.hi), np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]), rtol=1e-12)


def test_both_take_turns_and_the_first_pair_does_not_count():
    calls = []
    contest = alternate(lambda: calls.append("ours") or 1.0, lambda: calls.append("peer") or 2.0, 3)
    assert calls == ["peer", "ours", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert contest.ours.shape == contest.peer.shape == (3,)


def test_one_repetition_is_refused():
    with pytest.raises(ValueError, match="repetitions must be >= 2, got 1; one has no interval"):
        alternate(lambda: 1.0, lambda: 1.0, 1)


def test_each_works_in_a_process_of_its_own_with_one_thread():
    first, second = in_processes([lambda: (os.getpid(), os.environ["OMP_NUM_THREADS"])] * 2)
    assert os.getpid() not in (first.value[0], second.value[0])
    assert first.value[1] == second.value[1] == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is known on Linux only")
def test_the_peak_is_what_was_held_at_a_time():
    small, large = in_processes([lambda n=n: float(np.ones(n // 8).sum()) for n in (8 * 10**6, 10**8)])
    assert 0.95e8 <= large.peak_bytes < 1.2e8  # the resident set is sampled in pages
    assert small.peak_bytes < 3e7
