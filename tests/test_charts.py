"""Charts: what is emitted, what is drawn, what is said, and what cannot be injected."""

import io
import json
import math
import struct
from itertools import pairwise

import altair as alt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.optimize import minimize

from kdnb import charts
from kdnb.core import Estimate

VISION = {  # Machado, Oliveira and Fernandes (2009), table 1, severity 1.0
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "normal": np.eye(3),
}


def made_frame():
    return pd.DataFrame(
        [(b, s, m, m - 0.2, m + 0.2) for s, top in (("distilled student", 4.0), ("direct student", 0.0)) for b, m in zip((1, 10, 100), (-7, -7 + top / 2, -7 + top), strict=True)],
        columns=["beta", "series", "mean", "lo", "hi"],
    )


def made_plane():
    made = pd.DataFrame({"series": ["truth", "student", "student"], "knob": [math.nan, 1.0, 0.5], "recall": [-2.0, -4.0, -5.0], "precision": [-2.0, -6.0, -3.0]})
    return made.assign(**{f"{p}{s}": made[p] + d for p in ("recall", "precision") for s, d in (("_lo", -0.1), ("_hi", 0.1))})


@pytest.fixture
def frame():
    return made_frame()


@pytest.fixture
def plane():
    return made_plane()


def choices(plane):
    return plane.assign(student=["truth", "one", "two"])


def texts(frame, text="it is written"):
    return pd.DataFrame([{"student": s, "text": f"{text} by {s}"} for s in frame["student"] for _ in range(2)])


def learning(frame):
    return pd.DataFrame([{"student": s, "series": "student", "x": x, "y": float(x + len(s))} for s in frame["student"] for x in range(5)])


@pytest.fixture(scope="module")
def every():
    "One chart of each kind, made once: no test changes them."
    frame, plane = made_frame(), made_plane()
    xs = np.linspace(-1, 1, 21)
    bump = np.exp(-4 * (xs**2 + xs[:, None] ** 2))
    loss = pd.DataFrame({"step": np.arange(700), "series": "teacher", "loss": np.linspace(5, 3, 700)})
    return {
        "curves": charts.curves(frame, "beta", "β", "nats", "A", "B", x_log=True),
        "panels": charts.curves(pd.concat([frame.assign(panel=p) for p in ("precision", "recall", "entropy")]), "beta", "β", "nats", "A", "B"),
        "seeds": charts.curves(frame, "beta", "β", "nats", "A", "B", seeds=frame.assign(value=frame["mean"] - 3, seed=0)),
        "pr_plane": charts.pr_plane(plane, "A", "B", seeds=plane),
        "symlog": charts.pr_plane(plane, "A", "B", symlog=True),
        "density_maps": charts.density_maps({"truth": (xs, xs, bump), "student": (xs, xs, bump)}, "A", "B"),
        "training_curves": charts.training_curves(loss, "A", "B"),
        "traces": charts.training_curves(loss.assign(lr=1e-3, grad_norm=np.linspace(2, 1, 700), tokens_per_s=9e3), "A", "B"),
        "linked": charts.linked(choices(plane), texts(choices(plane)), learning(choices(plane)), title="A", subtitle="B"),
    }


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    "CIELAB (D65) of linear RGB."
    xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ np.clip(rgb, 0, 1)
    f = [t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in xyz / [0.95047, 1, 1.08883]]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_role_colours_stay_apart_for_every_reader(vision):
    seen = {c: lab(np.asarray(VISION[vision]) @ linear(c)) for c in set(charts.ROLES.values())}
    names = list(seen)
    least = min(np.linalg.norm(seen[a] - seen[b]) for i, a in enumerate(names) for b in names[:i])
    assert least > 14  # CIE76; 2.3 is a just noticeable difference


def test_text_colours_have_wcag_contrast():
    for colour in {*charts.ROLES.values(), *charts.OTHERS, charts.MUTED, charts.INK}:
        assert 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5, colour


def test_a_role_keeps_its_colour_and_others_differ():
    found = charts.colours(["direct student", "Teacher, τ = 1", "distilled student", "a", "b", "a"])
    assert found["direct student"] == charts.ROLES["direct"]
    assert found["Teacher, τ = 1"] == charts.ROLES["teacher"]
    assert found["distilled student"] == charts.ROLES["student"]
    assert len(set(found.values())) == len(found) == 5


def test_bundle_is_a_valid_deterministic_notebook_output(every):
    for name, chart in every.items():
        data, metadata = charts.render(chart.to_dict())
        output = nbformat.v4.new_output("display_data", data, metadata=metadata)
        nbformat.validate(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])]))
        if name in ("panels", "density_maps"):
            assert charts.render(chart.to_dict())[0] == data  # nothing random
        assert set(data) == {charts.VEGALITE_MIME, "image/png", "text/plain"}
        assert data["text/plain"] == chart.to_dict()["description"]
        json.dumps(data, allow_nan=False)


def test_import_activates_the_renderer_and_the_theme():
    assert alt.renderers.active == "kdnb"
    assert alt.theme.active == "kdnb"
    bundle, _ = alt.Chart(pd.DataFrame({"x": [1]}), title="T").mark_point().encode(x="x")._repr_mimebundle_()
    assert bundle["text/plain"] == "T"


def test_every_chart_draws_text_with_both_vega_lite_versions(every):
    convert = charts._vl_convert()
    for name, chart in every.items():
        for version in ("5.8", "6.4"):  # 5.8 is the nearest to JupyterLab's 5.6 that vl-convert has
            svg = convert.vegalite_to_svg(chart.to_dict(), vl_version=version)
            assert ">A<" in svg, (name, version)
            assert svg.count("<path") > 3, (name, version)
            assert "NaN" not in svg, (name, version)


def pixels_of(png):
    "Colours without opacity, as integers that can be subtracted."
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_pictures_are_sharp_white_and_not_blank(every):
    for chart in every.values():
        raw = charts._vl_convert().vegalite_to_png(chart.to_dict(), vl_version="6.4", ppi=144)
        pixels = np.asarray(Image.open(io.BytesIO(raw)))
        height, width = pixels.shape[:2]
        assert 800 < width < 1900
        assert height > 500
        assert (pixels[0] == 255).all()  # an opaque white edge: nothing is cut off at the top
        assert (pixels[:, -1] == 255).all()
        assert (pixels[..., :3] < 100).all(-1).sum() > 300  # dark pixels: the title was drawn


def test_small_pictures_keep_their_colours_and_charts_nearly_so(every):
    "Our encoder against vl-convert's decoder; and how far a palette is from all colours."
    rgb = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    png = charts._png(rgb)
    spec = {"width": 5, "height": 7, "padding": 0, "config": {"view": {"stroke": None}}, "data": {"values": [{}]}, "mark": {
        "type": "image", "url": "data:image/png;base64," + charts.b64encode(png).decode(), "width": 5, "height": 7, "x": 2.5, "y": 3.5}}
    drawn = pixels_of(charts._vl_convert().vegalite_to_png(spec, vl_version="6.4"))
    np.testing.assert_array_equal(drawn[:7, :5], rgb)
    for name, chart in every.items():
        full = pixels_of(charts._vl_convert().vegalite_to_png(chart.to_dict(), vl_version="6.4", ppi=144))
        kept = pixels_of(charts.to_png(chart.to_dict()))
        assert kept.shape == full.shape, name
        assert np.abs(kept - full).max() <= 8, name  # of 255: nobody sees it


@pytest.mark.parametrize("wanted", [[0.0, 1.0, 2.0], [5.0, 5.0, 5.0, 0.0], [1.0]])
def test_spread_is_the_least_squares_answer(wanted):
    placed = np.array(charts.spread(wanted, 1.5))
    order = np.argsort(wanted, kind="stable")
    gaps = [{"type": "ineq", "fun": lambda p, a=a, b=b: p[b] - p[a] - 1.5} for a, b in pairwise(order)]
    start = np.empty(len(wanted))
    start[order] = np.arange(len(wanted)) * 2.0
    best = minimize(lambda p: ((p - wanted) ** 2).sum(), start, constraints=gaps)
    np.testing.assert_allclose(placed, best.x, atol=1e-5)


@pytest.mark.parametrize(("count", "label", "columns"), [(1, "a", 1), (2, "distilled student", 2), (3, "a", 3), (3, "distilled student", 2), (6, "distilled student", 2), (3, "", 3), (2, "x" * 60, 1)])
def test_panels_fit_side_by_side(frame, count, label, columns):
    both = pd.concat([frame.assign(series=s) for s in ((label, "b") if label else ("a",))])
    chart = charts.curves(pd.concat([both.assign(panel=f"panel {i}") for i in range(count)]), "beta", "β", "nats", "A", "B")
    assert chart.to_dict().get("columns", 1) == columns
    assert struct.unpack(">I", charts.to_png(chart.to_dict())[16:20])[0] <= 2 * 900


def test_labels_of_the_plane_avoid_intervals():
    [(dx, dy)] = charts.place([(100.0, 100.0)], [40.0], (400, 400), [(100.0, 40.0, 100.0, 160.0), (40.0, 100.0, 160.0, 100.0)])
    assert abs(dx) >= 21  # in a quarter of the cross, on neither rule
    assert abs(dy) >= 8.5


def test_an_empty_table_says_so():
    made = charts.table(pd.DataFrame([]), "Claims & more")
    assert made._repr_html_() == '<p class="kdnb-table">Claims &amp; more: nothing to show</p>'
    assert repr(made) == "Claims & more: nothing to show"
    assert made._repr_markdown_() == "*Claims &amp; more*: nothing to show"


def test_a_column_of_numbers_with_gaps_is_right_aligned():
    made = charts.table(pd.DataFrame({"a": ["x", "y"], "b": ["", Estimate(-1.0, 0.1, -1.2, -0.8, 9)]}))
    assert made._repr_markdown_().splitlines()[1] == "|:---|---:|"
    assert "−1.00\u00a0±\u00a00.20" in made._repr_html_()


def test_labels_of_the_plane_do_not_touch(plane):
    points = [(300.0, 200.0 + i) for i in range(6)] + [(2.0, 2.0), (398.0, 398.0)]
    widths = [60.0] * 8
    boxes = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(points, charts.place(points, widths, (400, 400)), strict=True)]
    assert all(abs(a[0] - b[0]) >= 60 or abs(a[1] - b[1]) >= 15 for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(30 <= x <= 370 and 7.5 <= y <= 392.5 for x, y in boxes)
    assert charts._labels(plane, "knob") == ["truth", "student, 1", "0.5"]


@pytest.mark.parametrize("bad", ["\x1b[31m", "\x00", "\ufffe", "\ud800"])
def test_control_characters_do_not_end_the_process(bad):
    data, _ = charts.render({"title": f"a{bad}", "data": {"values": [{"a": bad}]}, "mark": "text", "encoding": {"text": {"field": "a"}}})
    assert data["text/plain"] == f"a\\u{{{ord(bad[0]):x}}}{bad[1:]}"
    json.dumps(data).encode()


def test_values_that_are_not_finite_are_left_out(frame):
    frame.loc[2, ["mean", "lo", "hi"]] = (-math.inf, -math.inf, math.nan)
    spec = charts.curves(frame, "beta", "β", "nats", "A", "B").to_dict()
    json.dumps(spec, allow_nan=False)
    assert charts.to_png(spec)


def test_titles_wrap_and_scales_are_said(frame):
    spec = charts.curves(frame, "beta", "β", "nats", "word " * 40, "B", x_log=True).to_dict()
    assert len(spec["title"]["text"]) > 1
    assert "β (log scale)" in json.dumps(spec, ensure_ascii=False)


def test_density_is_drawn_the_right_way_up():
    xs, ys = np.linspace(-1, 1, 3), np.linspace(0, 1, 2)
    spec = charts.density_maps({"truth": (xs, ys, np.array([[1.0, 0, 0], [0, 0, 0]]))}, "A", "B").to_dict()  # mass at the low left
    pixels = pixels_of(charts._vl_convert().vegalite_to_png(spec, vl_version="6.4")).sum(-1)
    height, width = pixels.shape
    assert pixels[int(height * 0.6) : int(height * 0.8), int(width * 0.1) : int(width * 0.3)].mean() < pixels[:, int(width * 0.6) :].mean() - 200


def test_messages(frame):
    with pytest.raises(ValueError, match=r"frame must have the columns beta, series, mean, lo, hi, got beta, series; missing: mean, lo, hi"):
        charts.curves(frame[["beta", "series"]], "beta", "", "", "", "")
    with pytest.raises(ValueError, match="frame must have at least one row, got none"):
        charts.training_curves(pd.DataFrame(columns=["step", "series", "loss"]))
    with pytest.raises(ValueError, match=r"seeds must have the columns beta, series, value, got beta, series"):
        charts.curves(frame, "beta", "", "", "", "", seeds=frame[["beta", "series"]])
    with pytest.raises(ValueError, match="beta must be > 0 on a log scale, got -1; use x_log=False"):
        charts.curves(frame.assign(beta=-1), "beta", "", "", "", "", x_log=True)
    xs = np.arange(3.0)
    with pytest.raises(ValueError, match=r"density of 'truth' must have shape \(len\(ys\), len\(xs\)\) = \(3, 3\), got \(2, 3\)"):
        charts.density_maps({"truth": (xs, xs, np.ones((2, 3)))}, "", "")
    with pytest.raises(ValueError, match="density of 'truth' must be finite, >= 0 and somewhere > 0, got nan to nan"):
        charts.density_maps({"truth": (xs, xs, np.full((3, 3), math.nan))}, "", "")


@pytest.mark.parametrize(("value", "said"), [
    (Estimate(-2.64612, 0.006, -2.6581, -2.6341, 50), "−2.646 ± 0.012"),
    (Estimate(-42.2, 4.4, -51.4, -33.0, 20), "−42.2 ± 9.2"),
    (Estimate(123.4, 60.0, 3.4, 243.4, 20), "123 ± 120"),
    (Estimate(1.0, 0.0, 1.0, 1.0, 20), "1.000 ± 0.000"),
    (Estimate(-math.inf, math.inf, -math.inf, math.inf, 5), "−∞ ± ∞"),
    (math.inf, "∞"), (-math.inf, "−∞"), (0.123456, "0.1235"), (-7, "−7"), ("held", "held"),
])
def test_numbers(value, said):
    assert charts.number(value) == said


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>|`$x$ [a](b)\x1b[31m\n</td>‮"


def test_untrusted_text_stays_text():
    made = charts.samples_table(pd.DataFrame({"who": ["student"], "text": [HOSTILE]}), caption=HOSTILE)
    shown = made._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown
    assert shown.count("</td>") == 2
    for made_as in (shown, made._repr_markdown_(), repr(made)):
        assert not any(ord(c) < 32 for c in made_as.replace("\n", ""))
        assert "‮" not in made_as
    line = made._repr_markdown_().splitlines()[-1]
    assert "<" not in line
    assert line.count("|") - line.count(r"\|") == 3
    assert "$" not in line.replace(r"\$", "")
    assert "`" not in line.replace(r"\`", "")


def test_a_slider_shows_one_value_of_the_knob_at_a_time():
    axis = np.linspace(-1, 1, 5)
    steps = {b: {"teacher": (axis, axis, np.full((5, 5), b)), "student": (axis, axis, np.eye(5))} for b in (1.0, 10.0)}
    curve = pd.DataFrame({"knob": [1.0, 10.0], "series": "precision", "value": [-2.0, -1.0]})
    spec = charts.density_slider(steps, curve, "β", "title", "subtitle").to_dict()
    (knob,) = [p for p in spec["params"] if "bind" in p]
    assert (knob["bind"]["min"], knob["bind"]["max"]) == (0, 1)
    assert str(spec).count("datum.at == step") == 4  # two pictures, the rule and its label
    with pytest.raises(ValueError, match="steps must have the panels teacher, student at every value, got others"):
        charts.density_slider({**steps, 2.0: {"teacher": steps[1.0]["teacher"]}}, curve, "β", "", "")


def test_heat_maps_share_one_scale_with_zero_in_its_middle():
    frame = pd.DataFrame({"panel": ["a", "a", "b"], "x": [1, 2, 1], "y": [1.0, 1.0, 1.0], "gain": [-1.0, 4.0, 0.5]})
    spec = charts.heat_maps(frame, "x", "y", "gain", "x", "y", "gain, nats", "title", "subtitle").to_dict()
    scales = [panel["encoding"]["color"]["scale"] for panel in spec["hconcat"]]
    assert [s["domain"] for s in scales] == [[-4.0, 4.0]] * 2
    assert "a: gain, nats from -1 to 4" in spec["description"]


def named(spec, name):
    "Every value under a key, wherever it stands in a specification."
    inside = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ()
    return ([spec[name]] if isinstance(spec, dict) and name in spec else []) + [v for part in inside for v in named(part, name)]


def test_every_chart_says_what_it_shows(every):
    for name, chart in every.items():
        said = chart.to_dict()["description"]
        assert "A" in said, name
        assert len(said) > 30, name


def test_training_panels_share_the_axis_of_steps(every):
    spec = every["traces"].to_dict()
    assert [panel["layer"][0]["encoding"]["y"]["field"] for panel in spec["vconcat"]] == ["loss", "lr", "grad_norm", "tokens_per_s"]
    assert spec["resolve"] == {"scale": {"x": "shared"}}
    assert len({panel["width"] for panel in spec["vconcat"]}) == 1
    svg = charts._vl_convert().vegalite_to_svg(spec, vl_version="6.4")
    assert [svg.count(f">{said}<") for said in charts.TRACES.values()] == [1, 1, 1, 1]
    assert svg.count(">optimiser step<") == 1
    assert "vconcat" not in every["training_curves"].to_dict()  # the loss alone is as it was


@pytest.mark.parametrize("missing", [["lr"], ["grad_norm", "tokens_per_s"]])
def test_training_panels_are_those_that_were_recorded(missing):
    frame = pd.DataFrame({"step": range(9), "series": "a", "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 5.0}).drop(columns=missing)
    spec = charts.training_curves(frame).to_dict()
    assert [panel["layer"][0]["encoding"]["y"]["field"] for panel in spec["vconcat"]] == [c for c in charts.TRACES if c not in missing]


def test_long_runs_are_averaged_in_bins():
    loss = pd.DataFrame({"step": np.arange(10_000), "series": "a", "loss": np.tile([1.0, 3.0], 5000)})
    for frame, most in ((loss, 300), (loss.assign(lr=1e-3), 150)):
        made = charts._traces(frame, [c for c in charts.TRACES if c in frame])
        assert most / 2 < len(made) <= most
        np.testing.assert_allclose(made["loss"], 2.0, rtol=0.05)  # a bin of an odd number of steps is off by one of them


def test_a_chosen_student_is_the_only_one_that_is_read(plane):
    frame = choices(plane)
    spec = charts.linked(frame, texts(frame), learning(frame)).to_dict()
    (choice,) = [p for p in spec["params"] if p["name"] == "chosen"]
    assert choice["value"] == [{"student": "truth"}]
    assert choice["bind"] == {"input": "radio", "options": ["truth", "one", "two"], "name": "student "}
    convert = charts._vl_convert()
    first = convert.vegalite_to_svg(spec, vl_version="6.4")
    choice["value"] = [{"student": "two"}]
    second = convert.vegalite_to_svg(spec, vl_version="6.4")
    assert [svg.count(">it is written by truth<") for svg in (first, second)] == [2, 0]
    assert [svg.count(">it is written by two<") for svg in (first, second)] == [0, 2]
    assert "truth: precision −2.00 ± 0.10, recall −2.00 ± 0.10 nats" in first
    assert ">two: precision −3.00" in second


def test_a_choice_shows_one_value_of_each_student_on_a_line_through_all(plane):
    frame = choices(plane)
    one_each = pd.DataFrame({"student": frame["student"], "series": "KL", "x": [1.0, 2.0, 3.0], "y": [3.0, 2.0, 1.0]})
    svg = charts._vl_convert().vegalite_to_svg(charts.linked(frame, texts(frame), one_each).to_dict(), vl_version="6.4")
    assert svg.count(">KL<") == 1
    assert "curves" not in str(charts.linked(frame, texts(frame)).to_dict().get("hconcat"))  # curves may be left out


def test_untrusted_texts_of_a_choice_stay_text(plane):
    frame = choices(plane)
    spec = charts.linked(frame, texts(frame, HOSTILE)).to_dict()
    svg = charts._vl_convert().vegalite_to_svg(spec, vl_version="6.4")
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg
    assert not any(ord(c) < 32 for row in named(spec, "text") if isinstance(row, str) for c in row)


def test_long_texts_of_a_choice_are_cut_after_some_lines(plane):
    frame = choices(plane)
    lines = charts._text_lines(texts(frame, "word " * 2000), 600)
    assert lines.groupby("student").size().tolist() == [charts.MOST_LINES] * 3


def test_messages_of_a_choice(plane):
    frame = choices(plane)
    with pytest.raises(ValueError, match="student of texts must be one of truth, one, two, got 'three'"):
        charts.linked(frame, texts(frame).assign(student="three"))
    with pytest.raises(ValueError, match="student must name each row of frame once, got 'a' twice"):
        charts.linked(frame.assign(student="a"), texts(frame))
    with pytest.raises(ValueError, match="texts must have the columns student, text, got student; missing: text"):
        charts.linked(frame, frame[["student"]])


def test_legend_of_a_map_is_no_wider_than_the_map():
    frame = pd.DataFrame({"series": [f"student at τ = {i / 7:.3f}" for i in range(9)], "x": 0.0, "y": 0.0, "text": "t"})
    spec = charts.scatter_texts(frame, "A", "B").to_dict()
    assert spec["encoding"]["color"]["legend"]["columns"] == 3
    assert struct.unpack(">I", charts.to_png(spec)[16:20])[0] <= 2 * 620


def test_an_executed_notebook_is_the_same_when_executed_again(tmp_path):
    "Ids of views and charts come from what they show: a fresh kernel gives the same bytes."
    from nbclient import NotebookClient

    code = "import pandas as pd\nfrom kdnb import charts\npoints = pd.DataFrame({'series': 'a', 'student': ['a', 'b'], 'recall': [1., 2], 'precision': [2., 1]})\n" \
        "points = points.assign(**{p + e: points[p] for p in ('recall', 'precision') for e in ('_lo', '_hi')})\n" \
        "charts.linked(points, pd.DataFrame({'student': ['a', 'b'], 'text': 'x'}))"
    made = []
    for _ in range(2):
        cells = [nbformat.v4.new_code_cell(code, id="a"), nbformat.v4.new_code_cell("charts.scatter_texts(points.rename(columns={'recall': 'x', 'precision': 'y', 'student': 'text'}), 'A', 'B')", id="b")]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
        made.append([output for cell in notebook.cells for output in cell.outputs])
    assert len(made[0]) == 2
    assert made[0] == made[1]
