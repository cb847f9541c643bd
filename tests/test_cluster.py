"""Ray runs cells and shards elsewhere, past lost processes and nodes, to the same bytes; every cluster here listens to this machine alone and ends with its test."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from kdnb import cluster, grid
from kdnb.cluster import Cluster, demands, room
from kdnb.lm import load_lm
from kdnb.params import Resources
from kdnb.store import Recipe, artifacts, read_json, store_root, write_json

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "import sys; from kdnb.grid import main; sys.exit(main())"]
MEASURE = "from kdnb.store import Run\nimport torch\nrun = Run({'x': x})\nrun.write({'twice': 2 * x, 'threads': torch.get_num_threads()})"


def cell(name, source, *tags):
    return {"cell_type": "code", "id": name, "metadata": {"tags": list(tags)}, "source": source, "outputs": [], "execution_count": None}


def write_run(folder, text, *code, name="toy"):
    "A run file and its notebook: parameter x, then the cells given."
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    cells = [cell("p", "x = 1", "parameters"), *(cell(f"c{i}", source) for i, source in enumerate(code))]
    write_json(folder / f"{name}.ipynb", {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    (folder / f"{name}.yaml").write_text(f"notebook: {name}.ipynb\n{text}")
    return folder / f"{name}.yaml"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def files(folder, *names):
    "Bytes of all files of these names, by path."
    return {str(p.relative_to(folder)): p.read_bytes() for name in names for p in sorted(folder.rglob(name)) if not p.is_symlink()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "store"))
    return tmp_path


@pytest.fixture(scope="module")
def nodes():
    "A cluster of two nodes of one processor each, and a way to replace the second."
    cluster.import_ray(alone=True)
    from ray.cluster_utils import Cluster as Nodes

    small = {"num_cpus": 1, "object_store_memory": cluster.OBJECT_STORE_BYTES, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    made = Nodes(initialize_head=True, head_node_args=small)
    made.add = functools.partial(made.add_node, **small)
    made.second = made.add()
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    "What the usual engine writes for x = 1 and 2."
    folder = tmp_path_factory.mktemp("local")
    assert grid.main([str(write_run(folder, "grid: {x: [1, 2]}\nworkers: 2", MEASURE)), "--quiet", "--out", str(folder / "reports")]) == 0
    return files(folder / "reports", "metrics.json")


def run(nodes, file, *options, out="ray"):
    "kdnb_run on the cluster, in this process."
    return grid.main([str(file), "--quiet", "--engine", "ray", "--address", nodes.address, "--out", out, *options])


# --- without a cluster --------------------------------------------------------------------------


def test_no_ray(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = write_run(folder, "", MEASURE)
    assert grid.main([str(file), "--engine", "ray"]) == 2
    assert capsys.readouterr().err == 'kdnb_run: --engine ray must have Ray installed, got none; pip install "kdnb[ray]"\n'
    assert not (folder / "reports").exists()


def test_an_address_without_ray(folder, capsys):
    assert grid.main([str(write_run(folder, "", MEASURE)), "--address", "127.0.0.1:6379"]) == 2
    assert capsys.readouterr().err == "kdnb_run: --address must come with --engine ray, got 127.0.0.1:6379\n"


@pytest.mark.parametrize(("address", "cause"), [("127.0.0.1:1", "ConnectionRefusedError"), ("nowhere", "ValueError")])
def test_nobody_at_the_address(folder, capsys, address, cause):
    assert grid.main([str(write_run(folder, "", MEASURE)), "--engine", "ray", "--address", address]) == 2
    assert capsys.readouterr().err.startswith(f"kdnb_run: --address must be host:port of a Ray cluster that runs, got {address} ({cause}: ")


def test_resources_as_ray_counts_them():
    assert demands(Resources()) == {"CPU": 1}
    assert demands(Resources(cpus=2, gpus=1, memory_gb=0.5)) == {"CPU": 2, "GPU": 1, "memory": 2**29}
    assert cluster.options({"CPU": 2, "memory": 5}) == {"num_cpus": 2, "memory": 5}
    assert [room(free, {"CPU": 2, "GPU": 0.5}) for free in ({"CPU": 5, "GPU": 4}, {"CPU": 5, "GPU": 0.5}, {"CPU": 5}, {})] == [2, 1, 0, 0]


def test_helpers_are_called_where_two_are_missing(folder, monkeypatch):
    def build(target):
        write_json(target / "i.json", 1)

    seen = []
    monkeypatch.setenv("KDNB_HELPERS", "kdnb.cluster:call_helpers")
    monkeypatch.setattr(cluster, "call_helpers", lambda recipes: seen.append([r.params["i"] for r in recipes]))
    recipes = [Recipe("number", {"i": i}, build) for i in range(4)]
    for asked in (recipes[:1], recipes[:2], recipes, recipes):
        artifacts(asked)
    assert seen == [[2, 3]]


def test_nothing_to_do_starts_nothing(folder, monkeypatch):
    file = write_run(folder, "", MEASURE)
    assert grid.main([str(file), "--quiet"]) == 0
    monkeypatch.setattr(Cluster, "ray", property(lambda self: pytest.fail("Ray was started")))
    assert grid.main([str(file), "--quiet", "--engine", "ray"]) == 0


# --- a cluster of two nodes ---------------------------------------------------------------------


@pytest.mark.slow
def test_both_engines_write_the_same(folder, nodes, capfd):
    file = write_run(folder, "grid: {x: [1, 2]}", "assert x != 2, f'x must not be 2, got {x}'", MEASURE)
    assert grid.main([str(file), "--quiet", "--out", "local"]) == 1
    lines = capfd.readouterr().err
    assert "toy/x=2: AssertionError: x must not be 2, got 2" in lines
    assert run(nodes, file) == 1
    assert capfd.readouterr() == ("", lines)
    assert files(folder / "ray", "metrics.json", "notebook.ipynb") == files(folder / "local", "metrics.json", "notebook.ipynb")
    assert read_json(folder / "ray" / "toy" / "x=1" / "metrics.json")["estimates"]["threads"] == 1
    assert read_json(folder / "ray" / "toy" / "x=2" / "status.json")["state"] == "failed"
    before = files(folder / "ray", "status.json")
    assert run(nodes, file) == 1
    after = files(folder / "ray", "status.json")
    assert [name for name in before if before[name] != after[name]] == ["toy/x=2/status.json"]  # finished cells are not run again


@pytest.mark.slow
def test_a_cell_that_hangs_is_ended(folder, nodes, capfd):
    file = write_run(folder, "timeout_s: 3", "import subprocess\nsubprocess.run(['sleep', '98764'])")
    assert run(nodes, file) == 1
    assert capfd.readouterr().err.splitlines()[1:] == ["toy/single: TimeoutError: cell must end within timeout_s = 3 s"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "98764"]]


def test_what_no_node_has(folder, nodes, capsys):
    assert run(nodes, write_run(folder, "resources: {cpus: 2, gpus: 1}", MEASURE)) == 2
    assert capsys.readouterr().err == "kdnb_run: resources must fit on one node of the cluster, got {'CPU': 2, 'GPU': 1.0}; nodes have {'CPU': 1.0, 'GPU': 0}; {'CPU': 1.0, 'GPU': 0}\n"


KILL_WORKER = """
import os, signal, psutil
from pathlib import Path
first = Path('../../../first')
if x == 2 and not first.exists():
    first.touch()
    worker = next(p for p in psutil.Process().parents() if p.name().startswith('ray::'))
    os.kill(worker.pid, signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_worker_costs_only_its_cell(folder, nodes, local):
    file = write_run(folder, "grid: {x: [1, 2]}", KILL_WORKER, MEASURE)
    assert run(nodes, file) == 0
    assert (folder / "first").exists()
    assert files(folder / "ray", "metrics.json") == local


WAIT = """
import time
from pathlib import Path
Path(f'../../../began-{x}-{time.time_ns()}').touch()
while not Path('../../../go').exists(): time.sleep(0.1)
"""


@pytest.mark.slow
def test_a_lost_node_costs_only_its_cell(folder, nodes, local):
    "Both nodes run a cell when the second node goes; its cell is run again on the first."
    file = write_run(folder, "grid: {x: [1, 2]}", WAIT, MEASURE)
    process = subprocess.Popen([*COMMAND, str(file), "--quiet", "--engine", "ray", "--address", nodes.address, "--out", "ray"], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(folder.glob("began-1-*")) and list(folder.glob("began-2-*")))
        nodes.remove_node(nodes.second, allow_graceful=False)
        (folder / "go").touch()
        assert process.communicate(timeout=90) == (None, "")
    finally:
        process.kill()
        nodes.second = nodes.add()
    assert process.returncode == 0
    assert len(list(folder.glob("began-*"))) == 3
    assert files(folder / "ray", "metrics.json") == local


HELPED = """
import os, time
from pathlib import Path
from kdnb.store import Recipe, Run, artifacts, read_json, write_json
asker, flag = os.getpid(), Path('../../../helped').absolute()
def build(i):
    def write(folder):
        if os.getpid() != asker:
            flag.touch()
        while not flag.exists(): time.sleep(0.05)
        write_json(folder / 'number.json', x * i)
        (folder / 'who').write_text('asker' if os.getpid() == asker else f'helper of {os.environ["OMP_NUM_THREADS"]}')
    return write
made = artifacts([Recipe('number', {'i': i, 'x': x}, build(i)) for i in range(5)])
assert sorted({(a.path / 'who').read_text() for a in made}) == ['asker', 'helper of 1']
run = Run({'x': x})
run.write({'numbers': [read_json(a.path / 'number.json') for a in made]})
"""


@pytest.mark.slow
def test_idle_processors_help_a_cell(folder, nodes):
    assert run(nodes, write_run(folder, "", HELPED)) == 0
    assert read_json(folder / "ray" / "toy" / "single" / "metrics.json")["estimates"]["numbers"] == [0, 1, 2, 3, 4]
    wait_for(lambda: not [p for p in psutil.process_iter(["name"]) if p.info["name"].startswith("ray::Helper")])


SHARDS = """
import json, os, sys
from pathlib import Path
from kdnb import cluster
from kdnb.params import SmolLM2Params
from kdnb.pipeline import Pipeline
from kdnb.store import artifacts

params, address, folder = SmolLM2Params(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]
os.environ['KDNB_STORE'] = folder
recipes = Pipeline(params).recipes()
if address == 'here':
    artifacts(recipes)
else:
    os.environ['KDNB_CLUSTER'] = json.dumps({'address': address, 'wanted': {'CPU': 1}})
    ray, wanted = cluster._join()
    Helper = ray.remote(cluster.Helper).options(**cluster.options(wanted))
    first, second = Helper.remote(), Helper.remote()
    ray.get([first.build.remote(recipes, 0), second.build.remote(recipes, 1)])
assert all(r.folder.is_dir() for r in recipes)
"""


@pytest.mark.slow
def test_truth_teachers_students_and_scores_of_actors_are_those_of_one_process(folder, nodes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("KDNB_STORE")
    load_lm("smollm2-135m-instruct")
    weights = store_root() / "weights"
    tiny = yaml.safe_load((ROOT / "params" / "smollm2-smoke.yaml").read_text())["params"]
    tiny |= {"vocab_size": 64, "max_length": 4, "n_train": 300, "n_pilot": 8, "n_eval": 16, "n_select": 16, "teacher_epochs": 1, "student_epochs": 1, "tau": 0.8}
    for name, address in (("one", "here"), ("actors", nodes.address)):
        (folder / name).mkdir()
        (folder / name / "weights").symlink_to(weights)
        done = subprocess.run([sys.executable, "-c", SHARDS, json.dumps(tiny), address, str(folder / name)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
    products = ("*.parquet", "*.safetensors", "vocabulary.json")
    one, actors = files(folder / "one", *products), files(folder / "actors", *products)
    assert {name.split("/")[0] for name in one} == {"pilot", "vocabulary", "truth", "teacher", "teacher-draws", "student", "student-draws", "scores"}
    assert actors == one


# --- a cluster of its own -----------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(folder):
    file = write_run(folder, "grid: {x: [1, 2]}\nworkers: 2", WAIT, MEASURE)
    process = subprocess.Popen([*COMMAND, str(file), "--engine", "ray"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: list(folder.glob("began-1-*")) and list(folder.glob("began-2-*")))
        family = psutil.Process(process.pid).children(recursive=True)
        names = " ".join(" ".join(p.cmdline()) for p in family)
        assert "raylet" in names
        assert "gcs_server" in names
        assert names.count("ipykernel_launcher") == 2
        assert {c.laddr.ip.removeprefix("::ffff:") for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process that has not left the group
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "kdnb_run: interrupted; the same command continues\n")
    assert not [p for p in psutil.wait_procs(family, timeout=10)[1] if p.status() != psutil.STATUS_ZOMBIE]
    assert not list((folder / "reports").rglob("status.json"))
