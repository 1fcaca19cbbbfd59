# Every target first sets up its environment. VENV=path uses another environment, PYTHON=python3.12 another Python.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
# The recipe sets the number of threads; without this, numerical libraries start one per core.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo figures test test-slow test-chaos test-mutations test-slurm test-slurm-slow check format miniature slurm-up slurm-down slurm-demo clean
.PHONY: bench-env bench-evaluation bench-teacher bench-moe bench-distill bench-scale bench-ddp bench-device bench-dpp bench-data bench-stream bench-slurm
SLURM_STATE ?= /tmp/cpd-slurm-$(shell id -u)

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## create the environment and install the pinned packages
	@sh .ci/setup "$(PYTHON)" "$(VENV)"

demo: setup ## the whole pipeline on real Meta-World in four to eight minutes, no cluster needed
	@$(PY) -m jobs.launch demo --profile local

figures: setup ## draw every published figure and table again, offline, in about 6 core-minutes
	@$(PY) -m analysis.draw_published

# By file: fixtures that a file's tests share are made once. In file order: pytest-xdist would begin with the files of
# many tests, but those of few take longest. Tests under MPI run alone: ranks that wait keep their cores busy.
test: setup ## all tests but the slow ones
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 25 --ignore tests/mpi
	$(PY) -m pytest tests/mpi --durations 10

test-slow: setup ## the slow tests
	$(PY) -m pytest -m 'slow and not slurm'

test-chaos: setup ## the miniature run with 200 SIGKILLs in all of its phases; it must end with the same bits
	$(PY) -m pytest tests/faults --ignore tests/faults/test_mutations.py -m slow

test-mutations: setup ## 2,000 damaged files: harmless, or refused by name
	$(PY) -m pytest tests/faults/test_mutations.py -m slow

test-slurm: setup ## the tests against a real Slurm that is started on this machine
	$(PY) -m pytest tests/testbed -rs --durations 25 -m 'slurm and not slow'

test-slurm-slow: setup ## the slow Slurm tests: many failures in one run, time limits, rarer settings
	$(PY) -m pytest tests/testbed -rs -m 'slurm and slow'

check: setup ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup ## let ruff format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

miniature: setup ## the pipeline end to end with tiny budgets and two tasks, twice
	rm -rf build/miniature
	$(PY) -m jobs.launch tests/recipes/miniature.toml --run-dir build/miniature
	$(PY) -m jobs.launch tests/recipes/miniature.toml --run-dir build/miniature
	$(PY) -m jobs.status build/miniature

slurm-up: setup ## start a real Slurm on this machine: a controller and two virtual nodes
	@$(PY) -m slurm.testbed --state $(SLURM_STATE) up

slurm-down: setup ## stop that Slurm
	@$(PY) -m slurm.testbed --state $(SLURM_STATE) down

slurm-demo: slurm-up ## the demo on that Slurm: job arrays, dependencies, MPI through srun
	SLURM_CONF=$(SLURM_STATE)/slurm.conf $(PY) -m jobs.launch demo --profile testbed --run-dir runs/slurm-demo
	SLURM_CONF=$(SLURM_STATE)/slurm.conf $(PY) -m jobs.status runs/slurm-demo --watch
	@# Again: nothing is left to submit, so this prints the results.
	SLURM_CONF=$(SLURM_STATE)/slurm.conf $(PY) -m jobs.launch demo --profile testbed --run-dir runs/slurm-demo

bench-env: setup ## accelerated and vector environments against stock Meta-World
	$(PY) -m tests.bench.bench_env

bench-evaluation: setup ## evaluating a stream of fifty tasks: thinned cells and prepared passes against plain ones
	$(PY) -m tests.bench.bench_evaluation

bench-teacher: setup ## where a PPO iteration's time goes; time to 95 % success against stable-baselines3
	$(PY) -m tests.bench.bench_teacher
	@# In its own folder: a reference to measure against is no dependency.
	@[ -d build/bench/stable_baselines3 ] || $(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target build/bench -r requirements-bench.lock
	PYTHONPATH=build/bench $(PY) -W ignore -m tests.bench.bench_learners

bench-moe: setup ## the mixture of experts against a plain loop and a dense layer
	$(PY) -m tests.bench.bench_moe

bench-distill: setup ## a distillation step
	$(PY) -m tests.bench.bench_distill

bench-scale: setup ## a step over the size of student, batch and stream: time, memory, share of the peak
	$(PY) -m tests.bench.bench_scale

bench-ddp: setup ## two ranks against torch's DistributedDataParallel, and weak scaling
	$(PY) -m tests.bench.bench_ddp

bench-device: setup ## distillation and acting on the CPU and on CUDA
	$(PY) -m tests.bench.bench_device

bench-dpp: setup ## DPP selection against the published algorithm
	$(PY) -m tests.bench.bench_dpp

bench-data: setup ## shards to tensors against raw reading; memory of a stage of 10 GB
	$(PY) -m tests.bench.bench_data

bench-stream: setup ## a stream of 500 synthetic tasks against one of 50: step, memory, disk; resumes
	$(PY) -m tests.bench.bench_stream

bench-slurm: setup ## submitting an array of fifty, and the status of a hundred elements
	$(PY) -m tests.bench.bench_slurm

clean: ## remove caches and build/; runs/ stays
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
