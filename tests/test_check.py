"""kdnb_check: a project in order passes, and each thing out of step is one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdnb import check, site

ROOT = Path(__file__).parent.parent


def cell(source, kind="code", outputs=(), **more):
    made = {"cell_type": kind, "id": f"c{abs(hash(source)) % 10**7}", "metadata": {}, "source": source.splitlines(True), **more}
    return made | ({"execution_count": None, "outputs": list(outputs)} if kind == "code" else {})


def write_notebook(path, cells, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    notebook = {"cells": cells, "metadata": kernel | metadata, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


STREAM = {"name": "stdout", "output_type": "stream", "text": ["1\n"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A small nbdev project in order."
    root = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "pyproject.toml", "setup.py"):
        shutil.copyfile(ROOT / name, root / name)
    (root / "kdnb").mkdir()
    shutil.copyfile(ROOT / "kdnb" / "__init__.py", root / "kdnb" / "__init__.py")
    write_notebook(root / "nbs" / "index.ipynb", [cell("# Title", "markdown")])
    write_notebook(root / "nbs" / "00_core.ipynb", [cell("#| default_exp core"), cell("#| export\ndef one():\n    return 1"), cell("print(1)", outputs=[STREAM])])
    write_notebook(root / "nbs" / "experiments" / "gmm.ipynb", [cell("print(2)")])
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=root, check=True, capture_output=True)
    site.make_readme(root)
    return root


@pytest.fixture
def project(made, tmp_path):
    return shutil.copytree(made, tmp_path / "project")


def state(root):
    return {p.relative_to(root): (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def test_a_project_in_order_passes_untouched(project, capsys, monkeypatch):
    before = state(project)
    monkeypatch.chdir(project / "nbs")
    assert check.main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split(" (")[0] for line in printed.out.splitlines()] == ["notebooks and library: ok", "lint: ok", "readme: ok", "outputs: ok", "traces: ok", "numbers: ok", "links: ok"]
    assert state(project) == before


def test_each_fault_is_one_line(project, capsys):
    home = os.sep + "home/ann/run.py"
    write_notebook(project / "nbs" / "01_new.ipynb", [cell("#| default_exp new"), cell("#| export\ndef two():\n    return 2"), cell("print(two())")])  # not exported, no output
    write_notebook(project / "nbs" / "02_dirty.ipynb", [cell(f"x = 1  # {home}", metadata={"collapsed": True})], toc={})
    write_notebook(project / "nbs" / "03_lint.ipynb", [cell("import os")])
    (project / "kdnb" / "gone.py").write_text("")
    (project / "kdnb" / "core.py").write_text((project / "kdnb" / "core.py").read_text() + "# by hand\n")
    (project / "README.md").write_text("old")
    (project / "nbs" / "images").mkdir()
    (project / "nbs" / "images" / "index-old.png").write_bytes(b"")
    published = project / "reports" / "published" / "gmm" / "beta=1"
    published.mkdir(parents=True)
    (published / "metrics.json").write_text(json.dumps({"parameters": {"out": os.sep + "tmp/run1"}}))
    before = state(project)
    assert check.main([str(project), "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sorted(printed.err.splitlines()) == sorted([
        "nbs/02_dirty.ipynb: is not clean; run nbdev_clean",
        "kdnb/_modidx.py: is not what the notebooks export; run nbdev_export",
        "kdnb/core.py: is not what the notebooks export; run nbdev_export",
        "kdnb/gone.py: comes from no notebook; delete it",
        "kdnb/new.py: is not what the notebooks export; run nbdev_export",
        "nbs/03_lint.ipynb:cell 1:1:8: F401 [*] `os` imported but unused",
        "README.md: is not what nbs/index.ipynb gives; run kdnb_site readme",
        "nbs/images/index-old.png: is not what nbs/index.ipynb gives; run kdnb_site readme",
        "nbs/01_new.ipynb: cells without their output: 2; run the notebook",
        f"nbs/02_dirty.ipynb: contains {home}",
        f"reports/published/gmm/beta=1/metrics.json: contains {os.sep}tmp/run1",
    ])
    assert state(project) == before


def test_notebooks_that_nbdev_cannot_read(project):
    (project / "nbs" / "04_broken.ipynb").write_text("{")
    found = check.rewritten(project)
    assert len(found) == 1
    assert found[0].startswith("nbs: nbdev cannot export the notebooks: ")


@pytest.mark.parametrize(("source", "expected"), [
    ("x", True), ("x, y", True), ("f'{x}'", True), ("for i in x:\n    print(i)", False), ("print(1)\nx = 2", True), ("x;", False), ("f(x)", False), ("x = 1", False), ("'docs'", False),
    ("#| hide\nx", False), ("#| export\nx", False), ("#| eval: false\nx", False), ("%time x", False), ("assert x", False), ("is this python?", False), ("", False), ("[f(i) for i in x]", True),
])
def test_which_cells_show_something(source, expected):
    assert check.shows(source) is expected


@pytest.mark.parametrize(("text", "found"), [
    (os.sep + "home/ann/x.py", True), ("File \"" + os.sep + "root/x\"", True), (os.sep + "tmp/abc", True), ("C:" + "\\Users\\ann", True), (os.sep + "Users/ann", True),
    ("https://x.org/home/ann", False), ("a/tmp/b", False), ("../tmp/b", False), ("on " + os.sep + "tmp", False), ("data:image/png;base64,AAAA" + os.sep + "tmp/a", False),
    ("<X object at 0" + "x7f5d2ee15190>", True), ("<X object at 0>", False),
])
def test_what_is_a_trace_of_a_machine(tmp_path, text, found):
    write_notebook(tmp_path / "nbs" / "a.ipynb", [cell("x = 1", outputs=[{"output_type": "display_data", "metadata": {}, "data": {"text/plain": [text], "image/png": os.sep + "tmp/x"}}])])
    assert bool(check.machine_traces(tmp_path)) is found


def test_the_root_itself_is_private(tmp_path):
    (tmp_path / "reports" / "published").mkdir(parents=True)
    (tmp_path / "reports" / "published" / "index.md").write_text(f"see {tmp_path}/reports")
    assert len(check.machine_traces(tmp_path)) == 1


def test_stale_numbers(project, capsys):
    write_notebook(project / "nbs" / "index.ipynb", [cell("# Title", "markdown"), cell("print(1)", outputs=[STREAM]), cell("print(1)\nprint(2)", outputs=[STREAM])])
    assert check.stale_outputs(project) == ["nbs/index.ipynb: running it gives other outputs in cells 2; run the notebook"]
    write_notebook(project / "nbs" / "05_fails.ipynb", [cell("1 / 0")])
    assert check.stale_outputs(project, [project / "nbs" / "05_fails.ipynb"]) == ["nbs/05_fails.ipynb: cannot be run: ZeroDivisionError: division by zero"]
    assert "nbs/05_fails.ipynb: cannot be run: ZeroDivisionError: division by zero" in check.problems(project, quiet=True, run=True)
    assert capsys.readouterr() == ("", "")


def test_dead_links(project):
    (project / "CONTRIBUTING.md").write_text("# A heading, here\n\n[a](#a-heading-here) [b](nbs/00_core.ipynb) [c](https://x.org) [d](gone.md) `[e](gone.md)`\n\n```\n[f](gone.md)\n```\n")
    write_notebook(project / "nbs" / "experiments" / "links.ipynb", [cell("[a](../../CONTRIBUTING.md#a-heading-here) [b](../../CONTRIBUTING.md#gone) [c](..)", "markdown"), cell("x = '[d](gone)'")])
    (project / "_site").mkdir()
    (project / "_site" / "index.html").write_text('<img src="x.png" alt="x">')
    assert check.dead_links(project) == [
        "CONTRIBUTING.md: the link gone.md leads nowhere",
        "nbs/experiments/links.ipynb: the link ../../CONTRIBUTING.md#gone leads to no heading",
        "_site/index.html: x.png leads nowhere",
    ]
