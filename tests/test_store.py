"""The store keeps its promise through crashes, bit rot and company."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kdnb import store
from kdnb.core import Estimate, estimate
from kdnb.store import Recipe, Run, artifact, artifacts, find_fault, normal_code, read_json, read_metrics, store_root, to_json, write_json


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(store, "_sound", set())
    return tmp_path / "store"


def write(content: bytes):
    return lambda folder: (folder / "data.bin").write_bytes(content)


def start(script: str, *args, env=None) -> subprocess.Popen:
    "A process of its own that shares this test's store."
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *map(str, args)], stdout=subprocess.PIPE, text=True, env=env)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# --- keys ---------------------------------------------------------------------------------------


def test_key_is_the_hash_of_canonical_json():
    facts = {"code": {}, "params": {"a": 1, "b": [0.5, "inf"]}, "stage": "s", "upstream": ["u"]}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    recipe = Recipe("s", {"b": (0.5, math.inf), "a": 1}, print, upstream=("u",))
    assert recipe.key == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("other", [{"n": 2}, {"n": 1, "m": 0}, {"n": 1.5}, {"n": "1"}, {"n": [1]}, {"n": None}])
def test_every_parameter_counts(other):
    assert Recipe("s", other, print).key != Recipe("s", {"n": 1}, print).key


def module_of(tmp_path, source):
    path = tmp_path / "made.py"
    path.write_text(textwrap.dedent(source))
    module = types.ModuleType("made")
    module.__file__ = str(path)
    return module


def test_code_counts_and_its_looks_do_not(tmp_path):
    key = Recipe("s", {}, print, code=(module_of(tmp_path, "def f(x): return x + 1"),)).key
    same = '"Doc."\ndef f(\n  x,  # a number\n):\n  """Add."""\n  return (x + 1)  # why\n'
    assert Recipe("s", {}, print, code=(module_of(tmp_path, same),)).key == key
    assert Recipe("s", {}, print, code=(module_of(tmp_path, "def f(x): return x + 2"),)).key != key
    assert Recipe("s", {}, print).key != key


@pytest.mark.parametrize("kind", ["class A", "async def f()", "def f()"])
def test_docstrings_of_every_kind_are_ignored(kind):
    assert normal_code(f"{kind}:\n  'one'\n  pass") == normal_code(f"{kind}:\n  'two'\n  pass") == normal_code(f"{kind}:\n  pass")


def test_a_string_that_is_no_docstring_counts():
    assert normal_code("x = 'one'") != normal_code("x = 'two'")


def test_root(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store_root() == tmp_path / "store"
    monkeypatch.delenv("KDNB_STORE")
    assert store_root() == tmp_path / "kdnb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store_root() == tmp_path / "home" / ".cache" / "kdnb"


@pytest.mark.parametrize("stage", ["", "../up", "a/b", ".hidden", "Teacher", "a b"])
def test_bad_stage(stage):
    with pytest.raises(ValueError, match="stage must be lower-case letters, digits, - and _, got"):
        Recipe(stage, {}, print)


# --- reading and building -----------------------------------------------------------------------


def test_built_once_then_read():
    first = artifact("s", {"n": 1}, write(b"one"))
    second = artifact("s", {"n": 1}, lambda folder: pytest.fail("built again"))
    assert (first.built, second.built) == (True, False)
    assert (first.path, first.key, first.wall_s) == (second.path, second.key, second.wall_s)
    assert (second.path / "data.bin").read_bytes() == b"one"


def test_nested_files_are_kept_and_verified():
    def build(folder):
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "data.bin").write_bytes(b"deep")

    made = artifact("s", {}, build)
    assert list(read_json(made.path / "manifest.json")["files"]) == ["a/b/data.bin"]
    (made.path / "a" / "b" / "data.bin").unlink()
    assert find_fault(made.path) == "a/b/data.bin is missing or has another size"


def test_checksums_are_read_once_per_process(monkeypatch):
    made = artifact("s", {}, write(b"data"))
    store._sound.clear()
    read, file_hash = [], store.file_hash
    monkeypatch.setattr(store, "file_hash", lambda path: read.append(path) or file_hash(path))
    for _ in range(3):
        artifact("s", {}, print)
    assert read == [made.path / "data.bin"]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["data.bin", "manifest.json"])
@pytest.mark.parametrize("at", [0, 5, -3])
def test_flipped_byte_is_set_aside_and_rebuilt(name, at, caplog):
    made = artifact("s", {}, write(b"precious data"))
    flip(made.path / name, at)
    store._sound.clear()
    again = artifact("s", {}, write(b"precious data"))
    assert again.built
    assert (again.path / "data.bin").read_bytes() == b"precious data"
    assert made.path.with_name(f"{made.key}.corrupt-1").is_dir()
    fault = {"data.bin": "data.bin does not match its checksum", "manifest.json": "manifest.json is not as written"}[name]
    assert caplog.messages == [f"artifact s/{made.key[:12]}: {fault}; set aside as .corrupt-1 and made again"]


def test_second_damage_is_kept_beside_the_first(caplog):
    for n in (1, 2):
        made = artifact("s", {}, write(b"precious data"))
        (made.path / "data.bin").write_bytes(b"short")  # another size is seen without checksums
        assert artifact("s", {}, write(b"precious data")).built
        assert made.path.with_name(f"{made.key}.corrupt-{n}").is_dir()
    assert len(caplog.messages) == 2


def test_failed_build_leaves_nothing(root):
    def build(folder):
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        artifact("s", {}, build)
    assert [p.suffix for p in (root / "s").iterdir()] == [".lock"]
    assert artifact("s", {}, write(b"whole")).built


def test_empty_build_is_refused():
    with pytest.raises(ValueError, match="build of s must write at least one file, got an empty folder"):
        artifact("s", {}, lambda folder: None)


def test_unwritable_store(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(ValueError, match=r"KDNB_STORE must be a folder that can be written, got .*/file/store/s \(Not a directory\); choose another"):
        artifact("s", {}, write(b"data"))


def test_reading_needs_no_lock(root):
    made = artifact("s", {}, write(b"data"))
    with store._lock(made.path):
        assert not artifact("s", {}, print).built


# --- company and crashes ------------------------------------------------------------------------

SHARED = """
    import os, sys, time
    from pathlib import Path
    from kdnb.store import Recipe, artifacts
    diary = Path(sys.argv[1])
    def build(n):
        def run(folder):
            with open(diary, "a") as f: f.write(f"{n} {os.getpid()}\\n")
            time.sleep(float(sys.argv[2]))
            (folder / "data.bin").write_bytes(bytes([n]) * 1000)
        return run
    for a in artifacts([Recipe("s", {"n": n}, build(n)) for n in range(6)]):
        print(a.key, a.built)
"""


def test_two_processes_share_the_work(tmp_path):
    diary = tmp_path / "diary"
    pair = [start(SHARED, diary, 0.3) for _ in range(2)]
    told = [p.communicate(timeout=30)[0].split() for p in pair]
    assert [p.returncode for p in pair] == [0, 0]
    built = [line.split() for line in diary.read_text().splitlines()]
    assert sorted(n for n, _ in built) == list("012345")  # each exactly once
    assert {pid for _, pid in built} == {str(p.pid) for p in pair}  # both busy
    assert told[0][::2] == told[1][::2]  # both have all six, in order
    assert sorted(told[0][1::2] + told[1][1::2]) == ["False"] * 6 + ["True"] * 6


def test_only_what_needs_the_others_work_waits_for_it():
    theirs, mine = (Recipe("s", {"of": who}, write(b"1")) for who in ("them", "me"))
    after = [Recipe("s", {"after": r.params["of"]}, write(b"2"), upstream=(r.key,)) for r in (theirs, mine)]
    theirs.folder.parent.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with store._lock(theirs.folder):
            made = pool.submit(artifacts, [theirs, mine, *after])
            wait_for(after[1].folder.is_dir)
            assert not after[0].folder.is_dir()  # it comes first in the list
        assert [a.key for a in made.result(timeout=20)] == [r.key for r in (theirs, mine, *after)]


def test_killed_builder_is_taken_over(tmp_path, root):
    diary = tmp_path / "diary"
    victim = start(SHARED, diary, 30)
    wait_for(lambda: list(root.glob("s/*.tmp-*")) and diary.exists())
    heir = start(SHARED, diary, 0)
    wait_for(lambda: len(diary.read_text().splitlines()) == 6)  # all but the first, which the victim holds
    victim.send_signal(signal.SIGKILL)
    told = heir.communicate(timeout=20)[0].split()
    victim.communicate()
    assert heir.returncode == 0
    assert told[1::2] == ["True"] * 6
    assert not list(root.glob("s/*.tmp-*"))  # the victim's half is gone
    for n, made in enumerate(artifacts([Recipe("s", {"n": n}, print) for n in range(6)])):
        assert (made.path / "data.bin").read_bytes() == bytes([n]) * 1000


def test_who_waits_long_says_so_and_reads_what_the_other_made(tmp_path, root):
    begun, progress = tmp_path / "begun", tmp_path / "progress.json"
    patient = """
        import pathlib, sys, time
        from kdnb.store import artifact
        def build(folder):
            pathlib.Path(sys.argv[1]).touch()
            while not pathlib.Path(sys.argv[2]).exists():  # until the other has said that it waits
                time.sleep(0.05)
            (folder / "one").write_bytes(b"1")
        artifact("s", {"n": 0}, build)
    """
    first = start(patient, begun, progress)
    wait_for(begun.exists)
    script = """
        import sys
        from kdnb.store import Recipe, artifacts
        (made,) = artifacts([Recipe("s", {"n": 0}, lambda folder: sys.exit("built twice"))])
        print(made.built)
    """
    second = start(script, env={**os.environ, "KDNB_PROGRESS": str(progress)})
    assert second.communicate(timeout=60)[0] == "False\n"
    assert read_json(progress)["desc"] == "s: another process is making it"
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_kill_between_files_then_resume(tmp_path, root):
    script = """
        import sys, time
        from kdnb.store import artifact
        def build(folder):
            (folder / "one").write_bytes(b"1" * 10)
            time.sleep(float(sys.argv[1]))
            (folder / "two").write_bytes(b"2" * 10)
        print(artifact("s", {}, build).built)
    """
    victim = start(script, 30)
    wait_for(lambda: list(root.glob("s/*.tmp-*/one")))
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert len(list(root.glob("s/*.tmp-*"))) == 1  # half-written, and not under the artifact's name
    assert start(script, 0).communicate(timeout=20)[0] == "True\n"
    made = artifact("s", {}, print)
    assert sorted(p.name for p in made.path.iterdir()) == ["manifest.json", "one", "two"]
    assert not list(root.glob("s/*.tmp-*"))


def test_builder_at_work_is_not_swept(root):
    made = artifact("s", {"n": 1}, write(b"data"))
    other = root / "s" / ("0" * 64 + ".tmp-1")
    other.mkdir()
    with store._lock(root / "s" / ("0" * 64)):
        artifact("s", {"n": 2}, write(b"data"))
        assert other.is_dir()
    artifact("s", {"n": 3}, write(b"data"))
    assert not other.exists()
    assert made.path.is_dir()


# --- JSON ---------------------------------------------------------------------------------------


def test_to_json_knows_arrays_tensors_and_estimates():
    got = to_json({"np": np.arange(2), "t": torch.tensor([0.5, math.inf]), "s": np.float32(0.25), "i": np.int64(3), "b": np.bool_(True), "e": Estimate(1.0, 0.5, 0.0, 2.0, 9)})
    assert got == {"np": [0, 1], "t": [0.5, "inf"], "s": 0.25, "i": 3, "b": True, "e": {"mean": 1.0, "se": 0.5, "lo": 0.0, "hi": 2.0, "n": 9}}
    json.dumps(got, allow_nan=False)


def test_to_json_refuses_with_the_place():
    with pytest.raises(TypeError, match=r"value\.a\[1\]\.b must be a JSON value, got set; turn it into numbers, text, lists or mappings"):
        to_json({"a": [0, {"b": {1}}]})
    with pytest.raises(TypeError, match=r"keys of value\.a must be text, got 0\.5"):
        to_json({"a": {0.5: 1}})


def test_refused_value_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match=r"x\.json\.a must be a JSON value, got object"):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# --- a run's two files --------------------------------------------------------------------------


def test_metrics_round_trip(tmp_path):
    batch = estimate(np.random.default_rng(0).normal(size=(3, 20)))
    estimates = {"recall": estimate([-1.0, -math.inf]), "batch": batch, "plain": {"kl": math.inf, "steps": 3}}
    Run({"beta": 2.0}, out=tmp_path, experiment="x").write(estimates, seeds=[0, 1], claims=[{"claim": "c", "verdict": "held", "evidence": estimate([1.0, 2.0])}], note="n")
    got = read_metrics(tmp_path)
    assert got["estimates"]["recall"] == estimates["recall"]
    assert got["estimates"]["plain"] == estimates["plain"]
    assert got["claims"][0]["evidence"] == estimate([1.0, 2.0])
    for a, b in zip(got["estimates"]["batch"], batch, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (got["schema"], got["experiment"], got["parameters"], got["seeds"], got["note"]) == (1, "x", {"beta": 2.0}, [0, 1], "n")
    assert got["versions"]["torch"] == torch.__version__


def test_metrics_are_the_same_bytes_and_run_is_not(tmp_path):
    files = []
    for name in ("a", "b"):
        run = Run({"beta": 2.0}, out=tmp_path / name)
        with run.stage("fit"):
            time.sleep(0.01)
        with run.stage("fit"):
            time.sleep(0.01)
        run.write({"x": estimate([1.0, 2.0])}, seeds=[0])
        files.append((tmp_path / name / "metrics.json").read_bytes())
    assert files[0] == files[1]
    told = read_json(tmp_path / "a" / "run.json")
    assert set(told) == {"schema", "commit", "started", "wall_s", "peak_memory_mb", "cores", "threads"}
    assert told["wall_s"]["total"] >= told["wall_s"]["fit"] >= 0.02
    assert told["peak_memory_mb"] > 10


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"out must be a folder that can be written, got .*/file/out \(Not a directory\); choose another"):
        Run({}, out=tmp_path / "file" / "out").write({})


def test_the_store_does_not_load_torch():
    done = start("import sys, kdnb.store; print('torch' in sys.modules)").communicate(timeout=20)
    assert done[0] == "False\n"
