# Every target sets up its environment first. VENV=path uses another environment, PYTHON=python3.12 another Python.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
# Keep numerical libraries from starting threads behind the recipe's back.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format miniature clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## create the environment and install the pinned packages
	@sh .ci/setup "$(PYTHON)" "$(VENV)"

demo: setup ## the whole pipeline on real Meta-World in ten minutes, no cluster needed
	@$(PY) -m jobs.launch demo --profile local

test: setup ## all tests but the slow ones
	$(PY) -m pytest

test-slow: setup ## the slow tests
	$(PY) -m pytest -m slow

check: setup ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup ## let ruff format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

miniature: setup ## the pipeline end to end with tiny budgets, two tasks and two ranks, twice
	rm -rf build/miniature
	$(PY) -m jobs.launch tests/recipes/miniature.toml --run-dir build/miniature
	$(PY) -m jobs.launch tests/recipes/miniature.toml --run-dir build/miniature
	$(PY) -m jobs.status build/miniature

clean: ## remove caches and what the miniature made; runs/ stays
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
