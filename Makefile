VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# Nothing is left outside this folder; pip keeps the real home, where its settings may live.
# Networks this small run fastest on one thread.
CACHE := $(CURDIR)/.cache
export PIP_NO_CACHE_DIR = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TMPDIR = $(CACHE)/tmp
export XDG_CACHE_HOME = $(CACHE)
export MPLCONFIGDIR = $(CACHE)/matplotlib
# Tests start many short processes, which all use what the first compiled.
RUN := HOME=$(CACHE)/home XDG_CONFIG_HOME=$(CACHE)/config OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

# Workers of one thread each, one a core; a worker takes up to 3 GB
WORKERS ?= logical
PYTEST := $(RUN) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
COVERAGE ?=
MEASURED := --cov=clkit --cov=strategies --cov=scenarios --cov-report=term:skip-covered

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint types imports docs example check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Train with experience replay on split digits and draw the stability gap (under a minute)
	$(RUN) $(BIN)/clkit train experiment=demo resume=false

test: $(VENV)/.test-installed ## Run all tests, as many at a time as there are cores (COVERAGE=1 measures coverage)
	$(PYTEST) $(if $(COVERAGE),$(MEASURED)) --durations=20

quick: $(VENV)/.test-installed ## Run the tests that are not slow
	$(PYTEST) -m "not slow"

lint: $(VENV)/.test-installed ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test-installed ## Check types
	$(BIN)/mypy

imports: $(VENV)/.test-installed ## Check that the core knows no strategy by name
	$(BIN)/python tools/check_imports.py

docs: $(VENV)/.docs-installed ## Build the documentation into site/
	$(RUN) $(BIN)/python tools/docs_figures.py
	NO_MKDOCS_2_WARNING=1 $(RUN) $(BIN)/python -m mkdocs build --quiet --strict

example: $(VENV)/.test-installed ## Install the example of a plug-in and run its tests
	$(BIN)/python -m pip install --quiet --no-deps -e examples/clkit_example_plugin
	cd examples/clkit_example_plugin && $(RUN) $(abspath $(BIN))/python -m pytest

check: lint types imports test ## All of the above

clean: ## Remove the environment and all caches; runs/ and data/ stay
	rm -rf $(VENV) .cache site build dist clkit.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "clkit needs Python 3.10 or newer; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python $(TMPDIR)
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.test-installed: pyproject.toml | $(BIN)/python $(TMPDIR)
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.docs-installed: pyproject.toml | $(BIN)/python $(TMPDIR)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@ $(VENV)/.installed

$(TMPDIR):
	@mkdir -p $@
