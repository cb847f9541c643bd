"""What a machine does to a run: it kills, forgets, fills up, stands still and lies about the time. Numbers stay the same or there are none.

`make chaos` runs the long form: more and larger injections of the same faults, and a table of what came of them.
"""

import functools
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from test_grid import BUILD, COMMAND, MEASURE, WRITE, cell, descendants, is_alive, start, states, wait_for, write_notebook, write_run
from test_grid import folder as folder
from test_smoke import SMOKE, fresh_store
from test_smoke import weights as weights

from kdnb import grid, lm, pipeline, store, training
from kdnb.grid import main
from kdnb.lm import PACKAGED, llama_config, load_lm, new_lm, toy_lm
from kdnb.params import SmolLM2Params, load_run
from kdnb.pipeline import Pipeline
from kdnb.store import artifact, artifacts, file_hash, read_json, to_json, write_json, write_sealed

KILLS = int(os.environ.get("KILLS", 50))  # of the long form
WORDS = ["<|endoftext|>", "The", *(f"w{i}" for i in range(62))]
SMALL = {"vocab_size": 32, "max_length": 6, "n_pilot": 8, "n_train": 96, "n_select": 16, "n_eval": 24, "batch_size": 32, "teacher_layers": 1}


def tiny_model(place):
    "A model folder of 64 words, made without downloads."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = new_lm(llama_config(len(WORDS), 64, 1, positions=64), 0, like=toy_lm(vocab_size=len(WORDS)))
    made.model.save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=WORDS[0]).save_pretrained(place)
    return place


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A pipeline on a small model in the place of SmolLM2, every stage of it, and a store of its own."
    gguf = tmp_path / "tiny.gguf"
    gguf.touch()
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(store, "_sound", set())
    monkeypatch.setattr(lm, "packaged_gguf", lambda: gguf)
    monkeypatch.setattr(lm, "_dequantise", lambda gguf, place: tiny_model(place))
    return lambda **more: Pipeline(SmolLM2Params(**{**SMALL, "tau": 0.8, "source": PACKAGED, **more}))


def one_of_each(cell):
    "A recipe of every stage, in the order in which they need each other; two of the truth's, because one keeps distributions."
    found = {}
    for recipe in cell.recipes():
        found.setdefault((recipe.stage, recipe.params.get("split")), recipe)
    return list(found.values())


def contents(place):
    "What must be the same when an artifact is made again: everything but its manifest and the wall times of a training."
    made = {p.name: file_hash(p) for p in sorted(place.iterdir()) if p.name not in (store.MANIFEST, "history.json")}
    if (place / "history.json").exists():
        history = read_json(place / "history.json")
        made["history"] = [history["heldout"], [{k: v for k, v in step.items() if k != "wall_s"} for step in history["steps"]]]
    return made


def numbers(cell):
    return [total for scores in cell.scores() for _, total in sorted(scores.totals.items())]


def flip(path, rng):
    "One bit of a file, as those see it who open it from now on: a loaded model may be mapped to it."
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.unlink()
    path.write_bytes(data)


# --- a flipped bit ------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, pytest.param(20, marks=pytest.mark.chaos)], ids=["a file of each", "every file, 20 times"])
def test_a_flipped_bit_in_any_artifact(small, caplog, rounds, record_property):
    rng, cell = random.Random(0), small()
    before, injected = numbers(cell), 0
    cell.teachers(), cell.embeddings("truth", 0)
    weights = store.store_root() / "weights"
    places = [(None, next(p for p in weights.iterdir() if p.is_dir())), *((r, r.folder) for r in one_of_each(cell))]
    for recipe, place in places:
        whole = contents(place)
        names = sorted(p.name for p in place.iterdir())
        for name in names * rounds or [rng.choice(names)]:
            flip(place / name, rng)
            store._sound.clear()
            caplog.clear()
            if recipe is None:
                load_lm(PACKAGED)
            else:
                assert artifacts([recipe])[0].built
            assert len(caplog.messages) == 1, (place, name)
            assert "made again" in caplog.messages[0]
            assert contents(place) == whole, (place, name)
            injected += 1
    assert {p.parent.name for _, p in places} == {"weights", "pilot", "vocabulary", "truth", "teacher", "teacher-draws", "student", "student-draws", "scores"}
    assert all(map(torch.equal, numbers(small()), before))
    record_property("figures", ("bit flipped in a file of an artifact", injected, injected, injected))


class PowerCutError(Exception):
    pass


def cut_off(monkeypatch, at):
    "Training stops before its step number `at`."
    step = training._Trainer.step

    def short(self, tokens, n):
        if n == at:
            raise PowerCutError
        return step(self, tokens, n)

    monkeypatch.setattr(training._Trainer, "step", short)
    return lambda: monkeypatch.setattr(training._Trainer, "step", step)


@pytest.fixture
def often(monkeypatch):
    "Checkpoints after every other step."
    monkeypatch.setattr(pipeline, "Checkpoint", functools.partial(training.Checkpoint, every=2))


@pytest.mark.parametrize("name", ["state.json", "step-2.safetensors", None])
def test_a_halfway_checkpoint(small, often, monkeypatch, caplog, name, record_property):
    "Whole (None) it is taken up; damaged it is noticed and the training starts anew. The weights are the same."
    recipe = small(tau="direct")._student_recipe(0)
    whole = contents(artifact(recipe).path)
    recipe.folder.rename(recipe.folder.with_name("elsewhere"))
    restore = cut_off(monkeypatch, 3)
    with pytest.raises(PowerCutError):
        artifact(recipe)
    halfway = store.store_root() / "halfway" / recipe.key
    assert sorted(p.name for p in halfway.iterdir()) == ["state.json", "step-2.safetensors"]
    restore()
    steps = []
    monkeypatch.setattr(training._Trainer, "step", lambda self, tokens, n, do=training._Trainer.step: steps.append(n) or do(self, tokens, n))
    if name:
        flip(halfway / name, random.Random(1))
    caplog.clear()
    assert contents(artifact(recipe).path) == whole
    assert steps[0] == (0 if name else 2)
    assert caplog.messages == ([f"checkpoint {recipe.key[:12]}: {name} is not as written; training starts anew"] if name else [])
    assert not halfway.exists()
    record_property("figures", (f"bit flipped in a checkpoint's {name}" if name else "training cut off past a checkpoint", 1, 1, 1))


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    "A small file system of its own where this user may mount one; else limits on the size of files."
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") is not None and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "kdnb-test", place], capture_output=True).returncode == 0
    yield Disk(place, mounted)
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


class Disk:
    def __init__(self, place, mounted):
        self.place, self.mounted = place, mounted
        self.kind = "disk full (tmpfs)" if mounted else "disk full (RLIMIT_FSIZE)"

    @contextmanager
    def room_for(self, total, largest):
        "Room for half of the bytes that are about to be written."
        if self.mounted:
            filler, there = self.place / "filler", os.statvfs(self.place)
            with open(filler, "wb") as f:
                os.posix_fallocate(f.fileno(), 0, there.f_bavail * there.f_frsize - total // 2 // 4096 * 4096)
            try:
                yield
            finally:
                filler.unlink()
        else:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sizes(place):
    "Bytes of all files and of the largest."
    found = [p.stat().st_size for p in place.rglob("*") if p.is_file()]
    return sum(found), max(found)


def test_a_disk_that_fills_up_while_an_artifact_is_written(small, disk, monkeypatch, record_property):
    reference = small()
    before = numbers(reference)
    reference.teachers(), reference.embeddings("truth", 0)
    weights = next(p for p in (store.store_root() / "weights").iterdir() if p.is_dir())
    whole = {r.key: (contents(r.folder), sizes(r.folder)) for r in one_of_each(reference)}
    weighed = sizes(weights)

    monkeypatch.setenv("KDNB_STORE", str(disk.place / "store"))
    cell, injected = small(), 0
    with disk.room_for(*weighed), pytest.raises(OSError, match=r"^KDNB_STORE must have room for weights, got a full disk at .*/store; make room or choose another$"):
        load_lm(PACKAGED)
    load_lm(PACKAGED)
    for recipe in one_of_each(cell):
        artifacts([r for r in cell.recipes() if r.key in recipe.upstream])
        assert not recipe.folder.exists()
        with disk.room_for(*whole[recipe.key][1]), pytest.raises(OSError, match=f"^KDNB_STORE must have room for {recipe.stage}, got a full disk at "):
            artifact(recipe)
        assert [p.name for p in recipe.folder.parent.iterdir() if recipe.key in p.name] == [f"{recipe.key}.lock"]
        assert artifact(recipe).built
        assert contents(recipe.folder) == whole[recipe.key][0]
        injected += 1
    assert all(map(torch.equal, numbers(cell), before))
    record_property("figures", (f"{disk.kind} while an artifact is written", injected + 1, injected + 1, injected + 1))


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(small, often, disk, monkeypatch, record_property):
    "The checkpoint before it stays, and the training goes on from there."
    whole = contents(artifact(small(tau="direct")._student_recipe(0)).path)
    monkeypatch.setenv("KDNB_STORE", str(disk.place / "store"))
    recipe = small(tau="direct")._student_recipe(0)
    write = training.Checkpoint.write

    def short(self, facts, tensors):
        if len(facts["history"]) == 4:
            with disk.room_for(*sizes(self.folder)):
                write(self, facts, tensors)
        write(self, facts, tensors)

    monkeypatch.setattr(training.Checkpoint, "write", short)
    with pytest.raises(OSError, match="KDNB_STORE must have room for student, got a full disk at"):
        artifact(recipe)
    halfway = store.store_root() / "halfway" / recipe.key
    assert sorted(p.name for p in halfway.iterdir()) == ["state.json", "step-2.safetensors"]
    monkeypatch.setattr(training.Checkpoint, "write", write)
    assert contents(artifact(recipe).path) == whole
    record_property("figures", (f"{disk.kind} while a checkpoint is written", 1, 1, 1))


def test_a_disk_that_fills_up_while_a_report_is_written(disk, record_property):
    "The old file stays and the error names the new one."
    for name in ("metrics.json", "status.json", "notebook.ipynb"):
        write_json(disk.place / name, {"a": 1})
        new = {"a": "x" * 50_000}
        with disk.room_for(50_000, 50_000), pytest.raises(OSError, match=rf"\[Errno (28|27)\] (No space left on device|File too large): '.*/{name}'"):
            write_json(disk.place / name, new)
        assert read_json(disk.place / name) == {"a": 1}
        write_json(disk.place / name, new)
    assert sorted(p.name for p in disk.place.iterdir()) == ["metrics.json", "notebook.ipynb", "status.json"]
    record_property("figures", (f"{disk.kind} while a report is written", 3, 3, 3))


BIG = BUILD.replace("range(20)", "range(20000)")


@pytest.mark.chaos
@pytest.mark.parametrize("full", ["store", "reports"])
def test_a_run_on_a_full_disk(folder, disk, full, monkeypatch, capfd, record_property):
    "Exit status 1 and one clear line; with room, the same command finishes with the same numbers."
    if not disk.mounted:
        pytest.skip("needs the right to mount a tmpfs")
    file = write_run(folder, "grid: {x: [1, 2]}", BIG, WRITE)
    assert main([file, "-q", "--out", "reference"]) == 0
    monkeypatch.setenv("KDNB_STORE", str(disk.place / "store" if full == "store" else folder / "another"))
    out = str(disk.place / "reports") if full == "reports" else "reports"
    capfd.readouterr()
    with disk.room_for(100_000, 0):
        assert main([file, "-q", "--out", out]) == 1
    err = capfd.readouterr().err
    assert "KDNB_STORE must have room for draws, got a full disk at" in err if full == "store" else "No space left on device" in err
    assert main([file, "-q", "--out", out]) == 0
    for x in (1, 2):
        assert (Path(out) / "toy" / f"x={x}" / "metrics.json").read_bytes() == (folder / "reference" / "toy" / f"x={x}" / "metrics.json").read_bytes()
    record_property("figures", (f"{disk.kind} for the {full} of a run", 1, 1, 1))


def test_a_store_that_is_read_only(small, disk, monkeypatch):
    "What is there is read; what is missing has one clear error."
    if not disk.mounted:
        pytest.skip("needs the right to mount a tmpfs; a file in the place of the store is in test_store.py")
    monkeypatch.setenv("KDNB_STORE", str(disk.place / "store"))
    before = numbers(small())
    subprocess.run(["mount", "-o", "remount,ro", disk.place], check=True)
    store._sound.clear()
    assert all(map(torch.equal, numbers(small()), before))
    with pytest.raises(ValueError, match=r"^KDNB_STORE must be a folder that can be written, got .*/store/scores \(Read-only file system\); choose another$"):
        small(n_eval=25).scores()


# --- killed -------------------------------------------------------------------------------------


def at_work(place):
    "Stages whose builder is alive; what killed builders left lies there until their stage is built again."
    return sorted({p.parent.name for p in place.glob("*/*.tmp-*") if psutil.pid_exists(int(p.name.rpartition("-")[2]))}) or ["between artifacts"]


def everything(cell):
    return [*numbers(cell), *(cell.embeddings("truth", s) for s in range(2)), *(w for lm, _ in cell.teachers() for w in lm.model.parameters())]


def fork(work):
    "Id of a child that works and ends, without a word to pytest."
    if (pid := os.fork()) == 0:
        try:
            store._sound.clear()
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("kills", [5, pytest.param(10 * KILLS, marks=pytest.mark.chaos)])
def test_kills_of_a_pipeline_in_every_stage(small, often, monkeypatch, kills, tmp_path, record_property):
    "A fork computes everything and is killed, another goes on in the same store, until one finishes; then anew."
    load_lm(PACKAGED)
    begun = time.monotonic()
    before = everything(small())
    seconds, rng, told, runs = time.monotonic() - begun, random.Random(3), Counter(), 0
    while told["killed"] < kills:
        monkeypatch.setenv("KDNB_STORE", str(tmp_path / f"store-{runs}"))
        while (pid := fork(lambda: everything(small()))) and told["killed"] < kills:
            time.sleep(rng.uniform(0, 0.7 * seconds))
            at = at_work(store.store_root())
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == 0:
                break  # it had finished before
            told.update(["killed", *(f"in {stage}" for stage in at)])
        else:
            assert os.waitpid(pid, 0)[1] == 0
        assert not any(a.built for a in artifacts(small().recipes()))
        assert all(map(torch.equal, everything(small()), before))
        assert not list(store.store_root().glob("*/*.tmp-*"))
        runs += 1
    where = ", ".join(f"{name} {n}" for name, n in sorted(told.items()) if name != "killed")
    record_property("figures", (f"SIGKILL of a small pipeline ({runs} runs; {where})", told["killed"], told["killed"], told["killed"]))


def all_metrics(run):
    return {p.parent.name: p.read_bytes() for p in sorted(run.glob("*/metrics.json"))}


def is_kernel(process):
    try:
        return "ipykernel" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def strike(process, victim, rng):
    "SIGKILL to everything at once, to the command alone, or to one kernel; what is left must end by itself."
    family = descendants(process)
    kernels = [p for p in family if is_kernel(p)]
    if victim == "a kernel" and kernels:
        rng.choice(kernels).kill()
        assert process.wait() in (0, 1)  # the others went on; 0 if it had done its work
    else:
        for p in [psutil.Process(process.pid), *(family if victim == "everything" else [])]:
            p.kill()
        process.wait()
    assert not is_alive(family, 120)  # a process that is importing notices late


def killed_runs(command, reports, stores, sockets, kills, seconds, seed, fresh):
    """Kill a run at random moments, each time taking it up again in the same store, until it is finished; then anew.

    A moment is uniform over the first 0.7 of `seconds`, or of the quickest run so far, if that was quicker."""
    rng, told, finished = random.Random(seed), Counter(), []
    while told["killed"] < kills:
        env, out = {**fresh(stores / str(len(finished))), "TMPDIR": str(sockets)}, reports / str(len(finished))
        run, begun = [*command, "--out", out, "--quiet"], time.monotonic()
        while told["killed"] < kills:
            victim = rng.choice(["everything", "the command", "a kernel"])
            process = subprocess.Popen(run, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(0, 0.7 * seconds))
            except subprocess.TimeoutExpired:
                told.update([*(f"in {stage}" for stage in at_work(Path(env["KDNB_STORE"]))), victim, "killed"])
                strike(process, victim, rng)
            else:
                break
        done = subprocess.run(run, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        seconds = min(seconds, time.monotonic() - begun)
        assert not [p for p in out.rglob(".*.part") if "index" not in p.name]
        assert not list(Path(env["KDNB_STORE"]).glob("*/*.tmp-*"))
        finished.append(out)
    return told, finished


LIGHT = f"""
from kdnb.params import SmolLM2Params
from kdnb.pipeline import Pipeline
from kdnb.store import Run
cell = Pipeline(SmolLM2Params(source=source, tau=tau, **{SMALL}))
Run({{"tau": tau}}).write({{"scores": [s.totals for s in cell.scores()]}})
"""


@pytest.fixture
def sockets():
    "A folder with a short name (a socket's has at most 107 characters) for what killed runs leave behind."
    with tempfile.TemporaryDirectory(prefix="kd") as place:
        yield place


def test_two_kills_of_a_small_run(tmp_path, sockets, monkeypatch):
    "Every stage of the experiment on a small model; the moments are seeded, and where they fall depends on the machine."
    source = tiny_model(tmp_path / "model")
    write_notebook(tmp_path / "light.ipynb", cell("p", "source = ''\ntau = 0.8", "parameters"), cell("c", LIGHT))
    (tmp_path / "light.yaml").write_text(f"notebook: light.ipynb\nparams: {{source: {source}, tau: 0.8}}")
    command = [*COMMAND, tmp_path / "light.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    told, finished = killed_runs(command, tmp_path / "reports", tmp_path / "stores", sockets, 2, 7, 0, lambda place: {**env, "KDNB_STORE": str(place)})
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "undisturbed"))
    undisturbed = Pipeline(SmolLM2Params(source=str(source), tau=0.8, **SMALL))
    for out in finished:
        assert read_json(out / "light" / "single" / "metrics.json")["estimates"] == to_json({"scores": [s.totals for s in undisturbed.scores()]})
    assert told["killed"] == 2


@pytest.mark.chaos
def test_many_kills_of_the_smoke_tier(tmp_path, sockets, weights, record_property):
    begun = time.monotonic()
    (tmp_path / "stores").mkdir()
    env = fresh_store(tmp_path / "undisturbed", weights)
    command = [*COMMAND, SMOKE]
    assert subprocess.run([*command, "--out", tmp_path / "reference", "-q"], env=env).returncode == 0
    seconds = time.monotonic() - begun
    told, finished = killed_runs(command, tmp_path / "reports", tmp_path / "stores", sockets, KILLS, seconds, 1, lambda place: fresh_store(place, weights))
    same = [all_metrics(out / "smollm2-smoke") == all_metrics(tmp_path / "reference" / "smollm2-smoke") for out in finished]
    assert all(same)
    where = ", ".join(f"{name} {n}" for name, n in sorted(told.items()) if name != "killed")
    record_property("figures", (f"SIGKILL of the smoke tier ({len(finished)} runs; {where})", told["killed"], told["killed"], told["killed"]))


# --- cells that fail, and company ---------------------------------------------------------------


def test_an_error_without_a_message():
    class Failed(Exception):
        ename, evalue = "MemoryError", ""

    assert grid._cause(Failed()) == "MemoryError"


@pytest.mark.chaos
def test_cells_that_fail_in_four_ways_and_one_that_does_not(folder, capfd, record_property):
    fail = """
import os, resource, signal, time
if x == 1: raise RuntimeError('no luck')
if x == 2: time.sleep(1000)
if x == 3:
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
    bytearray(2**33)
if x == 4: os.kill(os.getpid(), signal.SIGKILL)
"""
    file = write_run(folder, "grid: {x: [1, 2, 3, 4, 5]}\nworkers: 5\ntimeout_s: 20", fail, MEASURE)
    assert main([file, "--quiet"]) == 1
    assert capfd.readouterr().err.splitlines() == [
        "kdnb_run: 4 failed; the same command tries again what is not finished",
        "toy/x=1: RuntimeError: no luck",
        "toy/x=2: TimeoutError: cell must end within timeout_s = 20 s",
        "toy/x=3: MemoryError",
        "toy/x=4: DeadKernelError: the kernel died; it may have run out of memory",
    ]
    run = folder / "reports" / "toy"
    assert states(run) == {"x=1": "failed", "x=2": "failed", "x=3": "failed", "x=4": "failed", "x=5": "ok"}
    assert [p.parent.name for p in run.glob("*/metrics.json")] == ["x=5"]
    index = (folder / "reports" / "index.html").read_text()
    assert all(said in index for said in ("no luck", "timeout_s = 20 s", "MemoryError", "the kernel died"))
    assert not (run / ".running.json").exists()
    record_property("figures", ("cell that raises, hangs, exhausts memory, is killed", 4, 4, 4))


def test_two_runs_of_one_grid_at_once(folder, record_property):
    "Whoever comes second waits, and finds every cell finished."
    file = write_run(folder, "grid: {x: [1, 2, 3]}\nworkers: 2", "open('../../../diary', 'a').write(f'{x}\\n')", MEASURE)
    pair = [start(file), start(file)]
    told = [p.communicate(timeout=120) for p in pair]
    assert [p.returncode for p in pair] == [0, 0], told
    assert sorted((folder / "diary").read_text().split()) == ["1", "2", "3"]
    assert sorted(out.splitlines()[-2] for out, _ in told) == ["toy: 0 executed, 3 already finished", "toy: 3 executed, 0 already finished"]
    record_property("figures", ("two runs of one grid at once", 1, 1, 1))


# --- damaged and edited runs --------------------------------------------------------------------


def test_damage_and_edits_of_a_run(folder, capfd, monkeypatch, caplog, record_property):
    caplog.set_level(logging.WARNING, "kdnb")
    hang = "import time\nfrom pathlib import Path\nwhile Path('../../../slow').exists() and x == 2: time.sleep(0.1)"
    file = write_run(folder, "params: {y: 1}\ngrid: {x: [1, 2]}\nworkers: 2", hang, MEASURE)
    write_notebook(folder / "toy.ipynb", cell("p", "x = 1\ny = 1", "parameters"), cell("c", hang), cell("m", MEASURE))
    run = folder / "reports" / "toy"
    (folder / "slow").touch()
    victim = start(file)
    wait_for(lambda: (run / "x=1" / "status.json").exists() and (run / "x=2").exists())
    family = descendants(victim)
    victim.kill()
    victim.communicate()
    assert not is_alive(family, 120)
    (folder / "slow").unlink()
    kept = (run / "x=1" / "status.json").read_bytes()

    # interrupted, and its parameters edited since: the difference is shown and nothing is touched
    (folder / "toy.yaml").write_text("notebook: toy.ipynb\nparams: {y: 2}\ngrid: {x: [1, 2, 3]}\nworkers: 2")
    assert main([file]) == 2
    assert capfd.readouterr().err.splitlines() == [
        "kdnb_run: toy: y: 1 → 2",
        "kdnb_run: toy: was interrupted (or is running) with other parameters; put them back to continue it, or give --force to execute all of it with the new ones",
    ]
    assert (run / "x=1" / "status.json").read_bytes() == kept
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["x=1", "x=2"]

    # put back, with one more cell: what was finished is kept
    (folder / "toy.yaml").write_text("notebook: toy.ipynb\nparams: {y: 1}\ngrid: {x: [1, 2]}\nworkers: 2")
    assert main([file]) == 0
    assert "toy: 1 executed, 1 already finished" in capfd.readouterr().out
    assert (run / "x=1" / "status.json").read_bytes() == kept

    # one bit in what a finished cell left: noticed, and the same numbers again
    before, rng = all_metrics(run), random.Random(2)
    for name, at in (("metrics.json", "x=1"), ("status.json", "x=2")):
        flip(run / at / name, rng)
    (run / "x=1" / "run.json").unlink()
    caplog.clear()
    assert main([file]) == 0
    assert caplog.messages == [f"toy/{at}: {name} is not as it was written; executed again" for name, at in (("metrics.json", "x=1"), ("run.json", "x=1"), ("status.json", "x=2"))]
    assert "toy: 2 executed, 0 already finished" in capfd.readouterr().out
    assert all_metrics(run) == before
    record_property("figures", ("bit flipped, or file lost, in a finished cell", 3, 3, 3))

    # not interrupted: one changed line, one report
    (folder / "toy.yaml").write_text("notebook: toy.ipynb\nparams: {y: 2}\ngrid: {x: [1, 2]}\nworkers: 2")
    assert main([file, "-q"]) == 0
    assert read_json(run / "x=1" / "status.json")["params"] == {"y": 2, "x": 1}


def test_an_interrupted_run_with_other_parameters_may_be_forced(folder, capsys):
    file = write_run(folder, "params: {x: 2}", "1")
    place = folder / "reports" / "toy"
    place.mkdir(parents=True)
    write_sealed(place / grid.RUNNING, {"params": {"single": {"x": 1}, "x=9": {"x": 9}}})
    assert grid._other_parameters(load_run(file), place)[0] == "toy: x: 1 → 2"
    write_sealed(place / grid.RUNNING, {"params": {"single": {}}})
    assert grid._other_parameters(load_run(file), place)[0] == "toy: x: not given → 2"
    write_sealed(place / grid.RUNNING, {"params": {"single": {"x": 2}}})
    assert grid._other_parameters(load_run(file), place) == []
    write_sealed(place / grid.RUNNING, {"params": {"x=1": {"x": 1}}})  # another grid
    assert grid._other_parameters(load_run(file), place) == []
    (place / grid.RUNNING).write_text("{")
    assert grid._other_parameters(load_run(file), place) == []
    write_sealed(place / grid.RUNNING, {"params": {"single": {"x": 1}}})
    assert main([file, "-q", "--force"]) == 0
    assert not (place / grid.RUNNING).exists()
    assert read_json(place / "single" / "status.json")["params"] == {"x": 2}


BACKWARDS = "import time\nreal = time.perf_counter\ntime.time = lambda: 1e9 - 1000 * real()\n"


@pytest.mark.chaos
def test_a_clock_that_runs_backwards(folder, monkeypatch, record_property):
    "In every process of a run, with files of the future and of the past on the disk: nothing is executed again, and what is new is executed."
    file = write_run(folder, "grid: {x: [1, 2]}", BUILD, WRITE)
    assert main([file, "-q"]) == 0
    for i, path in enumerate([*(folder / "store").rglob("*"), *(folder / "reports").rglob("*")]):
        os.utime(path, (4e9, 4e9) if i % 2 else (1e8, 1e8))
    (folder / "patch").mkdir()
    (folder / "patch" / "sitecustomize.py").write_text(BACKWARDS)
    env = {**os.environ, "PYTHONPATH": f"{folder / 'patch'}:{os.environ.get('PYTHONPATH', '')}:{Path(store.__file__).parents[1]}"}
    said = subprocess.run([sys.executable, "-c", "import time; print(time.time() < 2e9 and time.time() > time.time())"], env=env, capture_output=True, text=True)
    assert said.stdout == "True\n"
    again = subprocess.run([*COMMAND, file], env=env, capture_output=True, text=True)
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "toy: 0 executed, 2 already finished"), again.stderr
    before = all_metrics(folder / "reports" / "toy")
    more = subprocess.run([*COMMAND, file, "--force"], env=env, capture_output=True, text=True)
    assert more.returncode == 0, more.stderr
    assert all_metrics(folder / "reports" / "toy") == before
    assert len(list((folder / "store" / "draws").glob("*/manifest.json"))) == 1
    record_property("figures", ("clock backwards, mtimes of the past and future (sitecustomize)", 1, 1, 1))


def test_artifacts_do_not_know_the_time(small, monkeypatch):
    cell = small()
    before = numbers(cell)
    for path in store.store_root().rglob("*"):
        os.utime(path, (4e9, 4e9))
    store._sound.clear()
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 1e9)
    assert not any(a.built for a in artifacts(small().recipes()[:-2]))
    assert all(map(torch.equal, numbers(small()), before))
