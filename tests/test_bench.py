"""Guards of kdnb.bench, and the benchmark notebook in miniature. Nothing here asserts a time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from joblib import wrap_non_picklable_objects
from scipy import stats

from kdnb import bench
from kdnb.bench import Contest, alternate, in_processes, score_plain
from kdnb.core import make_rng
from kdnb.em import fit_em
from kdnb.lm import Tokens, llama_config, new_lm, toy_lm
from kdnb.scoring import LOGITS, score_lm

ROOT = Path(__file__).parent.parent


def test_the_ratio_is_a_geometric_mean_with_students_interval():
    ours, peer = np.array([2.0, 4.0, 9.0]), np.array([1.0, 1.0, 3.0])
    logs = np.log([2.0, 4.0, 3.0])
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / np.sqrt(3)
    found = Contest(ours, peer).ratio()
    np.testing.assert_allclose((found.mean, found.lo, found.hi), np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]), rtol=1e-12)


def test_both_take_turns_in_processes_of_their_own_and_the_first_pair_does_not_count(tmp_path):
    told = tmp_path / "calls"

    def say(side):
        def work():
            with told.open("a") as file:
                print(side, os.getpid(), torch.get_num_threads(), file=file)
            return 1.0

        return work

    contest = alternate(say("ours"), say("peer"), 3, threads=2)
    calls = [line.split() for line in told.read_text().splitlines()]
    assert [side for side, _, _ in calls] == ["peer", "ours", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert {threads for _, _, threads in calls} == {"2"}
    assert len({(side, process) for side, process, _ in calls} | {("here", str(os.getpid()))}) == len({process for _, process, _ in calls} | {str(os.getpid())}) == 3
    assert contest.ours.shape == contest.peer.shape == (3,)


def test_a_side_ends_the_processes_that_it_has_called():
    with bench._process() as side:
        called = side.submit(wrap_non_picklable_objects(lambda: [done.value for done in in_processes([os.getpid] * 2)])).result()
        assert all(psutil.pid_exists(pid) for pid in called)
        side.submit(wrap_non_picklable_objects(bench._leave)).result()
        assert not any(psutil.pid_exists(pid) for pid in called)


def test_one_repetition_is_refused():
    with pytest.raises(ValueError, match="repetitions must be >= 2, got 1; one has no interval"):
        alternate(lambda: 1.0, lambda: 1.0, 1)


def test_each_works_in_a_process_of_its_own_with_one_thread():
    first, second = in_processes([lambda: (os.getpid(), os.environ["OMP_NUM_THREADS"])] * 2)
    [alone] = in_processes([os.getpid])
    assert os.getpid() not in (first.value[0], second.value[0], alone.value)
    assert first.value[1] == second.value[1] == "1"


def known(*peaks):
    "Whether the system tells peaks, as Linux does in /proc; elsewhere they are nan."
    assert np.isnan(peaks).tolist() == [sys.platform != "linux"] * len(peaks)
    return sys.platform == "linux"


def test_the_peak_is_what_was_held_at_a_time():
    small, large = in_processes([lambda n=n: float(np.ones(n // 8).sum()) for n in (8 * 10**6, 10**8)])
    if known(small.peak_bytes, large.peak_bytes):
        counted = 2**20  # the kernel counts resident pages in batches of 64 a thread
        assert 1e8 - counted <= large.peak_bytes < 1.2e8
        assert small.peak_bytes < 3e7


def test_what_was_handed_over_is_not_counted():
    handed = np.ones(10**8 // 8)
    [done] = in_processes([lambda: handed.sum()])
    assert done.value == len(handed)
    if known(done.peak_bytes):
        assert done.peak_bytes < 3e7


def test_memory_of_em_does_not_grow_with_the_number_of_problems():
    """Beyond the points, of which 12,800 problems have 205 MB; a block's worth was 20 to 51 MB."""

    def peak(b):
        x = torch.randn(b, 1000, 2, dtype=torch.float64, generator=make_rng(0))
        return bench._measured(lambda: fit_em(x, 4, means_init=x[:, :4], max_iter=2)).peak_bytes

    few, many = [done.value for done in in_processes([lambda b=b: peak(b) for b in (400, 12_800)])]
    if known(few, many):
        assert many < few + 5e7


def test_scoring_takes_a_quarter_of_the_plain_memory_whatever_the_heap_was():
    lm = replace(new_lm(llama_config(49_152, 576, 2, positions=129), 0, like=toy_lm(vocab_size=49_152)), max_length=128)

    def peaks():
        "Peaks of both, one after the other in one process, where the plain side leaves its holes."
        ours, plain = [], []
        for seed in range(3):
            rng = torch.Generator().manual_seed(seed)
            length, ids = torch.randint(8, 129, (16,), generator=rng), torch.randint(49_152, (16, 128), generator=rng)
            tokens = Tokens(torch.where(torch.arange(128) < length[:, None], ids, -1), length)
            for score, found in ((score_lm, ours), (score_plain, plain), (score_lm, ours)):
                found.append(bench._measured(partial(score, lm, tokens)).peak_bytes)
        return ours, plain

    [(ours, plain)] = [done.value for done in in_processes([peaks])]
    if known(*ours, *plain):
        assert max(ours) <= min(plain) / 4
        assert max(ours) < 6 * 4 * LOGITS  # a batch's activations, and what the first scoring of a process leaves


def executed(name, folder):
    "metrics.json of an experiment's notebook at its own small sizes."
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(ROOT / "nbs" / "experiments" / f"{name}.ipynb"), str(folder / "out.ipynb")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "metrics.json").read_text())["estimates"]


def test_the_benchmark_runs_in_miniature(tmp_path):
    """Both sides agree to the stated tolerances (asserted in the notebook), and every line of the result is there."""
    found = executed("bench", tmp_path)
    contests = {k: e for k, e in found.items() if isinstance(e, dict) and "ours_per_s" in e}
    assert {k.split(",")[0] for k in contests} >= {"EM", "scoring", "sampling", "training"}
    for name, e in contests.items():
        assert e["ratio"]["lo"] <= e["ratio"]["mean"] <= e["ratio"]["hi"], name
        assert all(r > 0 for r in (*e["ours_per_s"], *e["peer_per_s"])), name
        assert e["ratio"]["mean"] < 1e3, f"{name}: the two sides do not count the same work"
    assert found["EM, a large grid"]["fits per second"] > 0
    larger = found["training, gpu tier"]
    assert larger["teacher"]["parameters"] > larger["student"]["parameters"] > 1e7
    assert all(0 < e["utilisation"] < 1 for e in larger.values())


def test_plain_library_calls_find_the_same_numbers(tmp_path):
    """In miniature: of ten differences, five a student, three or more told from zero would be a false alarm once in 87 runs if they were independent; seeds are fixed."""
    found = executed("plain", tmp_path)
    assert found["compared"] == 10
    assert found["told"] <= 2
    assert set(found["seconds"]["plain_stages"]) == set(found["seconds"]["kdnb_core_stages"]) - {"vocabulary"} == {"pilot", "truth", "teacher", "teacher-draws", "student", "student-draws", "scores"}
    assert all(seconds > 0 for stages in ("plain_stages", "kdnb_core_stages") for seconds in found["seconds"][stages].values())
    for student in ("direct", "0.7"):  # neither is better than the truth, and colder is less spread out
        assert found["plain calls"][student]["kl_student_truth"]["mean"] > 0
    assert found["plain calls"]["0.7"]["student_entropy"]["mean"] < found["plain calls"]["direct"]["student_entropy"]["mean"]
