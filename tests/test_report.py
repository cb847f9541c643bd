"""Reports: one file, answers first, nothing out, nothing injected."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from browser import check_page, open_page, served_folder, telephone
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.support.ui import WebDriverWait

from kdnb import charts, report
from kdnb.core import Estimate
from kdnb.store import write_json

ATTACKS = (
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "</script><script>window.hit=1</script>",
    "<svg onload=window.hit=1><script>window.hit=1</script></svg>",
    "<a href='javascript:window.hit=1'>a</a><iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<style>@import url(http://example.org/x.css); body{display:none}</style>",
    "<link rel=stylesheet href=http://example.org/x.css><img src=http://example.org/x.png>",
    "<div style='background:url(http://example.org/y.png);position:fixed'>d</div>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.hit=1&gt;'>",
    "\x1b]0;title\x07\x1b[2J<b>\x1b[31mred</b>",
)
HOSTILE = " ".join(ATTACKS)


def chart_output(text="a"):
    xs = np.linspace(-1, 1, 11)
    chart = charts.density_maps({f"truth {text}": (xs, xs, np.exp(-(xs**2 + xs[:, None] ** 2)))}, f"T {text}", text)
    data, metadata = charts.render(chart.to_dict())
    return new_output("display_data", data, metadata=metadata)


def linked_output(text="a"):
    points = pd.DataFrame([{"student": f"{text} τ = {t}", "series": text, **{f"{part}{end}": -t + d for part in ("recall", "precision") for end, d in (("", 0), ("_lo", -0.1), ("_hi", 0.1))}} for t in (1, 2, 3)])
    texts = pd.DataFrame([{"student": s, "text": f"{text} written by {s}"} for s in points["student"]])
    lines = pd.DataFrame([{"student": s, "series": "student", "x": x, "y": x * len(s) + i} for i, s in enumerate(points["student"]) for x in range(3)])
    data, metadata = charts.render(charts.linked(points, texts, lines, title=text).to_dict())
    return new_output("display_data", data, metadata=metadata)


def slider_output():
    xs = np.linspace(-1, 1, 5)
    steps = {b: {"teacher": (xs, xs, np.exp(-b * (xs**2 + xs[:, None] ** 2)))} for b in (1.0, 10.0)}
    curve = pd.DataFrame({"knob": [1.0, 10.0], "series": "precision", "value": [-2.0, -1.0]})
    data, metadata = charts.render(charts.density_slider(steps, curve, "β", "T", "S").to_dict())
    return new_output("display_data", data, metadata=metadata)


def line_output(text="a"):
    frame = pd.DataFrame({"x": [1.0, 2.0], "series": text, "mean": [0.0, 1.0], "lo": [0.0, 0.5], "hi": [0.5, 1.5]})
    data, metadata = charts.render(charts.curves(frame, "x", "x", "y", "T", text).to_dict())
    return new_output("display_data", data, metadata=metadata)


class Tags(HTMLParser):
    "Addresses and attributes of a page, read by another parser than the one that made it."

    def __init__(self, page):
        super().__init__()
        self.addresses, self.attributes, self.names = [], set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("src", "href", "action", "srcdoc", "data", "poster", "background") and not re.match(r"#|data:(image/png;base64,[\w+/=]*|image/svg\+xml;base64,[\w+/=]*|,)$", value):
                self.addresses.append(value)


def save(folder, cells, metrics=None, run=None, **metadata):
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / "notebook.ipynb")
    if metrics is not None:
        write_json(folder / "metrics.json", metrics)
    if run is not None:
        write_json(folder / "run.json", run)
    return report.render(folder / "notebook.ipynb", folder / "report.html")


METRICS = {
    "parameters": {"beta": 100.0, "n_seeds": 64},
    "headline": [{"label": "recall, nats", "estimate": Estimate(-42.2, 4.4, -51.4, -33.0, 64)}, {"label": "claim", "value": "held"}],
    "claims": [{"claim": c, "verdict": v} for c, v in (("a", "held"), ("b", "held"), ("c", "did not hold"))],
    "seeds": [0, 1, 2], "device": "cpu (x86_64)", "versions": {"torch": "2.13.0"},
}
RUN = {"commit": "0123456789abcdef", "started": "2026-01-02T03:04:05+00:00", "wall_s": {"fit": 1.0, "total": 83.2}, "peak_memory_mb": 812, "cores": 2}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A report with two charts and three formulas, and its neighbours."
    reports = tmp_path_factory.mktemp("disk") / "reports"
    cells = [
        new_markdown_cell("# What is asked?\n\nOf $p^*$ and\n\n$$\\alpha_k = \\frac{1}{k}$$\n\n| a | b |\n|---|---|\n| $\\beta < 2$ & more | `$x$` |"),
        new_code_cell("beta = 100.0", metadata={"tags": ["parameters"]}),
        new_code_cell("show()", outputs=[chart_output(), line_output(), charts_table(), new_output("stream", name="stdout", text="50%\r100%\nit costs $5 and $6\n")]),
    ]
    papermill = {"parameters": {"beta": 100.0, "prompt": "it's"}, "input_path": "/somewhere/nbs/experiments/gmm.ipynb"}
    save(reports / "gmm" / "beta=100", cells, METRICS, RUN, papermill=papermill)
    save(reports / "gmm" / "beta=20", cells[:2], {**METRICS, "parameters": {"beta": 20.0, "n_seeds": 64}, "headline": [{"label": "recall, nats", "estimate": Estimate(-math.inf, math.inf, -math.inf, math.inf, 9)}]}, RUN)
    save(reports / "gmm" / "beta=3", [*cells[:2], failed_cell()], None, None)
    save(reports / "gmm" / "summary", cells[:2], {**METRICS, "headline": [*METRICS["headline"], {"label": "finding", "value": "more precise from β = 20 on"}]}, RUN)
    (reports / "gmm" / "beta=7").mkdir()
    report.index(reports)
    report.render(save_notebook(reports / "play", [new_markdown_cell("# Play"), new_code_cell("", outputs=[slider_output(), linked_output("it")])]), reports / "play.html")
    return reports


def save_notebook(folder, cells):
    folder.mkdir()
    nbformat.write(new_notebook(cells=cells), folder / "notebook.ipynb")
    return folder / "notebook.ipynb"


def charts_table():
    made = charts.samples_table(pd.DataFrame({"who": ["truth"], "text": ["$x$ " + HOSTILE]}))
    return new_output("display_data", {"text/html": made._repr_html_(), "text/plain": repr(made)})


def failed_cell(message="division by zero"):
    return new_code_cell("1 / 0", id="bad", outputs=[new_output("error", ename="ZeroDivisionError", evalue=message, traceback=["\x1b[31mZeroDivisionError\x1b[0m", message])])


def test_import_is_quick():
    heavy = "import sys, kdnb.report; print([m for m in ('nbconvert', 'altair', 'pandas', 'torch', 'nbformat', 'jinja2') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_header_says_the_answer_first(good):
    page = (good / "gmm" / "beta=100" / "report.html").read_text()
    header = html.unescape(page[page.index("<header") : page.index("</header>")])
    for said in ("What is asked?", ">ok<", "−42.2 ± 9.2", "held", "took 1 min 23 s", "peak memory 0.81 GB", "commit 012345678", "2026-01-02 03:04:05 UTC", "claims: 2 held, 1 did not",
                 "kdnb_run params/gmm.yaml", "papermill nbs/experiments/gmm.ipynb out.ipynb -p beta 100.0 -p prompt 'it'\"'\"'s'", "n_seeds"):
        assert said in header, said
    assert page.count("What is asked?") == 2  # <title> and header: not again in the body
    assert "<title>What is asked?: recall, nats: −42.2 ± 9.2</title>" in page
    footer = re.sub(r"<[^>]+>", " ", page[page.index("<footer") : page.index("</footer>")])
    for said in ("0123456789abcdef", "2.13.0", "cpu (x86_64)", "3: 0 to 2", "wall time, fit", "1.0 s"):
        assert said in footer, said
    assert page.index("<header") < page.index("<main")
    assert "<pre>100%\nit costs $5" in page  # what the progress bar wrote last


def test_one_small_file_without_addresses(good):
    path = good / "gmm" / "beta=100" / "report.html"
    page = path.read_text()
    assert path.stat().st_size < 3e6
    tags = Tags(page)
    assert set(tags.addresses) <= {"../../index.html"}
    assert "default-src 'none'" in html.unescape(page[:1000])
    assert not any("@import" in s or re.search(r"url\((?!data:)", s) for s in re.findall(r"(?s)<style[^>]*>(.*?)</style>", page))
    assert str(good) not in page


def test_same_notebook_same_file(good):
    folder = good / "gmm" / "beta=100"
    again = report.render(folder / "notebook.ipynb", folder / "again.html").read_bytes()
    assert again == (folder / "report.html").read_bytes()
    (folder / "again.html").unlink()
    ids = re.findall(r'<figure class="chart" id="([^"]+)"', again.decode())
    assert len(set(ids)) == 2


def test_equal_charts_get_different_ids():
    taken = set()
    data, metadata = charts.render({"title": "T", "data": {"values": [{}]}, "mark": "point"})
    first, second = (report.chart_html(data, metadata, taken) for _ in range(2))
    assert first != second
    assert len(taken) == 2
    assert ">T</div>" in first  # what it says, until it is drawn
    assert "image/png" not in first  # a picture weighs three times its specification
    assert f'style="width:{metadata["image/png"]["width"]}px;' in first  # nothing jumps


def test_failure_is_at_the_top(good):
    page = (good / "gmm" / "beta=3" / "report.html").read_text()
    header = page[page.index("<header") : page.index("</header>")]
    assert "ZeroDivisionError: division by zero" in header
    assert 'href="#cell-id=bad"' in header
    assert 'id="cell-id=bad"' in page
    assert ">failed<" in header
    assert "\x1b" not in page


def test_papermill_error_cells_and_dead_kernels(tmp_path):
    tagged = new_markdown_cell("<span>An Exception was encountered</span>", metadata={"tags": ["papermill-error-cell-tag"]})
    page = save(tmp_path / "a", [tagged, new_markdown_cell("# T"), failed_cell()]).read_text()
    assert "An Exception was encountered" not in page
    save(tmp_path / "b", [new_markdown_cell("# T")], METRICS, papermill={"exception": True, "parameters": {}})
    state = report.read_state(tmp_path / "b")
    assert (state.status, state.error, state.headline) == ("failed", "the kernel stopped before the end of the notebook", [])


def test_what_the_grid_runner_saw_counts(tmp_path):
    cells = [new_markdown_cell("# What is asked?")]
    save(tmp_path / "a", cells, METRICS, RUN)
    write_json(tmp_path / "a" / "status.json", {"state": "failed", "error": "TimeoutError: longer than 5 s", "wall_s": 5.0, "params": {"beta": 1}})
    assert report.read_state(tmp_path / "a")[:3] == ("failed", "What is asked?", "TimeoutError: longer than 5 s")
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b" / "status.json", {"state": "failed", "error": "DeadKernelError: gone", "wall_s": 7.0, "params": {"beta": 2}})
    state = report.read_state(tmp_path / "b")
    assert (state.status, state.error, state.wall_s, state.parameters) == ("failed", "DeadKernelError: gone", 7.0, [("beta", 2)])
    page = report.render(tmp_path / "a" / "notebook.ipynb", tmp_path / "a" / "report.html", title="gmm, beta=1").read_text()
    assert "<title>gmm, beta=1</title>" in page
    assert "<h1>What is asked?" in page


def test_index_lists_every_cell(good):
    page = (good / "index.html").read_text()
    rows = re.findall(r"(?s)<tr[^>]*>(.*?)</tr>", page.split("<tbody>")[1])
    names = [re.sub(r"<[^>]+>", "", re.search(r"<td.*?</td>", r)[0]).strip() for r in rows]
    assert names == ["summary", "beta=3", "beta=7", "beta=20", "beta=100"]
    assert "ZeroDivisionError: division by zero" in rows[1]
    assert "missing" in rows[2]
    assert "−∞ ± ∞" in rows[3]
    assert 'href="gmm/beta%3D100/report.html"' in rows[4]
    assert "1 min 23 s" in rows[4]
    assert "finding: <strong>more precise from β = 20 on</strong>" in page
    assert "2 held, 1 did not" in rows[4]
    assert "finding" not in re.search(r"(?s)<thead>.*?</thead>", page)[0]
    assert report.index(good).read_text() == page


def test_index_of_a_run_outside_a_repository(tmp_path):
    save(tmp_path / "reports" / "run" / "x=1", [new_markdown_cell("# T")], {"headline": []}, {"commit": None})
    assert "x=1" in report.index(tmp_path / "reports").read_text()


def test_index_of_nothing(tmp_path):
    assert "No reports yet" in report.index(tmp_path).read_text()


@pytest.mark.parametrize("attack", ATTACKS)
def test_clean_html_leaves_nothing_that_acts(attack):
    cleaned = report.clean_html(attack)
    assert not re.search(r"(?i)<(script|style|svg|iframe|link|math|img [^>]*src=.?(x|http|1))|\son\w+\s*=|javascript:|url\(|position", cleaned)


def test_clean_html_keeps_tables_and_prose():
    kept = '<table class="dataframe"><thead><tr><th colspan="2">a</th></tr></thead><tbody><tr><td style="text-align:right;">1</td></tr></tbody></table>'
    assert report.clean_html(kept) == kept
    picture = '<img src="data:image/png;base64,AAAA" alt="a">'
    assert report.clean_html(picture) == picture
    assert report.clean_html('<a href="https://arxiv.org/abs/2505.13111">paper</a>') == '<a href="https://arxiv.org/abs/2505.13111">paper</a>'
    assert report.clean_html('<a href="data:text/html,x">a</a>') == "<a>a</a>"


@pytest.mark.parametrize(("raw", "kept"), [
    ("\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m"), ("a\x1b[2Kb\x1b[1A", "ab"), ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("10%\r20%\r\n", "20%\n"), ("a\x08\x00\u202eb\t", "ab\t"), ("\x1b", "\x1b"),
])
def test_terminal_text(raw, kept):
    assert report.terminal_text(raw) == kept
    assert "\x1b" not in report.terminal_text(raw, colour=False)


@pytest.mark.parametrize(("seconds", "said"), [(None, ""), (0.04, "0.0 s"), (9.99, "10 s"), (59.4, "59 s"), (60.0, "1 min 0 s"), (3725.0, "1 h 2 min")])
def test_duration(seconds, said):
    assert report.duration(seconds) == said


def test_chart_block_cannot_be_closed_from_inside():
    spec = {"data": {"values": [{"t": HOSTILE + "\u2028"}]}, "mark": "text"}
    made = report.chart_html({report.VEGALITE_MIME: spec, "image/png": '"><script>', "text/plain": HOSTILE}, {}, set())
    assert made.count("<script") == made.count("</script>") == 1
    block = re.search(r'(?s)<script type="application/json">(.*)</script>', made)[1]
    assert not set(block) & set("<>&\u2028")
    assert json.loads(block) == spec


def hostile_cells():
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" onload="window.hit=1">{ATTACKS[0]}</svg>'
    outputs = [
        new_output("display_data", {"text/html": HOSTILE}), new_output("display_data", {"text/markdown": f"# {HOSTILE}\n\n[a](javascript:window.hit=1) ![x](http://example.org/z.png) $\\href{{javascript:window.hit=1}}{{a}}$"}),
        new_output("display_data", {"text/latex": f"${HOSTILE}$"}), new_output("display_data", {"image/svg+xml": svg}),
        new_output("display_data", {"application/javascript": "window.hit=1", "text/plain": HOSTILE}),
        new_output("display_data", {"image/png": '"><script>window.hit=1</script>'}),
        new_output("stream", name="stdout", text=HOSTILE), new_output("stream", name="stderr", text=HOSTILE), line_output(HOSTILE), linked_output(HOSTILE), chart_output(ATTACKS[2]), charts_table(),
    ]
    return [new_markdown_cell(f"# Title {ATTACKS[0]}\n\nText."), new_code_cell(HOSTILE.replace("\x1b", ""), outputs=outputs), failed_cell(HOSTILE)]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    "A run whose every text is an attack."
    reports = tmp_path_factory.mktemp("hostile") / "reports"
    metrics = {"parameters": {"prompt": HOSTILE}, "headline": [{"label": HOSTILE, "value": HOSTILE}]}
    save(reports / "run" / "a=<b>", hostile_cells(), metrics, RUN, papermill={"parameters": {"prompt": HOSTILE}})
    save(reports / "run" / "a=2", [new_markdown_cell("# T")], metrics, RUN)
    report.index(reports)
    return reports


def test_hostile_files_hold_only_our_scripts(hostile):
    for path in (hostile / "run" / "a=<b>" / "report.html", hostile / "run" / "a=2" / "report.html", hostile / "index.html"):
        page = path.read_text()
        scripts = re.findall(r"(?s)<script>(.*?)</script>", page)
        allowed = {*map(report.asset, ("report.js", "reports.js", "charts.js")), report.vega_bundle(), report._katex()[1]}
        assert set(scripts) <= allowed
        assert page.count("<script") == len(scripts) + page.count('<script type="application/json"')
        tags = Tags(page)
        assert not [a for a in tags.attributes if a.startswith("on")]
        assert not tags.names & {"iframe", "object", "embed", "base", "form", "math", "audio", "video"}
        assert all(re.match(r"(\.\./\.\./index\.html|run/a%3D[^\"]*\.html|data:image/png;base64,.*)$", a) for a in tags.addresses), tags.addresses
        assert "\x1b" not in page


@pytest.fixture(scope="module")
def served(good):
    "Address of the reports on a server of this machine."
    with served_folder(good) as address:
        yield address


@pytest.fixture(params=["disk", "server"])
def place(request, good):
    "Address of the reports: opened from disk, and from a server."
    return good.as_uri() if request.param == "disk" else request.getfixturevalue("served")


@pytest.mark.browser
def test_browser_draws_charts_and_formulas(place, driver):
    check_page(driver, f"{place}/gmm/beta%3D100/report.html", charts=2, formulas=3, base=place)
    labels = driver.execute_script("return Array.from(document.querySelectorAll('figure.chart [role=graphics-document]'), e => e.getAttribute('aria-label'))")
    assert [text.split(":")[0] for text in labels] == ["Density maps", "Line chart"]  # every chart says what it shows
    assert driver.execute_script("return document.fonts.check('600 16px Inter')")
    assert "it costs $5 and $6" in driver.find_element("css selector", "main").text  # no formula is looked for in outputs
    assert driver.execute_script("return document.querySelectorAll('details.code[open]').length") == 0
    driver.find_element("id", "all-code").click()
    assert driver.execute_script("return document.querySelectorAll('details.code:not([open])').length") == 0
    assert driver.execute_script("return document.querySelector('figure.chart svg image, figure.chart svg path') !== null")


@pytest.mark.browser
def test_browser_on_a_phone(good, driver):
    with telephone(driver):
        check_page(driver, (good / "gmm" / "beta=100" / "report.html").as_uri(), charts=2, formulas=3)
        check_page(driver, (good / "index.html").as_uri())


@pytest.mark.browser
def test_browser_shows_a_tooltip(good, driver):
    open_page(driver, (good / "gmm" / "beta=100" / "report.html").as_uri())
    point = driver.find_elements("css selector", "figure.chart .mark-symbol path")[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)

    def shown(driver):
        ActionChains(driver).move_by_offset(1, 1).move_to_element(point).perform()
        return any("mean" in e.text for e in driver.find_elements("css selector", "#vg-tooltip-element.visible"))

    WebDriverWait(driver, 10).until(shown)


@pytest.mark.browser
def test_browser_slider_changes_the_picture(place, driver):
    check_page(driver, f"{place}/play.html", charts=2, base=place)
    picture = "return document.querySelector('figure.chart image').getAttribute('href')"
    slider = driver.find_element("css selector", "figure.chart input[type=range]")
    before = driver.execute_script(picture)
    slider.send_keys(Keys.ARROW_RIGHT)
    WebDriverWait(driver, 10).until(lambda d: d.execute_script(picture) != before)
    assert "β = 10" in driver.find_element("css selector", "figure.chart svg").text


@pytest.mark.browser
def test_browser_choice_of_a_student_changes_texts_and_curves(place, driver):
    check_page(driver, f"{place}/play.html", charts=2, base=place)
    chart = driver.find_elements("css selector", "figure.chart")[1]
    buttons = chart.find_elements("css selector", "input[type=radio]")
    wait = WebDriverWait(driver, 10)

    def shown():
        "Text that is read, button that is down, height at which the curve ends."
        written = [e.text for e in chart.find_elements("css selector", "svg .mark-text text") if "written by" in e.text]
        curve = driver.execute_script("return Array.from(arguments[0].querySelectorAll('svg .mark-line path'), e => [e.getAttribute('stroke'), e.getAttribute('d')]).at(-1)", chart)
        return written, [b.get_attribute("value") for b in buttons if b.is_selected()], curve

    first = shown()
    assert first[:2] == (["it written by it τ = 1"], ["it τ = 1"])
    buttons[0].send_keys(Keys.ARROW_RIGHT)  # by the keyboard
    wait.until(lambda _: shown()[:2] == (["it written by it τ = 2"], ["it τ = 2"]))
    assert shown()[2] != first[2]
    far = min((e for e in chart.find_elements("css selector", "svg .mark-symbol path") if e.rect["width"] > 6), key=lambda e: e.rect["x"])  # the least recall
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", far)
    ActionChains(driver).move_to_element_with_offset(far, 12, 12).click().perform()  # near is enough
    wait.until(lambda _: shown()[:2] == (["it written by it τ = 3"], ["it τ = 3"]))


@pytest.mark.browser
def test_browser_compares_two_reports(place, driver):
    check_page(driver, f"{place}/index.html", base=place)
    panel = driver.find_element("id", "compare")
    assert not panel.is_displayed()
    boxes = {b.get_attribute("value"): b for b in driver.find_elements("css selector", "input.pick")}
    boxes["gmm/beta=20"].click()
    assert not panel.is_displayed()
    boxes["gmm/beta=100"].click()
    rows = {r.find_element("css selector", "th").text: [c.text for c in r.find_elements("css selector", "td")] for r in panel.find_elements("css selector", "tbody tr")}
    assert rows["recall, nats"] == ["−∞ ± ∞", "−42.2 ± 9.2", ""]
    assert rows["beta"] == ["20", "100", "+80"]
    assert panel.find_element("css selector", "summary").text == "1 parameter is the same"
    driver.refresh()  # the address remembers
    assert driver.find_element("css selector", "#compare thead a").get_attribute("href").endswith("gmm/beta%3D20/report.html")
    driver.find_element("css selector", "input.pick[value='gmm/summary']").click()  # a third takes the place of the first
    heads = driver.find_elements("css selector", "#compare > .scroll thead a")
    assert [h.text for h in heads] == ["gmm · beta=100", "gmm · summary"]
    driver.find_element("css selector", "#compare > button").click()
    assert not driver.find_element("id", "compare").is_displayed()
    assert driver.find_elements("css selector", "input.pick:checked") == []


@pytest.mark.browser
def test_browser_notices_a_missing_bundle(good, driver, tmp_path):
    page = (good / "gmm" / "beta=100" / "report.html").read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace(f"<script>{report.vega_bundle()}</script>", ""))
    with pytest.raises(AssertionError, match="chart not drawn"):
        check_page(driver, broken.as_uri(), charts=2, formulas=3)
    said = driver.execute_script("return Array.from(document.querySelectorAll('figure.chart .said'), e => e.textContent)")
    assert [text.split(":")[0] for text in said] == ["Density maps", "Line chart"]  # their words stay


@pytest.mark.browser
@pytest.mark.parametrize("policy", [True, False], ids=["policy", "no policy"])
def test_browser_runs_nothing_that_a_model_wrote(hostile, driver, tmp_path, policy):
    for path in (hostile / "run" / "a=<b>" / "report.html", hostile / "index.html"):
        page = path.read_text()
        target = tmp_path / "page.html"
        target.write_text(page if policy else re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page))
        errors, requests = open_page(driver, target.as_uri())
        assert requests == []
        assert [e for e in errors if not e.startswith("data:image/png")] == []  # a picture that is none
        assert driver.execute_script("return window.hit") is None
        assert driver.execute_script("return getComputedStyle(document.body).display") == "block"
        assert driver.execute_script("return document.querySelectorAll('iframe, object, embed, link[rel=stylesheet]').length") == 0


@pytest.mark.browser
def test_browser_policy_is_a_second_lock(good, driver, tmp_path):
    page = (good / "gmm" / "beta=20" / "report.html").read_text()
    target = tmp_path / "page.html"
    target.write_text(page.replace("<main", f"{ATTACKS[0]}{ATTACKS[1]}<main"))  # as if cleaning had failed
    errors, _ = open_page(driver, target.as_uri())
    assert driver.execute_script("return window.hit") is None
    assert any("Content Security Policy" in e for e in errors)


@pytest.mark.browser
def test_browser_sorts_and_filters(good, driver):
    check_page(driver, (good / "index.html").as_uri())
    names = "return Array.from(document.querySelectorAll('tbody tr')).filter(r => !r.hidden).map(r => r.cells[0].textContent.trim())"
    head = driver.find_elements("css selector", "th button")[1]
    head.click()
    assert driver.execute_script(names) == ["summary", "beta=3", "beta=7", "beta=20", "beta=100"]
    head.click()
    assert driver.execute_script(names) == ["summary", "beta=100", "beta=20", "beta=7", "beta=3"]
    field = driver.find_element("id", "filter")
    field.send_keys("failed zero")
    assert driver.execute_script(names) == ["beta=3"]
    field.send_keys(" nothing")
    assert driver.find_element("id", "nothing").is_displayed()
    driver.find_element("css selector", "section.run")


PUBLISHED = sorted((Path(__file__).parent.parent / "reports" / "published").glob("*/*/notebook.ipynb"))


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("notebook", PUBLISHED, ids=lambda p: f"{p.parent.parent.name}/{p.parent.name}")
def test_browser_published_reports(notebook, driver, tmp_path):
    shutil.copytree(notebook.parent, tmp_path / "reports" / "run" / "cell")
    made = report.render(tmp_path / "reports" / "run" / "cell" / "notebook.ipynb", tmp_path / "reports" / "run" / "cell" / "report.html")
    assert made.stat().st_size < 3e6
    charts_in = json.dumps(json.loads(notebook.read_text())).count(f'"{report.VEGALITE_MIME}"')
    errors, requests = open_page(driver, made.as_uri())
    assert (errors, requests) == ([], [])
    count = "return document.querySelectorAll(arguments[0]).length"
    assert driver.execute_script(count, "figure.chart.drawn svg.marks") == charts_in > 0
    assert driver.execute_script(count, ".katex-error") == 0
    assert driver.execute_script("return Array.from(document.querySelectorAll('.jp-RenderedMarkdown'), e => e.innerText).join(' ')").count("$") == 0  # no formula is left
