"""Several processes train as one does: on a CPU, with gloo, over the loopback interface."""

import copy
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from kdnb import training as training_module
from kdnb.core import make_rng
from kdnb.lm import LM, Tokens, llama_config, new_lm, toy_lm
from kdnb.params import SmolLM2Params
from kdnb.pipeline import Pipeline
from kdnb.sampling import sample_lm
from kdnb.training import Checkpoint, TrainConfig, Trained, backward, nats_per_token, train_distributed, train_lm

CONFIG = TrainConfig(epochs=2, batch_size=15, micro_batch=4)  # the last batch of an epoch has one sequence: nothing for the second process


def world() -> tuple[LM, Tokens, Tokens]:
    "A student in double precision, what it learns, and held-out sequences, an odd number; lengths differ."
    toy = toy_lm()
    lm = new_lm(llama_config(3, 64, 2), seed=1, like=toy)
    lm.model.double()  # AdamW divides by the size of the gradient: where that is nearly zero, the rounding of single precision decides where a weight goes
    return lm, sample_lm(toy, 91, rng=make_rng(8)), sample_lm(toy, 51, rng=make_rng(9))


class Early(Checkpoint):
    "What a training that was interrupted after six steps leaves."

    def write(self, facts, tensors):
        assert not dist.is_initialized() or dist.get_rank() == 0  # one writer
        if len(facts["history"]) <= 6:
            super().write(facts, tensors)


def flat(tensors) -> list[float]:
    return torch.cat([t.detach().flatten() for t in tensors]).tolist()


def gradient(n: int, micro_batch: int | None) -> tuple[list[float], float]:
    "Of the first `n` sequences, and their loss."
    lm, tokens, _ = world()
    lm = replace(lm, model=copy.deepcopy(lm.model))
    loss = backward(lm, tokens.select(slice(0, n)), micro_batch, training_module._shared(lm, False))
    return flat(w.grad for w in lm.model.parameters()), loss


def training(folder=None, shard=False, kind=Checkpoint) -> tuple[list[float], list[dict], list[float]]:
    "Weights, history, held-out scores."
    lm, tokens, heldout = world()
    checkpoint = None if folder is None else kind(folder, every=3)
    done = train_lm(lm, tokens, replace(CONFIG, shard=shard), rng=make_rng(0), heldout=heldout, checkpoint=checkpoint)
    return flat(done.lm.model.parameters()), done.history, done.heldout


def broken_training() -> None:
    lm, tokens, _ = world()
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("inf"))
    train_lm(lm, tokens, rng=make_rng(0))


def training_with_own_seeds() -> None:
    lm, tokens, _ = world()
    train_lm(lm, tokens, rng=make_rng(dist.get_rank()))


def member(rank: int, size: int, folder: str, work, args: tuple, answers) -> None:
    "One process of a group: what `work` gives, or its error."
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        answers.put((rank, work(*args)))
    except (ValueError, FloatingPointError) as e:
        answers.put((rank, f"{type(e).__name__}: {e}"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    "Run a function in each of two processes that have imported everything beforehand."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "kdnb.pipeline", "transformers.models.llama.modeling_llama", "transformers.optimization", "torch.distributed.fsdp"])

    def run(work, *args):
        folder, answers = str(tmp_path_factory.mktemp("group")), context.Queue()
        processes = [context.Process(target=member, args=(r, 2, folder, work, args, answers)) for r in range(2)]
        for p in processes:
            p.start()
        try:
            found = dict(answers.get(timeout=60) for _ in processes)
        finally:
            for p in processes:
                p.join(10)
                p.kill()
        return [found[r] for r in range(2)]

    return run


def same(found, wanted) -> None:
    "Two trainings that differ by the order of sums alone."
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    assert [h["step"] for h in found[1]] == [h["step"] for h in wanted[1]]
    for name in ("epoch", "lr", "tokens"):
        assert [h[name] for h in found[1]] == [h[name] for h in wanted[1]], name
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([h[name] for h in found[1]], [h[name] for h in wanted[1]], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-5)


@pytest.mark.parametrize(("n", "micro_batch"), [(15, None), (15, 2), (14, 7), (1, None)])
def test_the_gradient_is_that_of_one_process(together, n, micro_batch):
    wanted, loss = gradient(n, micro_batch)
    for found, seen in together(gradient, n, micro_batch):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert seen == pytest.approx(loss, rel=1e-6)


def test_the_mean_of_two_means_would_be_another_gradient():
    """The case above can tell the two apart."""
    lm, tokens, _ = world()
    halves = []
    for rank in range(2):
        one = replace(lm, model=copy.deepcopy(lm.model))
        nats_per_token(one, tokens.select(torch.arange(15)[rank::2])).backward()
        halves.append(torch.tensor(flat(w.grad for w in one.model.parameters())))
    assert (sum(halves) / 2 - torch.tensor(gradient(15, None)[0])).abs().max() > 1e-3


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_the_training_is_that_of_one_process(together, shard):
    wanted = training()
    assert len(wanted[1]) == 14
    for found in together(training, None, shard):
        same(found, wanted)


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_a_training_goes_on_with_another_number_of_processes(together, tmp_path, shard):
    wanted = training(tmp_path / "one", kind=Early)
    together(training, tmp_path / "two", shard, Early)
    assert {p.name for p in tmp_path.glob("*/step-*")} == {"step-6.safetensors"}
    for found in together(training, tmp_path / "one", shard):
        same(found, wanted)
    same(training(tmp_path / "two"), wanted)


def test_every_process_stops_at_a_loss_that_is_no_number(together):
    for said in together(broken_training):
        assert re.match("FloatingPointError: loss must be finite, got nan at step 0 with learning rate", said)


def test_processes_with_different_seeds_are_refused(together):
    first, second = together(training_with_own_seeds)
    assert re.fullmatch(r"ValueError: order must be the same in every process, got \d+ and \d+", first)
    assert second == first


def test_a_process_that_has_not_met_the_others_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE 2 must be the size of a process group, got none; call torch\.distributed\.init_process_group first"):
        training()


def test_what_cannot_be_is_refused(monkeypatch):
    lm, tokens, _ = world()
    with pytest.raises(ValueError, match="processes must be >= 1, got 0"):
        train_distributed(lm, tokens, rng=make_rng(0), processes=0)
    with pytest.raises(ValueError, match="compile must be False where weights are sharded, got True"):
        TrainConfig(shard=True, compile=True)
    monkeypatch.setattr(LM, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="processes must be <= 4, the GPUs of this machine, got 5"):
        train_distributed(lm, tokens, rng=make_rng(0), processes=5)


def test_one_process_is_train_lm():
    lm, tokens, heldout = world()
    runs = [train(lm, tokens, CONFIG, rng=make_rng(0), heldout=heldout) for train in (train_lm, lambda *a, **k: train_distributed(*a, processes=1, **k))]
    assert flat(runs[0].lm.model.parameters()) == flat(runs[1].lm.model.parameters())
    assert runs[0].heldout == runs[1].heldout


def test_a_notebook_starts_two_processes_and_gets_the_training_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("KDNB_PROGRESS", str(tmp_path / "progress.json"))
    lm, tokens, heldout = world()
    rngs = make_rng(0), make_rng(0)
    wanted = train_lm(lm, tokens, CONFIG, rng=rngs[0], heldout=heldout)
    found = train_distributed(lm, tokens, CONFIG, rng=rngs[1], heldout=heldout, processes=2, checkpoint=Checkpoint(tmp_path / "halfway", every=5), desc="teacher 0")
    same(*[(flat(t.lm.model.parameters()), t.history, t.heldout) for t in (found, wanted)])
    assert torch.equal(rngs[0].get_state(), rngs[1].get_state())
    assert isinstance(found, Trained)
    assert [p.name for p in (tmp_path / "halfway").glob("step-*")] == ["step-10.safetensors"]
    assert '"desc": "teacher 0"' in (tmp_path / "progress.json").read_text()
    assert not members()


def members(parent: int | None = None) -> dict[int, psutil.Process]:
    "Processes of a training that a process started, by rank."
    found = {}
    for p in psutil.Process(parent).children():
        try:
            if "kdnb.training" in p.cmdline():
                found[int(p.environ()["RANK"])] = p
        except (psutil.NoSuchProcess, KeyError):
            continue
    return found


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def test_a_killed_process_ends_the_other_with_one_error(tmp_path, capfd):
    lm, tokens, _ = world()

    def kill():
        wait_for((tmp_path / "state.json").exists)
        members()[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"^every process of the training must finish, got rank 1 ended by SIGKILL$"):
        train_distributed(lm, tokens, replace(CONFIG, epochs=10_000), rng=make_rng(0), processes=2, checkpoint=Checkpoint(tmp_path, every=5))
    killer.join()
    assert not members()
    assert capfd.readouterr().err == ""


SCRIPT = """
import sys
from test_distributed import CONFIG, Checkpoint, make_rng, replace, train_distributed, world
lm, tokens, _ = world()
train_distributed(lm, tokens, replace(CONFIG, epochs=10_000), rng=make_rng(0), processes=2, checkpoint=Checkpoint(sys.argv[1], every=5))
"""


def test_nothing_outlives_the_process_that_started_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path], env=environment) as started:
        wait_for((tmp_path / "state.json").exists)
        running = list(members(started.pid).values())
        assert len(running) == 2
        started.kill()
    assert not psutil.wait_procs(running, timeout=10)[1]


def test_an_interruption_asks_the_others_to_end(tmp_path, monkeypatch):
    waits = tmp_path / "waits"  # in place of a process that trains
    waits.write_text('#!/bin/sh\nwhile [ ! -e "$3/stop" ]; do sleep 0.1; done\nexit 1\n')
    waits.chmod(0o755)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_module, "_relay", interrupted)
    monkeypatch.setattr(sys, "executable", str(waits))
    with pytest.raises(KeyboardInterrupt):
        train_distributed(*world()[:2], CONFIG, rng=make_rng(0), processes=2)
    assert not members()


def test_the_number_of_processes_is_a_part_of_a_key_unless_it_is_one():
    keys = {}
    for processes in (1, 2):
        recipes = Pipeline(SmolLM2Params(tau=0.6, processes=processes)).recipes()
        keys[processes] = {r.stage: r.key for r in recipes}
        assert [r.params.get("processes") for r in recipes if r.stage in ("teacher", "student")] == [None if processes == 1 else 2] * 4
    assert {stage for stage in keys[1] if keys[1][stage] == keys[2][stage]} == {"pilot", "vocabulary", "truth"}
