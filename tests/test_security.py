"""Nobody gets in: what is read is data and never runs, what is written stays in its folder, and bytes that are not ours have one clear error."""

import json
import logging
import os
import pickle
import re
import string
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_chaos import tiny_model
from test_grid import MEASURE, cell, write_notebook, write_run
from test_grid import folder as folder

from kdnb import report, store
from kdnb.core import make_rng
from kdnb.grid import Job, is_finished, main
from kdnb.lm import load_lm, load_tokens, save_tokens, toy_lm
from kdnb.params import ParamsError, cells, load_run
from kdnb.store import MANIFEST, Recipe, artifact, find_fault, read_sealed, seal, write_json
from kdnb.training import Checkpoint

FUZZ = [200, pytest.param(10_000, marks=pytest.mark.chaos)]  # examples


class Bomb:
    "A pickle that leaves a mark where it is loaded."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    "A file that must never appear."
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "went off")))
    assert (tmp_path / "went off").exists()


# --- pickles and code in model folders ----------------------------------------------------------


def edit(path, **more):
    write_json(path, {**json.loads(path.read_text()), **more})


def as_pickle(place, mark, name="pytorch_model.bin"):
    (place / "model.safetensors").unlink()
    torch.save({"w": Bomb(mark)}, place / name)


def as_raw_pickle(place, mark):
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))


def by_index(place, mark):
    as_pickle(place, mark)
    write_json(place / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}})


def by_config(place, mark):
    as_pickle(place, mark, "adapter_model.bin")
    edit(place / "config.json", transformers_weights="adapter_model.bin")


REFUSED = "^source must be a readable model folder with safetensors weights and a tokenizer, got [^ ]+: "


@pytest.mark.parametrize(
    ("plant", "why"),
    [(as_pickle, "Error no file named model.safetensors found in directory"), (as_raw_pickle, "Error no file named model.safetensors found in directory"),
     (by_index, "pytorch_model.bin is no safetensors file$"), (by_config, "adapter_model.bin is no safetensors file$")],
)
def test_a_pickle_of_weights_is_never_loaded(tmp_path, mark, monkeypatch, plant, why):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    source = tiny_model(tmp_path / "model")
    plant(source, mark)
    with pytest.raises(ValueError, match=REFUSED + why) as error:
        load_lm(source)
    assert len(str(error.value).splitlines()) == 1


def test_a_pickle_beside_good_weights_is_ignored(tmp_path, mark, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    source = tiny_model(tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (source / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert load_lm(source).vocab_size == 64


def own_code(place, mark):
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "custom_generate/generate"):
        (place / f"{name}.py").parent.mkdir(exist_ok=True)
        (place / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")


MAPS = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_never_runs(tmp_path, mark, file):
    source = tiny_model(tmp_path / "model")
    own_code(source, mark)
    strange = {"model_type": "evil", "architectures": ["Evil"]} if file == "config.json" else {"tokenizer_class": "Evil"}
    edit(source / file, auto_map=MAPS, **strange)
    with pytest.raises(ValueError, match=REFUSED) as error:
        load_lm(source)
    assert str(error.value).endswith("it needs code of its own, which is never run")


def test_code_that_is_not_needed_is_ignored(tmp_path, mark):
    "Many published models carry code for older versions of transformers beside weights that it knows by itself."
    source = tiny_model(tmp_path / "model")
    own_code(source, mark)
    edit(source / "config.json", auto_map=MAPS)
    lm = load_lm(source)
    lm.sample(2, make_rng(0))
    assert lm.vocab_size == 64


@pytest.mark.parametrize("name", ["data.pkl", "pytorch_model.bin", "__init__.py", "tokens.pickle"])
def test_a_pickle_among_artifacts_is_not_touched(tmp_path, mark, monkeypatch, name):
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "store"))
    made = artifact("truth", {}, lambda place: save_tokens(toy_lm().sample(4, make_rng(0)), place))
    (made.path / name).write_bytes(pickle.dumps(Bomb(mark)))
    (made.path.parent / name).write_bytes(pickle.dumps(Bomb(mark)))
    store._sound.clear()
    again = artifact("truth", {}, print)
    assert not again.built
    assert load_tokens(again.path).ids.shape == (4, 4)


@pytest.mark.parametrize("name", ["tokens.parquet", "next_log_prob.safetensors"])
def test_a_pickle_in_the_place_of_a_shard(tmp_path, mark, name):
    save_tokens(toy_lm().sample(4, make_rng(0)), tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=r"tokens\.parquet must be a whole file that save_tokens wrote, got \w+: "):
        load_tokens(tmp_path)


def test_the_package_has_no_unpickling_and_no_eval():
    "Libraries may have both; this package calls neither."
    found = re.compile(r"\b(pickle|shelve|marshal|dill)\b|torch\.load|\beval\(|\bexec\(|allow_pickle=True|trust_remote_code=True|yaml\.(unsafe_|full_)?load\((?!path)|shell=True|os\.system")
    lines = [f"{p.name}: {line.strip()}" for p in Path(store.__file__).parent.rglob("*.py") for line in p.read_text().splitlines() if found.search(line)]
    assert [line for line in lines if not re.search(r"\.eval\(\)|# .*pickle|\".*pickle", line)] == []


# --- nothing is written outside -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "toy/single", "toy/summary", "toy/.unused"])
def test_a_link_does_not_lead_a_run_outside(folder, capsys, name):
    outside = folder / "outside"
    outside.mkdir()
    (outside / "log.txt").write_text("precious")
    file = write_run(folder, "", MEASURE)
    place = folder / "reports" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)
    assert main([file, "-q"]) == 2
    assert re.fullmatch(rf"kdnb_run: {re.escape(place.name)} must be inside .*/reports(/toy)?, got a link to {outside}; remove it\n", capsys.readouterr().err)
    assert [p.name for p in outside.iterdir()] == ["log.txt"]


@pytest.mark.parametrize("name", ["../up", "..", "/etc/passwd", "a/b"])
def test_a_run_file_elsewhere_keeps_its_reports_here(folder, name):
    "Only the stem of its name counts."
    with pytest.raises(ParamsError):
        load_run(f"{name}.yaml")


# --- pages --------------------------------------------------------------------------------------


def test_every_page_carries_its_policy(tmp_path):
    place = tmp_path / "reports" / "run" / "x=1"
    place.mkdir(parents=True)
    chart = {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "data": {"values": [{"a": 1}]}, "mark": "point", "encoding": {"x": {"field": "a", "type": "quantitative"}}}
    drawn = cell("c", "chart")
    drawn["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {report.VEGALITE_MIME: chart, "text/plain": "chart"}}]
    write_notebook(place / "notebook.ipynb", cell("t", "# Title\n\n$x^2$", kind="markdown"), drawn)
    pages = [report.render(place / "notebook.ipynb", place / "report.html"), report.index(tmp_path / "reports")]
    for page in pages:
        text = page.read_text()
        (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
        assert text.index("Content-Security-Policy") < min(text.index("<style"), text.index("<script"))
        rules = {name: rest.split() for name, _, rest in (rule.strip().partition(" ") for rule in policy.replace("&#39;", "'").split(";"))}
        scripts = re.findall(r"(?s)<script>(.*?)</script>", text)
        assert rules["default-src"] == ["'none'"]
        assert rules["script-src"] == report.content_policy(scripts).split("script-src ")[1].split(";")[0].split()  # its own scripts by their hash, and nothing else
        assert rules["base-uri"] == rules["form-action"] == ["'none'"]
        assert rules["img-src"] == rules["font-src"] == ["data:"]
        assert set(rules) == {"default-src", "img-src", "font-src", "style-src", "script-src", "base-uri", "form-action"}  # and no connect-src: nothing is sent
    assert len(re.findall("<script>", pages[0].read_text())) == 4


# --- any bytes ----------------------------------------------------------------------------------


def fuzz(examples, check, *strategies, **more):
    settings(max_examples=examples, derandomize=True, database=None, deadline=None)(given(*strategies, **more)(check))()


@st.composite
def spoilt(draw, whole):
    "Bytes that were ours, after some accidents."
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "lose"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


GOOD = """notebook: toy.ipynb
summary: end.ipynb
params: {n: 5, free: [1, {a: b}], name: "x"}
grid: {rate: [1, 0.25, 5e-4], flag: [true, false]}
cases: {toy: {tau: 0.5}}
workers: 3
timeout_s: 60
"""
WORDS = [*string.printable, *"!!int |!!float |!!timestamp |!!binary |!!set |!!omap |!!bool |!!python/object:os.system |&a |*a|<<: |0x_|0b|1:99|2020-13-45|2020-01-01|.nan|.inf|1e999|~|---\n|? |'|\"\\uD800\"|\"\\0\"|\"\\x85\"|{|}|[|]|: |- |, |\n|\n  |#|%|@".split("|"), "9" * 5000,
         *"notebook: toy.ipynb\n|notebook: |summary: |params: |grid: |cases: |workers: |n: |free: |rate: |toy|{n}|{free}.ipynb|/|..|/dev/null".split("|")]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates() | st.datetimes() | st.binary(max_size=5) | st.sampled_from(["toy.ipynb", "{n}.ipynb", "/", "\0", "x" * 300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["n", "free", "rate", "toy", "a"]) | st.text(max_size=3) | st.integers(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["notebook", "summary", "params", "grid", "cases", "workers", "timeout_s", "other"])
def dumped(found):
    return yaml.dump({"notebook": "toy.ipynb", **found}).encode("utf-8", "surrogatepass")


TEXTS = (
    spoilt(GOOD.encode())
    | VALUES.map(lambda value: dumped({"params": {"free": value}}))
    | st.lists(VALUES, min_size=1, max_size=3).map(lambda values: dumped({"grid": {"free": values}}))
    | st.lists(st.sampled_from(WORDS), max_size=25).map(lambda words: "".join(words).encode("utf-8", "surrogatepass"))
    | st.dictionaries(KEYS, VALUES, max_size=6).map(dumped)
    | st.binary(max_size=60)
)


@pytest.mark.parametrize("examples", FUZZ)
def test_any_run_file_is_read_or_refused_in_lines_of_its_own(folder, examples):
    parameters = "n = 10\nrate = 0.5\nname = 'x'\nflag = False\nsizes = [1]\nfree = None\ntau: float | str = 1.0"
    for name in ("toy", "end"):
        write_notebook(folder / f"{name}.ipynb", cell("p", parameters, "parameters"))

    def check(text):
        (folder / "run.yaml").write_bytes(text)
        made, said = [], []
        try:
            made = cells(load_run(folder / "run.yaml"))
        except ParamsError as e:
            said = e.lines
        assert bool(made) != bool(said)
        assert all(line.startswith(f"{folder / 'run.yaml'}: ") for line in said)
        for found in made:
            assert (folder / found.name).resolve().parent == folder.resolve()
            write_json(folder / "params.json", found.params)  # as its status will be

    fuzz(examples, check, TEXTS)


COLUMN = st.sampled_from([
    pa.array([[1, 2], [3]], pa.list_(pa.int32())), pa.array([[1, 2], None], pa.list_(pa.int32())), pa.array([[1, None], [3]], pa.list_(pa.int32())),
    pa.array([[], []], pa.list_(pa.int32())), pa.array([[1.0, 2.0], [3.0]], pa.list_(pa.float32())), pa.array([[1.0], [3.0]], pa.list_(pa.float32())),
    pa.array([[1, 2], [3]], pa.list_(pa.int64())), pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)), pa.array(["a", "b"]), pa.array([1, 2]), pa.array([b"", None]),
    pa.array([{"a": 1}, None]), pa.nulls(2), pa.array([[[1]], [[2]]]),
])
NOTES = st.sampled_from([None, b"", b"{", b"[]", b"7", b'{"width": 2}', b'{"width": 3}', b'{"width": 1}', b'{"width": -1}', b'{"width": 2.5}', b'{"width": "2"}', b'{"width": null}', b'{"width": true}', b"\xff", b"[" * 5000])


@pytest.mark.parametrize("examples", FUZZ)
def test_any_shard_is_read_or_refused_in_one_line(tmp_path, examples):
    lm = toy_lm()
    save_tokens(lm.sample(6, make_rng(0)), tmp_path)
    whole = (tmp_path / "tokens.parquet").read_bytes()

    def check(data):
        if isinstance(data, bytes):
            (tmp_path / "tokens.parquet").write_bytes(data)
        else:
            columns, notes = data
            table = pa.table(columns).replace_schema_metadata(None if notes is None else {"kdnb": notes})
            parquet.write_table(table, tmp_path / "tokens.parquet")
        tokens, said = None, ""
        try:
            tokens = load_tokens(tmp_path)
        except ValueError as e:
            said = str(e)
        if tokens is None:
            assert re.fullmatch(r".*/tokens\.parquet must be a whole file that save_tokens wrote, got .+", said), said
        else:
            assert tokens.length.shape == tokens.ids.shape[:1]
            assert all(0 <= n <= tokens.ids.shape[1] for n in tokens.length.tolist())

    tables = st.tuples(st.dictionaries(st.sampled_from(["ids", "log_prob", "entropy", "other"]), COLUMN, min_size=1), NOTES)
    fuzz(examples, check, spoilt(whole) | tables | st.binary(max_size=100))


@pytest.mark.parametrize("examples", FUZZ)
def test_any_manifest_status_and_checkpoint(tmp_path, monkeypatch, examples, caplog):
    "Any other bytes than those that were written count as damage."
    caplog.set_level(logging.CRITICAL, "kdnb")
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "store"))
    recipe = Recipe("s", {"n": 1, "text": "ü"}, lambda place: (place / "data.bin").write_bytes(b"data"))
    manifest = artifact(recipe).path / MANIFEST
    whole = manifest.read_bytes()
    job = Job("x", tmp_path / "n.ipynb", tmp_path, {}, "f")
    checkpoint = Checkpoint(tmp_path / "halfway")

    def check(data):
        manifest.write_bytes(data)
        (tmp_path / "status.json").write_bytes(data)
        (tmp_path / "halfway").mkdir(exist_ok=True)
        (tmp_path / "halfway" / "state.json").write_bytes(data)
        same = read_sealed(manifest) == read_sealed_bytes(whole)
        assert (find_fault(recipe.folder) == "") == same
        if not same:
            assert find_fault(recipe.folder) == "manifest.json is not as written"
            assert not is_finished(job)
            assert checkpoint.read({}) is None

    def read_sealed_bytes(data):
        facts = json.loads(data)
        assert facts.pop("seal") == seal(facts)
        return facts

    values = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("seal"), inner), max_leaves=8)
    fuzz(examples, check, spoilt(whole) | values.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=50) | st.just(b"[" * 100_000) | st.just(whole))
