"""README: what index.ipynb gives, with links and pictures that work from the root."""

from base64 import b64encode
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kdnb import site

PICTURE = b"\x89PNG first"


@pytest.fixture
def project(tmp_path):
    "A project with an index of every kind of cell."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    chart = new_output("display_data", {"application/vnd.vegalite.v5+json": {}, "image/png": b64encode(PICTURE).decode(), "text/plain": "Precision [nats]\nagainst recall"})
    table = new_output("display_data", {"text/html": "<table></table>", "text/markdown": "| a |\n|---|\n| 1 |", "text/plain": "a 1"})
    cells = [
        new_markdown_cell("# Title\n\n[core](00_core.ipynb#x) [log](../LOG.md) [paper](https://arxiv.org) ![p](images/p.png) [here](#title)"),
        new_code_cell("#| hide\nsecret = 1", outputs=[new_output("stream", name="stdout", text="hidden")]),
        new_code_cell("#| echo: false\nunseen()", id="chart", outputs=[chart, chart]),
        new_code_cell("#| export\nseen()", id="table", outputs=[table]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs" / "index.ipynb")
    return tmp_path


def test_readme(project):
    old = project / "nbs" / "images" / "index-gone.png"
    old.parent.mkdir()
    old.write_bytes(b"")
    made = site.make_readme(project).read_text()
    assert "[core](nbs/00_core.ipynb#x) [log](LOG.md) [paper](https://arxiv.org) ![p](nbs/images/p.png) [here](#title)" in made
    assert r"![Precision \[nats\] against recall](nbs/images/index-chart.png)" in made
    assert "index-chart-1.png" in made
    assert (project / "nbs" / "images" / "index-chart.png").read_bytes() == PICTURE
    assert not old.exists()
    assert "| a |" in made
    assert "seen()" in made
    for absent in ("hidden", "secret", "unseen", "#|", "<table"):
        assert absent not in made
    assert site.make_readme(project).read_text() == made


def test_the_notebook_is_not_touched(project):
    before = (project / "nbs" / "index.ipynb").read_bytes()
    site.readme_parts(project)
    assert (project / "nbs" / "index.ipynb").read_bytes() == before


def test_command_works_from_any_folder_of_the_project(project, monkeypatch, capsys):
    monkeypatch.chdir(project / "nbs")
    assert site.main(["readme"]) == 0
    assert capsys.readouterr().out == "README.md\n"
    assert (project / "README.md").exists()


def test_outside_a_project():
    with pytest.raises(FileNotFoundError, match=r"start must be inside the project, got /; there is no settings\.ini in it or above it"):
        site.project_root("/")
    assert site.project_root(Path(__file__).parent) == Path(__file__).parent.parent


@pytest.mark.parametrize(("link", "moved"), [
    ("[a](b.ipynb)", "[a](nbs/b.ipynb)"), ("[a](../b)", "[a](b)"), ("[a](.)", "[a](nbs)"), ("[a](#b)", "[a](#b)"), ("[a](mailto:x@y)", "[a](mailto:x@y)"),
    ("[a](/b)", "[a](/b)"), ('![a](b.png "t")', '![a](nbs/b.png "t")'), ("f(x)[0](b)", "f(x)[0](nbs/b)"), ("no link", "no link"),
])
def test_links(link, moved):
    assert site.from_root(link) == moved
