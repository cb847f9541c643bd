"""A grid runs in parallel, past failures, through crashes, and never twice."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from kdnb import grid, report
from kdnb.grid import Job, Package, clean_notebook, fingerprint, is_finished, main, source_path
from kdnb.params import load_run
from kdnb.store import file_hash, read_json, write_json, write_sealed

COMMAND = [sys.executable, "-c", "import sys; from kdnb.grid import main; sys.exit(main())"]


def cell(name, source, *tags, kind="code"):
    code = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": {"tags": list(tags)}, "source": source, **code}


def write_notebook(path, *cells):
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    write_json(path, {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "store"))
    return tmp_path


def write_run(folder, text, *code, name="toy"):
    "A run file and its notebook: parameter x, then the cells given."
    write_notebook(folder / f"{name}.ipynb", cell("p", "x = 1", "parameters"), *(cell(f"c{i}", source) for i, source in enumerate(code)))
    (folder / f"{name}.yaml").write_text(f"notebook: {name}.ipynb\n{text}")
    return f"{name}.yaml"


def start(*args):
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def states(run):
    return {p.parent.name: read_json(p)["state"] for p in sorted(run.glob("*/status.json"))}


MEASURE = "from kdnb.store import Run\nrun = Run({'x': x})\nrun.write({'twice': 2 * x})"


# --- what makes a cell finished -----------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    sources = {
        "": "__version__ = '1'\n",
        "a": "from .b import f\n",
        "b": "def f():\n    import kdnb.c\n",
        "c": "import numpy\n",
        "d": "from . import a\n",
        "e": "",
    }
    for name, source in sources.items():
        (tmp_path / f"{name or '__init__'}.py").write_text(source)
    return Package({name: tmp_path / f"{name or '__init__'}.py" for name in sources})


@pytest.mark.parametrize(
    ("source", "reached"),
    [
        ("import numpy", ""),
        ("import kdnb.e", "e"),
        ("from kdnb.b import f", "bc"),
        ("from kdnb import d", "abcd"),
        ("%time x = 1\n!ls\nimport kdnb.c as c", "c"),
        ("def later():\n    from kdnb.a import f", "abc"),
        ("from kdnbelse.a import f", ""),
    ],
)
def test_code_within_reach(package, source, reached):
    assert "".join(package.reach(source)) == reached


def test_what_cannot_be_parsed_reaches_everything(package):
    assert set(package.reach("x = = 1")) == {"", "a", "b", "c", "d", "e"}


def test_the_real_package_is_found():
    found = Package.find()
    assert {"core", "store", "params", "grid", ""} <= set(found.files)
    assert "grid" not in found.reach("import kdnb.store")


def test_fingerprint_changes_with_what_matters(tmp_path, package):
    notebook = write_notebook(tmp_path / "n.ipynb", cell("p", "x = 1", "parameters"), cell("c", "import kdnb.c"))
    first = fingerprint(notebook, {"x": 1}, package)
    nb = read_json(notebook)
    nb["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "executed"}]
    nb["cells"][1]["execution_count"] = 9
    write_json(notebook, nb)
    assert fingerprint(notebook, {"x": 1}, package) == first  # outputs are no source
    (tmp_path / "c.py").write_text("# a comment\nimport  numpy\n")
    assert fingerprint(notebook, {"x": 1}, package) == first
    (tmp_path / "e.py").write_text("another = 'module'\n")
    assert fingerprint(notebook, {"x": 1}, package) == first
    others = {fingerprint(notebook, {"x": 2}, package), fingerprint(notebook, {"x": 1}, package, ["input"])}
    (tmp_path / "c.py").write_text("import numpy as np\n")
    others.add(fingerprint(notebook, {"x": 1}, package))
    (tmp_path / "c.py").write_text("import numpy\n")
    nb["cells"][1]["source"] = "import kdnb.c  # why"
    write_json(notebook, nb)
    others.add(fingerprint(notebook, {"x": 1}, package))
    assert len(others | {first}) == 5


@pytest.mark.parametrize("change", ["", "[]", "{}", {"state": "failed"}, {"fingerprint": "other"}, {"files": {"notebook.ipynb": "another"}}])
def test_not_finished(tmp_path, change):
    job = Job("x=1", tmp_path / "n.ipynb", tmp_path, {}, "f")
    (tmp_path / "notebook.ipynb").write_text("{}")
    status = {"state": "ok", "fingerprint": "f", "files": {"notebook.ipynb": file_hash(tmp_path / "notebook.ipynb")}}
    if isinstance(change, str):
        (tmp_path / "status.json").write_text(change)
    else:
        write_sealed(tmp_path / "status.json", status | change)
    assert not is_finished(job)
    write_sealed(tmp_path / "status.json", status)
    assert is_finished(job)
    (tmp_path / "notebook.ipynb").unlink()
    assert not is_finished(job)


def test_clean_notebook():
    made = cell("random", "# Parameters\nx = 2", "injected-parameters")
    made["outputs"] = [{"output_type": "stream", "name": "stderr", "text": ["/home/me/.venv/lib/python3.12/site-packages/scipy/a.py:5: RuntimeWarning: slow\n", "see a/b\n"]}]
    made["metadata"] |= {"papermill": {"start_time": "now"}, "execution": {"iopub.status.idle": "now"}}
    marker = cell("m", "An Exception was encountered", "papermill-error-cell-tag", kind="markdown")
    papermill = {"input_path": "/home/me/toy.ipynb", "output_path": "/home/me/out.ipynb", "parameters": {"x": 2}, "exception": None, "duration": 1.0}
    nb = clean_notebook({"cells": [marker, made], "metadata": {"papermill": papermill, "kernelspec": {"name": "python3"}}})
    assert [(c["id"], c["metadata"]) for c in nb["cells"]] == [("injected-parameters", {"tags": ["injected-parameters"]})]
    assert made["outputs"][0]["text"] == ["scipy/a.py:5: RuntimeWarning: slow\n", "see a/b\n"]
    assert [source_path(p) for p in ("nbs/a/b.ipynb", "/x/nbs/nbs/c.ipynb", "a/onbs/c.ipynb", "")] == ["nbs/a/b.ipynb", "nbs/c.ipynb", "c.ipynb", ""]
    assert nb["metadata"] == {"kernelspec": {"name": "python3"}, "papermill": {"input_path": "toy.ipynb", "parameters": {"x": 2}, "exception": False}}


def test_a_report_that_cannot_be_drawn_does_not_cost_the_cell(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no ink\nand no paper")

    monkeypatch.setattr(report, "render", broken)
    job = Job("x=1", tmp_path / "n.ipynb", tmp_path, {}, "f")
    write_notebook(tmp_path / ".partial.ipynb")
    grid._finish(job, "", 1.0)
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["error"], status["report_error"]) == ("ok", "", "RuntimeError: no ink")
    assert is_finished(job)


def test_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [grid.threads_per_kernel(cpus) for cpus in (1, 4)] == [1, 4]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert grid.threads_per_kernel(8) == 3


# --- the command --------------------------------------------------------------------------------


def test_bad_input_runs_nothing(folder, capsys):
    good = write_run(folder, "grid: {x: [1]}", "1")
    bad = write_run(folder, "grid: {y: [1]}\nworker: 2", name="bad")
    assert main([good, bad, "none.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "kdnb_run: bad.yaml: worker must be a key of a run file, got 2; did you mean workers?",
        "kdnb_run: none.yaml: run file must be a file that can be read (No such file or directory)",
    ]
    assert not (folder / "reports").exists()


def test_two_run_files_of_one_name(folder, capsys):
    (folder / "sub").mkdir()
    write_run(folder / "sub", "")
    assert main([write_run(folder, ""), "sub/toy.yaml"]) == 2
    assert capsys.readouterr().err == "kdnb_run: run files must have distinct names, got toy twice\n"


def test_unwritable_output(folder, capsys):
    (folder / "file").write_text("not a folder")
    assert main([write_run(folder, ""), "--out", "file/reports"]) == 2
    assert re.fullmatch(r"kdnb_run: --out must be a folder that can be written, got .*/file/reports \(Not a directory\); choose another\n", capsys.readouterr().err)


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1.5"])
def test_bad_workers(folder, capsys, workers):
    with pytest.raises(SystemExit, match="2"):
        main(["toy.yaml", f"--workers={workers}"])
    assert f"argument --workers: must be an integer >= 1, got '{workers}'" in capsys.readouterr().err


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_failure_to_publication(folder, capfd):
    die = "import os, signal\nif x == 3: os.kill(os.getpid(), signal.SIGKILL)"
    file = write_run(folder, "grid: {x: [1, 2, 3]}\nworkers: 3", "assert x != 2, f'x must not be 2, got {x}'", die, MEASURE)
    write_notebook(folder / "toy_summary.ipynb", cell("s", "from pathlib import Path\nprint(sorted(p.parent.name for p in Path('..').glob('*/metrics.json')))"))
    run = folder / "reports" / "toy"

    assert main([file, "--publish"]) == 1
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        "kdnb_run: 3 failed; the same command tries again what is not finished",
        "toy/x=2: AssertionError: x must not be 2, got 2",
        "toy/x=3: DeadKernelError: the kernel died; it may have run out of memory",
        "toy: not published, because some of it failed",
    ]
    assert "toy · x=2: failed in" in out
    assert out.splitlines()[-1] == "toy: 4 executed, 0 already finished"
    assert states(run) == {"summary": "ok", "x=1": "ok", "x=2": "failed", "x=3": "failed"}
    assert sorted(p.name for p in (run / "x=1").iterdir()) == ["metrics.json", "notebook.ipynb", "report.html", "run.json", "status.json"]
    assert "AssertionError" in (run / "x=2" / "report.html").read_text()
    assert "['x=1']" in (run / "summary" / "notebook.ipynb").read_text()  # made although some cells failed
    assert (folder / "reports" / "index.html").is_file()
    assert str(folder) not in (run / "x=1" / "notebook.ipynb").read_text()

    # another grid: the finished cell is kept, cells that are no longer asked for are put away
    first = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (run / "x=1").iterdir()}
    (folder / "toy.yaml").write_text("notebook: toy.ipynb\ngrid: {x: [1, 5]}\nworkers: 2")
    assert main([file, "--publish"]) == 0
    out, err = capfd.readouterr()
    assert (err, out.splitlines()[-2:]) == ("", ["toy: 2 executed, 1 already finished", "read reports/index.html"])
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (run / "x=1").iterdir()} == first
    assert states(run) == {"summary": "ok", "x=1": "ok", "x=5": "ok"}
    assert sorted(p.name for p in (run / ".unused").iterdir()) == ["x=2", "x=3"]
    assert "['x=1', 'x=5']" in (run / "summary" / "notebook.ipynb").read_text()
    published = folder / "reports" / "published" / "toy"
    assert sorted(str(p.relative_to(published)) for p in published.rglob("*.*")) == [
        "summary/notebook.ipynb",
        *(f"x={x}/{name}" for x in (1, 5) for name in ("metrics.json", "notebook.ipynb", "run.json")),
    ]

    # all is finished: quick, silent, and a lost report is only drawn again
    begin = time.perf_counter()
    assert main([file, "--quiet"]) == 0
    assert time.perf_counter() - begin < 3
    assert capfd.readouterr() == ("", "")
    (run / "x=5" / "report.html").unlink()
    assert main([file]) == 0
    assert capfd.readouterr().out.splitlines()[0] == "toy: 0 executed, 3 already finished"
    assert (run / "x=5" / "report.html").is_file()

    # executing again leaves no difference
    (folder / "toy.yaml").write_text("notebook: toy.ipynb\ngrid: {x: [1]}")
    (folder / "toy_summary.ipynb").unlink()
    assert main([file, "--force", "--quiet"]) == 0
    for name in ("metrics.json", "notebook.ipynb"):
        assert (run / "x=1" / name).read_bytes() == first[run / "x=1" / name][0]
    assert (run / "x=1" / "status.json").stat().st_mtime_ns > first[run / "x=1" / "status.json"][1]


WAIT = """import time
from pathlib import Path
end = time.monotonic() + {seconds}
while not Path('../../../second').exists() and time.monotonic() < end: time.sleep(0.05)
print('met' if Path('../../../second').exists() else 'alone')"""


@pytest.mark.slow
@pytest.mark.parametrize(("resources", "seconds", "met"), [("", 60, "met"), ("\nresources: {cpus: 2}", 3, "alone")])
def test_the_next_run_begins_beside_a_summary_unless_it_needs_the_machine(folder, capfd, resources, seconds, met):
    first = write_run(folder, "", MEASURE, name="first")
    write_notebook(folder / "first_summary.ipynb", cell("s", WAIT.format(seconds=seconds)))
    second = write_run(folder, resources.strip(), "open('../../../second', 'w').close()", MEASURE, name="second")
    assert main([first, second, "--publish"]) == 0
    out = capfd.readouterr().out
    assert {"first: 2 executed, 0 already finished", "second: 1 executed, 0 already finished"} < set(out.splitlines())
    assert f'"{met}\\n"' in (folder / "reports" / "published" / "first" / "summary" / "notebook.ipynb").read_text()
    assert (folder / "reports" / "published" / "second" / "single" / "metrics.json").is_file()


@pytest.mark.slow
def test_two_commands_with_the_same_runs_in_another_order_both_end(folder):
    "Each holds the folder that the other waits for; whoever waits goes on with what it has."
    for name in ("a", "b"):
        write_run(folder, "", "import time\ntime.sleep(1)", MEASURE, name=name)
        write_notebook(folder / f"{name}_summary.ipynb", cell("s", "import time\ntime.sleep(2)"))
    both = [start("a.yaml", "b.yaml"), start("b.yaml", "a.yaml")]
    assert [p.communicate(timeout=90) and p.returncode for p in both] == [0, 0]
    for name in ("a", "b"):
        assert states(folder / "reports" / name) == {"single": "ok", "summary": "ok"}


@pytest.mark.slow
def test_ctrl_c_ends_all_runs(folder):
    "The first is at its summary, the second at its cell."
    first = write_run(folder, "", MEASURE, name="first")
    write_notebook(folder / "first_summary.ipynb", cell("s", "import time\ntime.sleep(300)"))
    second = write_run(folder, "", "open('../../../second', 'w').close()\nimport time\ntime.sleep(300)", name="second")
    command = start(first, second)
    wait_for((folder / "second").exists)
    family = descendants(command)
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=20) == 130
    assert "interrupted; the same command continues" in command.communicate()[1]
    assert not is_alive(family)
    assert states(folder / "reports" / "first") == {"single": "ok"}
    assert states(folder / "reports" / "second") == {}


@pytest.mark.slow
def test_an_axis_may_choose_the_notebook(folder, capfd):
    for name in ("01_a", "02_b"):
        write_notebook(folder / f"{name}.ipynb", cell("p", "x = 1", "parameters"), cell("c", f"print('{name}', x)"))
    write_notebook(folder / "end.ipynb", cell("p", "run = 'published'", "parameters"), cell("s", "from pathlib import Path\nprint(sorted(p.parent.name for p in Path(run).glob('*/status.json')))"))
    (folder / "all.yaml").write_text("notebook: '{method}.ipynb'\nsummary: end.ipynb\ngrid: {method: [01_a, 02_b]}\ncases: {02_b: {x: 5}}\nworkers: 2")
    assert main(["all.yaml", "--quiet"]) == 0
    run = folder / "reports" / "all"
    printed = {name: "".join("".join(o["text"]) for c in read_json(run / name / "notebook.ipynb")["cells"] for o in c["outputs"]) for name in states(run)}
    assert printed == {"method=01_a": "01_a 1\n", "method=02_b": "02_b 5\n", "summary": "['method=01_a', 'method=02_b']\n"}

    # a changed notebook runs its own cells only
    write_notebook(folder / "01_a.ipynb", cell("p", "x = 1", "parameters"), cell("c", "print('new', x)"))
    assert main(["all.yaml"]) == 0
    assert [line.split(":")[0] for line in capfd.readouterr().out.splitlines()][:2] == ["all · method=01_a", "all · summary"]


def test_a_cell_that_hangs_is_ended(folder, capfd):
    file = write_run(folder, "timeout_s: 1.5", "import subprocess, time\nsubprocess.run(['sleep', '98765'])")
    assert main([file, "--quiet"]) == 1
    assert capfd.readouterr().err.splitlines()[1:] == ["toy/single: TimeoutError: cell must end within timeout_s = 1.5 s"]
    assert list((folder / "reports").rglob("kernel-ipc-*")) == []
    assert states(folder / "reports" / "toy") == {"single": "failed"}
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "98765"]]


BUILD = """
import random
import time
from pathlib import Path
from kdnb.store import Run, artifact, read_json, write_json
def build(folder):
    rng = random.Random(0)
    write_json(folder / 'draws.json', [rng.gauss() for _ in range(20)])
run = Run({'x': x})
draws = read_json(artifact('draws', {'seed': 0}, build).path / 'draws.json')
"""
SLOW = "if Path('../../../slow').exists() and x == 2: time.sleep(100)"
WRITE = "run.write({'scaled': [x * d for d in draws]})"


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(folder, monkeypatch):
    "SIGKILL of kdnb_run in the middle of its second cell; the reference was never disturbed."
    file = write_run(folder, "grid: {x: [1, 2]}\nworkers: 2", BUILD, SLOW, WRITE)
    run = folder / "reports" / "toy"
    (folder / "slow").touch()
    victim = start(file)
    wait_for(lambda: (run / "x=1" / "status.json").exists() and list((folder / "store" / "draws").glob("*/manifest.json")))
    family = descendants(victim)
    assert any("ipykernel" in " ".join(p.cmdline()) for p in family)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not is_alive(family)  # nothing goes on without its parent
    assert states(run) == {"x=1": "ok"}

    (folder / "slow").unlink()
    kept = (run / "x=1" / "status.json").read_bytes()
    assert main([file, "--quiet"]) == 0
    assert (run / "x=1" / "status.json").read_bytes() == kept  # not run again
    monkeypatch.setenv("KDNB_STORE", str(folder / "another-store"))
    (folder / "toy.yaml").write_text("notebook: toy.ipynb\ngrid: {x: [2]}")
    assert main([file, "--quiet", "--out", "reference"]) == 0
    assert (run / "x=2" / "metrics.json").read_bytes() == (folder / "reference" / "toy" / "x=2" / "metrics.json").read_bytes()


def is_alive(processes, seconds=10):
    "Those that are still there after some time."
    return [p for p in psutil.wait_procs(processes, timeout=seconds)[1] if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_display_ctrl_c_and_two_runs_of_one_file(folder, capfd):
    "The first run shows its stages in a terminal and is interrupted; the second waits for its turn and does the work."
    fit = "import time\nfrom pathlib import Path\nfrom kdnb.progress import track\nfor _ in track(range(1000) if Path('../../../slow').exists() else [0], desc='fitting'): time.sleep(0.1)"
    file = write_run(folder, "", "open('../../../diary', 'a').write(f'{x}\\n')", fit)
    (folder / "slow").touch()
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 160))
    first = subprocess.Popen([*COMMAND, file], stdout=subprocess.PIPE, stderr=there, text=True)
    os.close(there)
    shown = ""
    while not re.search(r"toy: +0%.* 0/1 .*single fitting \d+% 0\d:\d\d left", shown):
        shown += os.read(here, 10_000).decode()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(grid.run_grid, load_run(file), quiet=True)
        waiting = ""
        while not waiting:
            waiting = capfd.readouterr().err
        assert waiting == "toy: another kdnb_run is working on it; waiting\n"
        family = descendants(first)
        first.send_signal(signal.SIGINT)
        while "kdnb_run: interrupted; the same command continues" not in shown:
            shown += os.read(here, 10_000).decode()
        (folder / "slow").unlink()
        assert first.wait(timeout=20) == 130
        first.communicate()
        os.close(here)
        assert not is_alive(family)
        assert second.result(timeout=60)["single"]["ran"]
    assert states(folder / "reports" / "toy") == {"single": "ok"}
    assert (folder / "diary").read_text() == "1\n1\n"  # interrupted once, then to the end


# --- reports again ------------------------------------------------------------------------------


def executed(folder, *names):
    "Runs as they lie on disk, without reports."
    for name in names:
        (folder / "reports" / name).mkdir(parents=True)
        write_notebook(folder / "reports" / name / "notebook.ipynb", cell("t", "# Title", kind="markdown"))


def test_reports_are_drawn_again(folder, capsys):
    executed(folder, "a/x=1", "a/summary", "b/single", ".trash/x=1", "a/.unused/x=2")
    assert grid.report_main([]) == 0
    assert capsys.readouterr() == ("3 reports; read reports/index.html\n", "")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.html")) == ["reports/a/summary/report.html", "reports/a/x=1/report.html", "reports/b/single/report.html", "reports/index.html"]
    assert "<title>a · x=1</title>" in (folder / "reports/a/x=1/report.html").read_text()


def test_reports_of_one_run_and_of_one_cell(folder, capsys):
    executed(folder, "a/x=1", "a/x=2", "b/single")
    assert grid.report_main(["reports/a/x=1", "--quiet"]) == 0
    assert sorted(p.parent.name for p in folder.rglob("report.html")) == ["x=1"]
    assert grid.report_main(["reports/a", "reports/b/single", "-q"]) == 0
    assert sorted(p.parent.name for p in folder.rglob("report.html")) == ["single", "x=1", "x=2"]
    assert capsys.readouterr() == ("", "")


def test_a_report_that_fails_is_listed_and_the_others_are_made(folder, capsys):
    executed(folder, "a/x=1", "a/x=2")
    (folder / "reports/a/x=1/notebook.ipynb").write_text("{}")
    assert grid.report_main(["-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"a/x=1: report not made: \w+: .*\n", err)
    assert (folder / "reports/a/x=2/report.html").is_file()


def test_nothing_to_report(folder, capsys):
    assert grid.report_main([]) == 2
    assert capsys.readouterr().err == "kdnb_report: folder must hold executed notebooks, got none in reports; kdnb_run makes them\n"
