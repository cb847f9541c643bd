"""README: links and pictures that work from the root. Site: complete, offline, and nothing injected; seen in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import nbformat
import pandas as pd
import pytest
from browser import check_page, faint, open_page, served_folder, telephone, wait
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kdnb import charts, site

ROOT = Path(__file__).parent.parent

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
    assert site.main(["readme", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (project / "README.md").exists()


def test_outside_a_project():
    with pytest.raises(ValueError, match=r"start must be inside the project, got /; there is no settings\.ini in it or above it"):
        site.project_root("/")
    assert site.project_root(Path(__file__).parent) == Path(__file__).parent.parent


@pytest.mark.parametrize(("link", "moved"), [
    ("[a](b.ipynb)", "[a](nbs/b.ipynb)"), ("[a](../b)", "[a](b)"), ("[a](.)", "[a](nbs)"), ("[a](#b)", "[a](#b)"), ("[a](mailto:x@y)", "[a](mailto:x@y)"),
    ("[a](/b)", "[a](/b)"), ('![a](b.png "t")', '![a](nbs/b.png "t")'), ("f(x)[0](b)", "f(x)[0](nbs/b)"), ("no link", "no link"),
])
def test_links(link, moved):
    assert site.from_root(link) == moved


# The site of a small project, with what a hostile model might have written

ATTACKS = ("<script>window.hit=1</script>", "<img src=x onerror=window.hit=1>", "<svg onload=window.hit=1></svg>", "<a href='javascript:window.hit=1'>a</a>", "<link rel=stylesheet href=http://example.org/x.css>",
           r"\(\href{javascript:window.hit=1}{a}\) $$x$$ [b](javascript:window.hit=1)", "```\n:::\n```{=html}\n<script>window.hit=1</script>\n```", "</code></pre><script>window.hit=1</script>")
HOSTILE = "\n\n".join(ATTACKS)


def small_chart(text):
    frame = pd.DataFrame({"x": [1.0, 2.0], "series": text, "mean": [0.0, 1.0], "lo": [0.0, 0.5], "hi": [0.5, 1.5]})
    data, metadata = charts.render(charts.curves(frame, "x", "x", "y", "T", text).to_dict())
    return new_output("display_data", data, metadata=metadata)


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells), metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)


@pytest.fixture
def small(tmp_path):
    "A project with one module, one published run and a log."
    for name in ("settings.ini", "nbs/_quarto.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "kdnb").mkdir()
    (tmp_path / "kdnb" / "core.py").write_text('"What one is."\n\n\ndef one(\n    n: int,  # how often\n) -> int:    # always 1\n    "The number one."\n    return 1\n')
    (tmp_path / "LOG.md").write_text("# Lab log\n\nSee [core](nbs/00_core.ipynb#one-code).\n")
    write_notebook(tmp_path / "nbs" / "index.ipynb", new_markdown_cell("# kdnb\n\n> A promise."), new_markdown_cell("[core](00_core.ipynb) [log](../LOG.md) [folder](../kdnb)"))
    write_notebook(tmp_path / "nbs" / "00_core.ipynb", new_code_cell("#| default_exp core"), new_markdown_cell("# Core\n\n> What one is."), new_code_cell("#| export\nimport os"),
                   new_markdown_cell("## One\n\n$$x^2$$ {#eq-x}\n\nand $x$."), new_code_cell('#| export\ndef one(\n    n: int,  # how often\n) -> int:    # always 1\n    "The number one."\n    return 1'),
                   new_code_cell("#| hide\nsecret = 1"), new_code_cell("one()", outputs=[new_output("execute_result", {"text/plain": "1"})]))
    outputs = [*(new_output("display_data", {kind: HOSTILE}) for kind in ("text/html", "text/markdown", "text/plain", "text/latex")), new_output("stream", name="stdout", text=HOSTILE), small_chart(HOSTILE),
               new_output("display_data", {"image/svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg'>{ATTACKS[0]}</svg>", "text/plain": HOSTILE})]
    write_notebook(tmp_path / "reports" / "published" / "gmm" / "beta=5" / "notebook.ipynb", new_markdown_cell("# A run"), new_code_cell("run()", outputs=outputs))
    write_notebook(tmp_path / "reports" / "published" / "gmm" / "beta=50" / "notebook.ipynb", new_markdown_cell("# A run"), new_code_cell("run()", outputs=[new_output("error", ename="E", evalue=HOSTILE, traceback=[HOSTILE])]))
    (tmp_path / "reports" / "published" / "gmm" / "beta=5" / "metrics.json").write_text(json.dumps({"parameters": {"beta": 5}, "headline": [{"label": f"precision {HOSTILE}", "value": -1.5}, {"label": "text", "value": HOSTILE}]}))
    return tmp_path


def test_a_small_site(small):
    out, count = site.build_site(small)
    names = {p.relative_to(out).as_posix() for p in out.rglob("*.html")}
    assert names == {"index.html", "core.html", "library/index.html", "library/core.html", "experiments/index.html", "experiments/gmm/beta=5.html", "experiments/gmm/beta=50.html", "log.html"}
    assert count == len(names)
    index, core, reference = ((out / n).read_text() for n in ("index.html", "core.html", "library/core.html"))
    for link in ('href="core.html"', 'href="log.html"', 'href="https://github.com/kdnb/kdnb/tree/main/kdnb"'):
        assert link in index
    assert 'id="one"' in core
    assert "Imports" in core
    assert "always 1" in core
    assert "secret" not in core
    assert "eq-x" not in core
    assert "Neighbours" not in index
    assert "../core.html#one" in reference
    assert "how often" in reference
    assert "return 1" not in reference
    assert "cdn.jsdelivr.net" not in core
    assert 'href="core.html#one-code"' in (out / "log.html").read_text()
    assert not (out / "search.json").exists()


def test_neighbours_join_by_themselves(small):
    write_notebook(small / "nbs" / "neighbours" / "index.ipynb", new_markdown_cell("# Neighbours\n\n> Related."), new_markdown_cell("[core](../00_core.ipynb) [next](01_okd.ipynb)"))
    write_notebook(small / "nbs" / "neighbours" / "01_okd.ipynb", new_code_cell("#| default_exp neighbours.okd"), new_markdown_cell("# Online\n\n> Together."), new_markdown_cell("[all](index.ipynb)"))
    out, _ = site.build_site(small)
    index, page = (out / "neighbours" / "index.html").read_text(), (out / "neighbours" / "okd.html").read_text()
    assert 'href="../core.html"' in index
    assert 'href="okd.html"' in index
    menu = re.findall(r'menu-text">([^<]*)', index)
    assert menu.index("Neighbours", menu.index("Log")) < menu.index("Online")  # the overview comes first
    assert 'href="neighbours/index.html"' in (out / "index.html").read_text()
    assert re.search(r'pagination-link"[^>]*>.*?Neighbours', page)


def test_neighbours_without_an_overview(small):
    write_notebook(small / "nbs" / "neighbours" / "01_okd.ipynb", new_markdown_cell("# Online\n\n> Together."), new_markdown_cell("[core](../00_core.ipynb)"))
    out, _ = site.build_site(small)
    assert re.search(r'href="neighbours/okd.html"[^>]*>\s*<span class="menu-text">Neighbours', (out / "index.html").read_text())


def test_what_a_model_wrote_stays_text(small, driver):
    out, _ = site.build_site(small)
    for page in ("experiments/gmm/beta=5.html", "experiments/gmm/beta=50.html", "experiments/index.html"):
        text = (out / page).read_text()
        assert text.count("<script") == text.count("</script>")
        assert len(re.findall(r"<script(?! type=\"application/json\"| src=\"\.\.)", text)) == 1  # smalldocs' own, which the policy names
        errors, requests = open_page(driver, (out / page).as_uri())
        assert (errors, requests) == ([], [])
        assert driver.execute_script("return window.hit") is None
        assert driver.execute_script("return document.querySelectorAll('main .katex, main [onload], main [onerror], main a[href^=javascript], main iframe').length") == 0
        assert "window.hit=1" in text


@pytest.mark.parametrize(("written", "message"), [
    ("[x](nowhere.ipynb)", "the site must build without warnings, got: core.ipynb: broken link nowhere.ipynb"),
    ("[x](#nowhere)", "the site must have no dead ends, got: core.html: #nowhere leads to no such part"),
    ('<img src="https://example.org/x.png" alt="x">', "the site must have no dead ends, got: core.html: loads https://example.org/x.png from another place"),
    ('<img src="favicon.svg">', "the site must have no dead ends, got: core.html: an image without alternative text: favicon.svg"),
])
def test_a_bad_page_stops_the_build(small, written, message, monkeypatch, capsys):
    core = nbformat.read(small / "nbs" / "00_core.ipynb", 4)
    core.cells.append(new_markdown_cell(written))
    nbformat.write(core, small / "nbs" / "00_core.ipynb")
    monkeypatch.chdir(small)
    assert site.main(["build"]) == 1
    assert capsys.readouterr().err == f"kdnb_site: SiteError: {message}\n"
    assert not (small / "_site").exists()


def test_a_folder_that_is_no_site_is_left_alone(small, monkeypatch, capsys):
    (small / "other").mkdir()
    (small / "other" / "mine.txt").write_text("mine")
    monkeypatch.chdir(small)
    assert site.main(["build", "--out", "other"]) == 2
    assert capsys.readouterr().err == f"kdnb_site: out must be an empty folder or a site built before, got {small / 'other'}\n"
    assert (small / "other" / "mine.txt").read_text() == "mine"


def test_every_notebook_is_in_the_menu():
    menu = set(re.findall(r"[\w/]+\.ipynb", (ROOT / "nbs" / "_quarto.yml").read_text()))
    books = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").glob("*.ipynb")}
    assert books - menu == set()


def test_every_colour_of_a_chart_has_one_for_the_dark():
    assert site.dark_colours().keys() >= {charts.INK, charts.MUTED, charts.GRID, *charts.ROLES.values(), *charts.OTHERS}


# The project's own site, in a browser

@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The site, built once by its command, also for parallel workers."
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "site.lock"):
        if not (base / "site").exists():
            done = subprocess.run([sys.executable, "-c", "import sys; from kdnb.site import main; sys.exit(main(sys.argv[1:]))", "build", "--out", str(base / "site")], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert re.fullmatch(r"\S*index\.html: \d+ pages\n", done.stdout)
    return base / "site"


@pytest.fixture(scope="session")
def served(built):
    "Its address on a local server."
    with served_folder(built) as address:
        yield f"{address}/"


FOLDERS = ("", "library", "neighbours", "experiments")
KINDS = ("index.html", "core.html", "library/index.html", "library/core.html", "experiments/index.html", "experiments/gmm/summary.html", "log.html")


def expected(page):
    "How many charts and formulas a page must show, from its text."
    text = page.read_text()
    return {"charts": text.count('<figure class="chart"'), "formulas": len(re.findall(r'<span class="math (?:inline|display)"', text))}


def test_the_site_is_not_empty(built):
    pages = list(built.rglob("*.html"))
    shown = [expected(page) for page in pages]
    assert len(pages) > 40
    assert sum(s["charts"] for s in shown) > 20
    assert sum(s["formulas"] for s in shown) > 200
    assert {p.relative_to(built).parts[0] for p in pages if p.parent != built} == set(FOLDERS) - {""}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_page_from_a_server(built, served, driver, folder):
    pages = sorted(p.relative_to(built).as_posix() for p in (built / folder).glob("**/*.html" if folder else "*.html"))
    for page in pages:
        check_page(driver, served + quote(page), **expected(built / page), base=served)
        said = driver.execute_script("return [...document.querySelectorAll('figure.chart')].map((e) => [e.querySelector('[role=graphics-document]').getAttribute('aria-label'), e.dataset.said])")
        assert all(label == text and len(text) > 20 for label, text in said), page  # a chart says in words what it shows, also when it is drawn


@pytest.mark.parametrize("page", KINDS)
def test_page_kinds_from_disk(built, driver, page):
    check_page(driver, (built / page).as_uri(), **expected(built / page))


@pytest.mark.parametrize("start", ["disk", "server"])
def test_search_and_navigation(built, served, driver, start):
    base = served if start == "server" else f"{built.as_uri()}/"
    errors, requests = open_page(driver, base + "index.html", base)
    assert (errors, requests) == ([], [])
    field = driver.find_element("css selector", ".smalldocs-search input")
    field.send_keys("moment_match")
    hits = wait(driver, "const a = [...document.querySelectorAll('a.search-result')]; return a.length && a.map((x) => x.href)")
    assert any("exact.html#moment_match" in h for h in hits)
    driver.get(next(h for h in hits if "exact.html#moment_match" in h))
    assert wait(driver, "const e = document.getElementById(location.hash.slice(1)); return e && e.getBoundingClientRect().top >= 0 && e.getBoundingClientRect().top < innerHeight")
    driver.get(base + "core.html")
    driver.execute_script("document.querySelector('.nav-page-next a').click()")
    assert wait(driver, "return document.title").startswith("Mixtures")
    driver.find_element("link text", "Library").click()
    assert wait(driver, "return document.title").startswith("Library")
    assert driver.execute_script("return document.querySelectorAll('#TOC a').length") > 10
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []


def test_a_slider_changes_the_picture(built, driver):
    open_page(driver, (built / "experiments" / "gmm" / "summary.html").as_uri())
    driver.execute_script("window.slider = document.querySelector('figure.chart input[type=range]'); window.picture = slider.closest('figure')")
    before = driver.execute_script("return picture.querySelector('svg').outerHTML")
    driver.execute_script("slider.value = slider.max; slider.dispatchEvent(new Event('input', {bubbles: true}))")
    assert wait(driver, "return picture.querySelector('svg').outerHTML !== arguments[0]", before)


def test_a_tooltip_appears(built, driver):
    from selenium.webdriver import ActionChains

    open_page(driver, (built / "index.html").as_uri())
    driver.execute_script("document.querySelector('figure.chart').scrollIntoView({block: 'center'})")
    point = driver.find_elements("css selector", "figure.chart svg .mark-symbol path")[0]
    ActionChains(driver).move_to_element(point).perform()
    assert "precision" in wait(driver, "const t = document.querySelector('#vg-tooltip-element.visible'); return t && t.textContent")


@pytest.mark.parametrize("page", KINDS)
def test_readable_in_light_and_dark(built, driver, page):
    open_page(driver, (built / page).as_uri())
    ink = "return getComputedStyle(document.querySelector('figure.chart svg text') || document.body).fill"
    grounds, inks = [], []
    for _ in range(2):
        grounds.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        inks.append(driver.execute_script(ink))
        assert faint(driver) == []
        before = driver.execute_script("return document.documentElement.classList.contains('quarto-dark')")
        driver.execute_script("document.querySelector('.quarto-color-scheme-toggle').click()")
        wait(driver, "return document.documentElement.classList.contains('quarto-dark') !== arguments[0]", before)
        wait(driver, "const now = document.documentElement.classList.contains('quarto-dark') ? 'dark' : 'light'; return [...document.querySelectorAll('figure.chart')].every((f) => f.dataset.shown === now) && document.getAnimations().length === 0")
    assert grounds[0] != grounds[1]
    if expected(built / page)["charts"]:
        assert inks[0] != inks[1]
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []


@pytest.mark.parametrize("page", KINDS)
def test_at_the_width_of_a_telephone(built, driver, page):
    with telephone(driver):
        check_page(driver, (built / page).as_uri(), **expected(built / page))
        assert driver.execute_script("return document.documentElement.clientWidth") == 390
        driver.execute_script("document.querySelector('.quarto-btn-toggle').click()")
        assert wait(driver, "return document.querySelector('#quarto-sidebar').getBoundingClientRect().width > 100")


def test_without_the_chart_library_the_checks_fail(built, driver, tmp_path):
    broken = shutil.copytree(built, tmp_path / "site")
    (broken / "site_libs" / "vega.js").unlink()
    assert "index.html: site_libs/vega.js leads nowhere" in site.site_problems(broken)
    with pytest.raises(AssertionError, match="console errors"):
        check_page(driver, (broken / "index.html").as_uri(), **expected(broken / "index.html"))


def test_the_policy_stops_what_the_check_might_miss(built, driver, tmp_path):
    broken = shutil.copytree(built, tmp_path / "site")
    page = broken / "log.html"
    page.write_text(page.read_text().replace("</body>", "<script>window.hit=1</script><img src=http://127.0.0.1:9/x.png alt=x></body>"))
    errors, _ = open_page(driver, page.as_uri())
    assert len(errors) == 2
    assert all("Content Security Policy" in e for e in errors)
    assert driver.execute_script("return window.hit") is None
