"""Choosing a temperature: the enumerable world as oracle, and the notebook on two students trained here."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdnb.core import make_rng
from kdnb.lm import keep_vocab, llama_config, load_lm, new_lm, save_lm, toy_lm
from kdnb.params import cells, load_run
from kdnb.sampling import enumerate_lm, sample_lm
from kdnb.store import read_json, read_metrics
from kdnb.sweep import Sweep, check_same_tokens, recommend, sweep
from kdnb.training import TrainConfig, train_lm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small():
    """SmolLM2 on 64 tokens."""
    return keep_vocab(load_lm("smollm2-135m-instruct", max_length=4), [0, 2, 504, *range(600, 661)])


@pytest.fixture(scope="module")
def students(small, tmp_path_factory) -> list[Path]:
    """Two small models trained on the same draws of the truth, saved as folders."""
    data, folders = sample_lm(small, 200, rng=make_rng(0)), []
    for seed in (0, 1):
        start = new_lm(llama_config(small.vocab_size, 64, 1), seed, like=small)
        folder = tmp_path_factory.mktemp(f"student-{seed}")
        save_lm(train_lm(start, data, TrainConfig(epochs=2), rng=make_rng(seed)).lm, folder)
        folders.append(folder)
    return folders


def test_the_sweep_is_the_exact_curve():
    """Within four standard errors of sums over all 31 sequences (6e-5 each, seeds fixed)."""
    reference = toy_lm()
    model = new_lm(llama_config(3, 64, 1), seed=4, like=reference)
    every, truth = enumerate_lm(reference)
    for row in sweep(model, reference, [0.5, 1.0, 1.6], n=2000, seed=0).frame().itertuples():
        _, ours = enumerate_lm(model.sharpen(row.tau))
        mean_length = (ours * every.length).sum()
        for got, exact in (
            (row.precision, (ours * truth.log()).sum() / mean_length),
            (row.entropy, -(ours * ours.log()).sum() / mean_length),
            (row.recall, (truth * ours.log()).sum() / (truth * every.length).sum()),
        ):
            assert abs(got.mean - exact) < 4 * got.se


def parabola(peak: float, n: int = 400, noise: float = 0.0) -> Sweep:
    """Totals whose recall is greatest at tau = peak, one token a sequence."""
    taus = tuple(np.geomspace(0.3, 3, 9))
    rng = np.random.default_rng(0)
    shape = torch.tensor(-((np.log(taus) - np.log(peak)) ** 2))[:, None].expand(-1, n)
    ones = torch.ones(len(taus), n, dtype=torch.float64)
    tilt = torch.tensor(rng.normal(size=n) * noise)[None] * torch.tensor(np.log(taus))[:, None]
    return Sweep(taus, ones * 0 - 1, ones, ones, shape + tilt, ones[0])


def test_the_maximum_is_found_between_the_points():
    for peak in (0.5, 0.9, 1.7):
        np.testing.assert_allclose(recommend(parabola(peak), 0.0).tau, peak, rtol=0.003)  # the fine grid has steps of 0.23 %


def test_the_interval_is_that_of_the_mean_tilt():
    """The maximiser of −(log τ − log 0.9)² + t·log τ is log 0.9 + t/2; its error is half that of the mean tilt."""
    r = recommend(parabola(0.9, n=400, noise=0.4), 0.0)
    width = np.log(r.hi) - np.log(r.lo)
    tilt = np.random.default_rng(0).normal(size=400) * 0.4
    np.testing.assert_allclose(width, 2 * 1.96 * tilt.std() / 20 / 2, rtol=0.1)  # 2,000 resamples: 4 % error of a quantile
    np.testing.assert_allclose(np.log(r.tau), np.log(0.9) + tilt.mean() / 2, atol=0.003)


@pytest.mark.parametrize(("peak", "edge"), [(0.1, 0.3), (9.0, 3.0)])
def test_an_end_of_the_sweep_is_said_to_be_one(peak, edge):
    r = recommend(parabola(peak), 0.0)
    assert r.at_edge
    np.testing.assert_allclose(r.tau, edge)


def test_dearer_precision_means_a_colder_model():
    reference = toy_lm()
    curve = sweep(reference, reference, np.geomspace(0.3, 2, 8).tolist(), n=500, seed=0)
    taus = [recommend(curve, w).tau for w in (0.0, 0.2, 0.4)]
    assert taus == sorted(taus, reverse=True)
    assert taus[2] < 0.9 < taus[0]


def test_models_must_share_a_tokenizer(small):
    other = keep_vocab(load_lm("smollm2-135m-instruct", max_length=4), [0, 2, 504, 601, 600, *range(602, 661)])
    with pytest.raises(ValueError, match=r"model and reference must share a tokenizer, got '.*' and '.*' for token 3"):
        check_same_tokens(small, other)
    with pytest.raises(ValueError, match="got 3 and 64 tokens; the first 3 agree"):
        check_same_tokens(keep_vocab(load_lm("smollm2-135m-instruct", max_length=4), [0, 2, 504]), small)
    with pytest.raises(ValueError, match="must have the same stop_ids"):
        check_same_tokens(replace(small, stop_ids=(0,)), small)
    with pytest.raises(ValueError, match="tokenizer must be present to compare vocabularies, got None"):
        check_same_tokens(toy_lm(), small)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: sweep(toy_lm(), toy_lm(), [1.0, 1.0, 0.5], 10, 0), "taus must hold at least 3 temperatures, got 2"),
    (lambda: sweep(toy_lm(), toy_lm(), [1.0, 0.0, 0.5], 10, 0), "tau must be > 0, got 0.0"),
    (lambda: recommend(parabola(1.0), -0.1), "weight must be in \\[0, 1\\], got -0.1"),
    (lambda: recommend(parabola(1.0), float("nan")), "weight must be in \\[0, 1\\], got nan"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_notebook_recommends_a_temperature_for_two_students(students, tmp_path):
    """The whole notebook through Papermill on two folders."""
    notebook = ROOT / "nbs" / "experiments" / "own_models.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, "out.ipynb", "-p", "reference", students[0], "-p", "model", students[1], "-p", "max_length", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = read_metrics(tmp_path)
    assert {float(t) for t in metrics["estimates"]} == {0.6, 0.8, 1.0, 1.25}
    advice = read_json(tmp_path / "metrics.json")["recommendation"]
    assert advice["lo"] <= advice["tau"] <= advice["hi"]


def test_its_run_file_is_valid():
    assert len(cells(load_run(ROOT / "params" / "own-models.yaml"))) == 2
