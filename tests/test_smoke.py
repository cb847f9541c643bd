"""The main job in miniature: real SmolLM2 weights through Papermill into reports, killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kdnb.lm import load_lm
from kdnb.store import read_json, read_metrics, store_root

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "params" / "smollm2-smoke.yaml"
COMMAND = [sys.executable, "-c", "import sys; from kdnb.grid import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def weights() -> Path:
    """The dequantised weights, made once on this machine; everything else is made anew."""
    load_lm("smollm2-135m-instruct")
    return store_root() / "weights"


def fresh_store(folder: Path, weights: Path) -> dict:
    """An environment whose store holds the weights and nothing else."""
    folder.mkdir()
    (folder / "weights").symlink_to(weights)
    return {**os.environ, "KDNB_STORE": str(folder)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, weights) -> Path:
    """Reports of one complete smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    done = subprocess.run([*COMMAND, SMOKE, "--out", folder / "reports"], env=fresh_store(folder / "store", weights), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "reports" / "smollm2-smoke"


def test_every_cell_leaves_its_report_and_numbers(smoke):
    cells = {f.name for f in smoke.iterdir() if f.is_dir()}
    assert cells == {"tau=direct", "tau=0.6", "tau=1", "summary"}
    for name in cells:
        assert {"notebook.ipynb", "metrics.json", "run.json", "report.html"} <= {f.name for f in (smoke / name).iterdir()}
    assert (smoke.parent / "index.html").exists()


def test_the_identities_hold_in_what_was_published(smoke):
    for name in ("tau=direct", "tau=0.6", "tau=1"):
        e = read_metrics(smoke / name)["estimates"]
        for level in ("per_token", "per_sequence", "plain"):
            r = e[level]
            assert abs(r["kl_student_truth"].mean + r["student_entropy"].mean + r["precision"].mean) < 1e-9
            assert abs(r["kl_truth_student"].mean + r["truth_entropy"].mean + r["recall"].mean) < 1e-9
        assert all(value.mean > 0 for key, value in e["per_token"].items() if key.startswith("kl"))


def test_selectivity_lowers_the_entropy_of_the_source(smoke):
    source = {t: read_metrics(smoke / f"tau={t}")["estimates"]["source_entropy"].mean for t in ("0.6", "1")}
    assert source["0.6"] < source["1"] - 0.5


def test_reports_carry_no_path_of_this_machine(smoke):
    for file in smoke.rglob("*"):
        if file.suffix in (".ipynb", ".json"):
            text = file.read_text()
            assert str(Path.home()) not in text, file
            assert str(smoke.parent) not in text, file
            assert str(ROOT) not in text, file


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, weights):
    """SIGKILL to the whole process group in the middle of a stage; metrics.json is bit-identical to an undisturbed run."""
    run = yaml.safe_load(SMOKE.read_text())
    run["notebook"] = str(ROOT / "nbs" / "experiments" / "smollm2.ipynb")
    run["params"] |= {"vocab_size": 64, "max_length": 4, "n_train": 600, "n_pilot": 8, "n_eval": 16, "n_select": 16}
    run["grid"] = {"tau": [0.8]}
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(run))
    results = []
    for name in ("undisturbed", "killed"):
        env = fresh_store(tmp_path / name, weights)
        command = [*COMMAND, file, "--out", tmp_path / f"reports-{name}", "--quiet"]
        if name == "killed":
            process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
            store = tmp_path / name
            deadline = time.monotonic() + 120
            while not list(store.glob("truth/*.tmp-*")) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert list(store.glob("truth/*.tmp-*")), "the stage to be killed never began"
            kernels = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _kill_orphans(kernels)
            assert not (tmp_path / f"reports-{name}" / "killed" / "tau=0.8" / "metrics.json").exists()
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append((tmp_path / f"reports-{name}" / "killed" / "tau=0.8" / "metrics.json").read_bytes())
    assert results[0] == results[1]


def _kill_orphans(pids: list[str]) -> None:
    """Kernels that jupyter_client put into sessions of their own."""
    for pid in pids:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_a_broken_store_loses_nothing_that_was_computed(tmp_path, smoke, weights):
    """Finished cells are not run again, and an artifact whose bytes changed is set aside and made anew."""
    store = smoke.parent.parent / "store"
    scores = sorted(store.glob("scores/*/scores.safetensors"))[0]
    data = bytearray(scores.read_bytes())
    data[-1] ^= 1
    scores.write_bytes(data)
    before = {f: f.read_bytes() for f in smoke.glob("*/metrics.json")}
    again = [*COMMAND, SMOKE, "--out", smoke.parent, "--force", "--quiet"]
    done = subprocess.run(again, env={**os.environ, "KDNB_STORE": str(store)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(store.glob("scores/*.corrupt-*"))) == 1
    assert {f: f.read_bytes() for f in smoke.glob("*/metrics.json")} == before
    assert read_json(smoke / "summary" / "metrics.json")["experiment"] == "smollm2_summary"


@pytest.mark.slow
def test_neighbours_in_miniature(tmp_path):
    """Cells that choose their notebook, and the closing notebook over whichever of them are there."""
    run = yaml.safe_load((ROOT / "params" / "neighbours.yaml").read_text())
    few = ["04_variance_reduction", "03_mixture_condition"]
    run |= {key: str(ROOT / "params" / run[key]) for key in ("notebook", "summary")} | {"grid": {"method": few}}
    run["cases"] = {few[1]: {"n_seeds": 4, "n_exact": 4000, "n_steps": 100, "n_eval": 50}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(run))
    done = subprocess.run([*COMMAND, tmp_path / "few.yaml", "--out", tmp_path / "reports"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_metrics(tmp_path / "reports" / "few" / "summary")
    assert {r["arm"] for r in found["estimates"]["chosen"]} == {"3 conditions", "4 variance reduction"}
    assert found["parameters"]["run"] == ".."
    path = {r["knob"]: r for r in found["estimates"]["path"]}
    assert path["β = 1"]["d_precision"].mean == pytest.approx(0, abs=1e-9)  # an exact student of an unsharpened teacher is the direct one
    assert path["β = 100"]["d_precision"].lo > 0 > path["β = 100"]["d_recall"].hi
    assert "papermill nbs/neighbours/03_mixture_condition.ipynb out.ipynb" in (tmp_path / "reports" / "few" / f"method={few[1]}" / "report.html").read_text()
