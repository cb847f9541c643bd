"""Bad parameters are found before anything runs, all together, one readable line each."""

import json
from pathlib import Path

import pytest

from kdnb.params import MODELS, Cell, GmmParams, ParamsError, Resources, SmolLM2Params, cells, find_problems, load_run, params_model, read_parameters

EXPERIMENTS = Path(__file__).parents[1] / "nbs" / "experiments"


@pytest.fixture
def folder(tmp_path):
    write_notebook(tmp_path / "toy.ipynb", "n = 10  # points\nrate = 0.5\nname = 'x'\nflag = False\nsizes = [1, 2]\nfree = None\ntau: float | str = 1.0\n_hidden = 3\n")
    return tmp_path


def write_notebook(path, parameters):
    cell = {"cell_type": "code", "id": "p", "metadata": {"tags": ["parameters"]}, "source": parameters, "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def write_run(folder, text, name="run.yaml"):
    (folder / name).write_text(text)
    return folder / name


def lines(path) -> list:
    with pytest.raises(ParamsError) as error:
        load_run(path)
    return [line.removeprefix(f"{path}: ") for line in str(error.value).splitlines()]


# --- good files ---------------------------------------------------------------------------------


def test_everything_said(folder):
    write_notebook(folder / "end.ipynb", "")
    run = load_run(write_run(folder, "notebook: toy.ipynb\nsummary: end.ipynb\nparams: {n: 5}\ngrid: {rate: [1, 0.25], flag: [true, false]}\nworkers: 3\ntimeout_s: 60\nresources: {cpus: 2, gpus: 0.5, memory_gb: 4}"))
    assert run.resources == Resources(cpus=2, gpus=0.5, memory_gb=4)
    assert (run.name, run.notebook, run.summary, run.workers, run.timeout_s) == ("run", folder / "toy.ipynb", folder / "end.ipynb", 3, 60.0)
    assert cells(run) == [
        Cell("rate=1,flag=true", {"n": 5, "rate": 1.0, "flag": True}, folder / "toy.ipynb"),
        Cell("rate=1,flag=false", {"n": 5, "rate": 1.0, "flag": False}, folder / "toy.ipynb"),
        Cell("rate=0.25,flag=true", {"n": 5, "rate": 0.25, "flag": True}, folder / "toy.ipynb"),
        Cell("rate=0.25,flag=false", {"n": 5, "rate": 0.25, "flag": False}, folder / "toy.ipynb"),
    ]


def test_almost_nothing_said(folder):
    run = load_run(write_run(folder, "notebook: toy.ipynb\nparams:\n"))
    assert (run.summary, run.workers, run.timeout_s, run.resources) == (None, 1, None, Resources())
    assert Resources().model_dump() == {"cpus": 1, "gpus": 0.0, "memory_gb": None}
    assert cells(run) == [Cell("single", {}, folder / "toy.ipynb")]


def test_summary_beside_the_notebook_is_found(folder):
    write_notebook(folder / "toy_summary.ipynb", "")
    assert load_run(write_run(folder, "notebook: toy.ipynb")).summary == folder / "toy_summary.ipynb"


def test_notebook_is_relative_to_the_run_file(folder, monkeypatch):
    (folder / "params").mkdir()
    monkeypatch.chdir("/")
    assert load_run(write_run(folder / "params", "notebook: ../toy.ipynb")).notebook == folder / "toy.ipynb"


@pytest.mark.parametrize(("text", "number"), [("5e-4", 5e-4), ("1E3", 1000.0), ("-2.5e1", -25.0), (".5e1", 5.0), ("3", 3.0), ("0.1", 0.1)])
def test_numbers_are_numbers(folder, text, number):
    assert cells(load_run(write_run(folder, f"notebook: toy.ipynb\nparams: {{rate: {text}}}")))[0].params == {"rate": number}


def test_a_thing_that_only_looks_like_a_number_is_text(folder):
    assert cells(load_run(write_run(folder, "notebook: toy.ipynb\nparams: {name: 5e-4x}")))[0].params == {"name": "5e-4x"}


# --- bad files: each message, quoted ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "run file must be a mapping with the keys notebook, summary, params, grid, cases, workers, timeout_s, resources, got [1, 2]"),
        ("", "run file must be a mapping with the keys notebook, summary, params, grid, cases, workers, timeout_s, resources, got None"),
        ("a: [", "line 1: expected the node content, but found '<stream end>'"),
        ("params: {n: 1}\nparams: {n: 2}", "line 2: params must be given once, got it twice"),
        ("notebook: !!python/object/apply:os.system ['true']", "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("{[1]: 2}", "line 1: found unhashable key"),
        ("params: {n: 1}", "notebook must be text of length >= 1, it is missing"),
        ("notebook: 3", "notebook must be text of length >= 1, got 3"),
        ("notebook: none.ipynb", "notebook must be a file, got none.ipynb; a path is relative to the run file"),
        ("notebook: toy.ipynb\nsummary: none.ipynb", "summary must be a file, got none.ipynb; a path is relative to the run file"),
        ("notebook: toy.ipynb\nparams: [n]", "params must be a mapping, got ['n']"),
        ("notebook: toy.ipynb\ngrid: 3", "grid must be a mapping, got 3"),
        ("notebook: toy.ipynb\nworkers: 0", "workers must be an integer >= 1, got 0"),
        ("notebook: toy.ipynb\nworkers: true", "workers must be an integer >= 1, got True"),
        ("notebook: toy.ipynb\nresources: 2", "resources must be a mapping, got 2"),
        ("notebook: toy.ipynb\nresources: {cpu: 2}", "cpu must be a key of resources, got 2; did you mean cpus?"),
        ("notebook: toy.ipynb\nresources: {cpus: 0}", "cpus must be an integer >= 1, got 0"),
        ("notebook: toy.ipynb\nresources: {cpus: 1.5}", "cpus must be an integer >= 1, got 1.5"),
        ("notebook: toy.ipynb\nresources: {gpus: -1}", "gpus must be a number >= 0, got -1"),
        ("notebook: toy.ipynb\nresources: {gpus: 1.5}", "gpus must be <= 1 or whole, got 1.5"),
        ("notebook: toy.ipynb\nresources: {memory_gb: 0}", "memory_gb must be a number > 0 or nothing, got 0"),
        ("notebook: toy.ipynb\ntimeout_s: .inf", "timeout_s must be a number > 0 or nothing, got inf"),
        ("notebook: toy.ipynb\nworker: 2", "worker must be a key of a run file, got 2; did you mean workers?"),
        ("notebook: toy.ipynb\n2: 2", "2 must be a key of a run file, got 2; known are notebook, summary, params, grid, cases, workers, timeout_s, resources"),
        ("notebook: toy.ipynb\nparams: {rat: 2}", "rat must be a key of toy.ipynb, got 2; did you mean rate?"),
        ("notebook: toy.ipynb\nparams: {n: 2.5}", "n must be an integer, got 2.5"),
        ("notebook: toy.ipynb\nparams: {rate: .nan}", "rate must be a number, got nan"),
        ("notebook: toy.ipynb\nparams: {rate: '1'}", "rate must be a number, got '1'"),
        ("notebook: toy.ipynb\nparams: {name: 1}", "name must be text, got 1"),
        ("notebook: toy.ipynb\nparams: {flag: 1}", "flag must be true or false, got 1"),
        ("notebook: toy.ipynb\nparams: {sizes: 1}", "sizes must be a list, got 1"),
        ("notebook: toy.ipynb\nparams: {tau: true}", "tau must be a number or text, got True"),
        ("notebook: toy.ipynb\ngrid: {ns: [1]}", "grid axis ns must be a key of toy.ipynb, got [1]; did you mean n?"),
        ("notebook: toy.ipynb\ngrid: {n: []}", "grid axis n must be a list of at least one value, got []"),
        ("notebook: toy.ipynb\ngrid: {n: 3}", "grid axis n must be a list of at least one value, got 3"),
        ("notebook: toy.ipynb\ngrid: {rate: [1, 2, 1.0]}", "grid axis rate must have distinct values, got 1.0 twice"),
        ("notebook: toy.ipynb\ngrid: {n: [1, x, 2]}", "n must be an integer, got 'x'"),
        ("notebook: toy.ipynb\nparams: {n: 1}\ngrid: {n: [1]}", "n must be in params or in grid, got both; remove one"),
    ],
)
def test_one_mistake_one_line(folder, text, message):
    assert lines(write_run(folder, text)) == [message]


def test_all_mistakes_at_once_each_with_its_file(folder):
    path = write_run(folder, "notebook: toy.ipynb\nparams: {n: x, flagg: 1}\ngrid: {rate: [], name: [a, a]}")
    with pytest.raises(ParamsError) as error:
        load_run(path)
    assert str(error.value).splitlines() == [
        f"{path}: grid axis rate must be a list of at least one value, got []",
        f"{path}: grid axis name must have distinct values, got 'a' twice",
        f"{path}: flagg must be a key of toy.ipynb, got 1; did you mean flag?",
        f"{path}: n must be an integer, got 'x'",
    ]


# --- one notebook per cell ----------------------------------------------------------------------


@pytest.fixture
def family(folder):
    for name, more in (("01_a", ""), ("02_b", "extra = 1\n")):
        write_notebook(folder / f"{name}.ipynb", f"n = 10\nrate = 0.5\n{more}")
    return folder


def test_an_axis_chooses_the_notebook(family):
    text = "notebook: '{method}.ipynb'\nsummary: toy.ipynb\nparams: {n: 5}\ngrid: {method: [01_a, 02_b], rate: [1, 2]}\ncases: {02_b: {n: 7, extra: 2}}"
    run = load_run(write_run(family, text))
    assert run.summary == family / "toy.ipynb"
    assert cells(run) == [
        Cell("method=01_a,rate=1", {"n": 5, "rate": 1.0}, family / "01_a.ipynb"),
        Cell("method=01_a,rate=2", {"n": 5, "rate": 2.0}, family / "01_a.ipynb"),
        Cell("method=02_b,rate=1", {"n": 7, "rate": 1.0, "extra": 2}, family / "02_b.ipynb"),
        Cell("method=02_b,rate=2", {"n": 7, "rate": 2.0, "extra": 2}, family / "02_b.ipynb"),
    ]


def test_a_chosen_folder_and_number_make_safe_names(family):
    (family / "sub" / "7").mkdir(parents=True)
    write_notebook(family / "sub" / "7" / "01_a.ipynb", "n = 1\n")
    (made,) = cells(load_run(write_run(family, "notebook: '{where}/{k}/01_a.ipynb'\ngrid: {where: [sub/../sub], k: [7]}")))
    assert made.notebook.samefile(family / "sub" / "7" / "01_a.ipynb")
    assert (family / made.name).resolve().parent == family


def test_cases_of_the_only_notebook(family):
    assert cells(load_run(write_run(family, "notebook: 02_b.ipynb\ncases: {02_b: {extra: 3}}")))[0].params == {"extra": 3}


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("grid: {methods: [01_a]}", ["notebook must be a file, got {method}.ipynb; a path is relative to the run file"]),
        ("grid: {method: [01_a, 03_c]}", ["notebook must be a file, got 03_c.ipynb; a path is relative to the run file"]),
        ("grid: {method: 01_a}", ["grid axis method must be a list of at least one value, got '01_a'"]),
        ("grid: {method: [01_a, 01_a]}", ["grid axis method must have distinct values, got '01_a' twice"]),
        ("grid: {method: [01_a]}\nparams: {method: 01_a}", ["method must be in params or in grid, got both; remove one"]),
        ("grid: {method: [01_a, 02_b]}\nparams: {extra: 2}", ["01_a.ipynb: extra must be a key of this notebook, got 2; known are n, rate"]),
        ("grid: {method: [01_a, 02_b], extra: [1, 2]}", ["01_a.ipynb: grid axis extra must be a key of this notebook, got [1, 2]; known are n, rate"]),
        ("grid: {method: [01_a, 02_b]}\nparams: {n: x}", ["01_a.ipynb: n must be an integer, got 'x'", "02_b.ipynb: n must be an integer, got 'x'"]),
        ("grid: {method: [01_a]}\nparams: {n: x}", ["n must be an integer, got 'x'"]),
        ("grid: {method: [01_a, 02_b]}\ncases: {02_b: {n: x}}", ["02_b.ipynb: n must be an integer, got 'x'"]),
        ("grid: {method: [01_a]}\ncases: {02_b: {n: 1}}", ["cases must name notebooks of this run, got 02_b; did you mean 01_a?"]),
        ("grid: {method: [01_a]}\ncases: {01_a: 3}", ["cases of 01_a must be a mapping, got 3"]),
        ("grid: {method: [01_a]}\ncases: [01_a]", ["cases must be a mapping, got ['01_a']"]),
        ("grid: {method: [01_a], n: [1]}\ncases: {01_a: {n: 1}}", ["n must be in cases or in grid, got both; remove one"]),
    ],
)
def test_mistakes_in_a_family(family, text, messages):
    assert lines(write_run(family, "notebook: '{method}.ipynb'\n" + text)) == messages


def test_braces_in_a_folder_choose_nothing(tmp_path):
    folder = tmp_path / "{b}"
    folder.mkdir()
    write_notebook(folder / "toy.ipynb", "n = 1\n")
    assert cells(load_run(write_run(folder, "notebook: toy.ipynb\ngrid: {n: [1]}")))[0].notebook == folder / "toy.ipynb"


def test_a_grid_beyond_reason_is_refused_quickly(folder):
    axes = {"n": list(range(1000)), "rate": [k / 10 for k in range(1000)]}
    assert lines(write_run(folder, json.dumps({"notebook": "toy.ipynb", "grid": axes}))) == ["grid must have at most 10000 cells, got 1000000"]


def test_missing_file_and_folder(folder):
    assert lines(folder / "none.yaml") == ["run file must be a file that can be read (No such file or directory)"]
    (folder / "dir.yaml").mkdir()
    assert lines(folder / "dir.yaml") == ["run file must be a file that can be read (Is a directory)"]


def test_not_text(folder):
    (folder / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert lines(folder / "run.yaml") == ["run file must be YAML text (UnicodeDecodeError)"]


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "n = ("}]}'])
def test_not_a_notebook(folder, content):
    (folder / "bad.ipynb").write_text(content)
    for text in ("notebook: bad.ipynb", "notebook: toy.ipynb\nsummary: bad.ipynb"):
        (line,) = lines(write_run(folder, text))
        assert line.startswith(f"notebook must be a Jupyter notebook with Python cells, got {folder / 'bad.ipynb'} (")


@pytest.mark.parametrize("name", ["...yaml", "a b.yaml", ".hidden.yaml", "published.yaml", "-x.yaml"])
def test_a_run_name_stays_in_the_reports_folder(folder, name):
    (line,) = lines(write_run(folder, "notebook: toy.ipynb", name))
    assert line == f"name of a run file must be letters, digits and _ . + - (not published), got {Path(name).stem!r}"


@pytest.mark.parametrize("value", ["../../etc", "a/b", "..", "/", "a" * 500, "a\nb", "a b", "x,y=z", "a\\b", ""])
def test_a_cell_name_is_one_short_part_of_a_path(folder, value):
    (cell,) = cells(load_run(write_run(folder, json.dumps({"notebook": "toy.ipynb", "grid": {"name": [value]}}))))
    assert (folder / cell.name).resolve().parent == folder
    assert len(cell.name) < 100
    assert cell.params == {"name": value}


def test_different_values_have_different_names(folder):
    values = ["a/b", "a_b", "a b", "a:b", "a" * 500, "a" * 501]
    made = cells(load_run(write_run(folder, json.dumps({"notebook": "toy.ipynb", "grid": {"name": values, "free": [None, 0, [1], "0,"]}}))))
    assert len({cell.name for cell in made}) == 24


# --- models -------------------------------------------------------------------------------------


def test_parameters_cell_is_read_without_running_it(folder):
    write_notebook(folder / "more.ipynb", "a: int = 1\nb: float = 1\nc = -2\nd = a + 1\ne: 'odd' = 'text'\nf: list[int] = [1]\nimport os\nraise SystemExit\n")
    found = read_parameters(folder / "more.ipynb")
    assert {k: v for k, (_, v) in found.items()} == {"a": 1, "b": 1, "c": -2, "d": None, "e": "text", "f": [1]}
    assert [found[k][0] for k in "abcef"] == [int, float, int, str, list]
    assert find_problems(params_model(folder / "more.ipynb"), {"b": 2.5, "d": "anything"}, "more.ipynb") == []


def test_no_parameters_cell(folder):
    (folder / "bare.ipynb").write_text('{"cells": []}')
    assert lines(write_run(folder, "notebook: bare.ipynb\nparams: {n: 1}")) == ["n must be a key of bare.ipynb, got 1; none is known"]


def test_a_copy_with_another_parameter_is_checked_by_types(folder):
    write_notebook(folder / "gmm.ipynb", "beta = 1.0\nnovel = 1\n")
    assert lines(write_run(folder, "notebook: gmm.ipynb\nparams: {n_seeds: 1, beta: x}")) == [
        "n_seeds must be a key of gmm.ipynb, got 1; known are beta, novel",
        "beta must be a number, got 'x'",
    ]


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (GmmParams, {"beta": 0}, "beta must be a number > 0, got 0"),
        (GmmParams, {"beta": float("inf")}, "beta must be a number > 0, got inf"),
        (GmmParams, {"n_seeds": 1}, "n_seeds must be an integer >= 2, got 1"),
        (GmmParams, {"covariance": "tied"}, 'covariance must be "diag" or "spherical" or "full", got \'tied\''),
        (GmmParams, {"teacher_components": 101}, "teacher_components must be <= n_train = 100, got 101"),
        (GmmParams, {"student_components": 30, "n_student": 20}, "student_components must be <= n_student = 20, got 30"),
        (SmolLM2Params, {"tau": 0}, 'tau must be "direct" or a number > 0, got 0'),
        (SmolLM2Params, {"tau": "Direct"}, 'tau must be "direct" or a number > 0, got \'Direct\''),
        (SmolLM2Params, {"vocab_size": 50_000}, "vocab_size must be an integer >= 8 and <= 49152, got 50000"),
        (SmolLM2Params, {"max_length": 8192}, "max_length must be an integer >= 1 and <= 8191, got 8192"),
        (SmolLM2Params, {"teacher_width": 100}, "teacher_width must be an integer >= 64 and a multiple of 64, got 100"),
        (SmolLM2Params, {"teacher_shape": "1.7b"}, 'teacher_shape must be "plain" or "135m" or "360m", got \'1.7b\''),
        (SmolLM2Params, {"student_shape": "135m", "student_width": 576}, "student_shape 135m must have student_width: 576, student_layers: 30, got 576 and 1"),
        (SmolLM2Params, {"n_scored": 2}, "n_scored must be an integer >= 3 or nothing, got 2"),
        (SmolLM2Params, {"micro_batch": 0}, "micro_batch must be an integer >= 1 or nothing, got 0"),
        (SmolLM2Params, {"device": "gpu"}, 'device must be "cpu" or "cuda" or "auto", got \'gpu\''),
        (SmolLM2Params, {"dtype": "float16"}, 'dtype must be "float32" or "bfloat16", got \'float16\''),
        (SmolLM2Params, {"processes": 0}, "processes must be an integer >= 1, got 0"),
        (SmolLM2Params, {"lr": 2}, "lr must be a number > 0 and <= 1, got 2"),
        (SmolLM2Params, {"prompt": ""}, "prompt must be text of length >= 1, got ''"),
        (SmolLM2Params, {"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_ranges(model, values, message):
    assert find_problems(model, values, "x.ipynb") == [message]


def test_every_run_file_of_the_project_is_valid():
    files = sorted((EXPERIMENTS.parents[1] / "params").glob("*.yaml"))
    assert {"gmm", "smollm2-smoke", "smollm2-laptop", "smollm2-gpu", "smollm2-paper"} <= {load_run(f).name for f in files}


def test_the_paper_tier_is_the_published_recipe():
    found = {c.params["tau"]: SmolLM2Params(**c.params) for c in cells(load_run(EXPERIMENTS.parents[1] / "params" / "smollm2-paper.yaml"))}
    assert list(found) == ["direct", 0.8, 0.875, 0.95, 1.0]
    p = found["direct"]
    assert (p.n_train, p.n_select, p.max_length, p.n_seeds, p.vocab_size) == (10_000_000, 100_000, 511, 5, 49_152)
    assert (p.teacher_shape, p.student_shape, p.teacher_epochs, p.student_epochs, p.batch_size, p.lr) == ("360m", "135m", 5, 1, 256, 5e-4)


@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_notebooks_parameters_cell(name):
    notebook = EXPERIMENTS / f"{name}.ipynb"
    if not notebook.exists():
        pytest.skip("this experiment is not there yet")
    assert {k: default for k, (_, default) in read_parameters(notebook).items()} == MODELS[name]().model_dump()
    assert params_model(notebook) is MODELS[name]


def test_a_notebook_run_by_hand_gives_the_same_errors():
    assert GmmParams.of(beta=5.0).beta == 5.0
    with pytest.raises(ParamsError, match=r"beta must be a number > 0, got -1\.0"):
        GmmParams.of(beta=-1.0)
