# make demo    a real model answers through the real path, then everything is stopped
# make test    every check and every test that needs no GPU (JOBS=4: tests in so many processes)
# make soak    200 faults on the real model: workers and controllers killed, links cut; minutes
# make test-cluster  a real `ray up` over several hosts (namespaces of this machine); needs root, and says what is missing
# make serve   serve the model in the foreground (ARGS="--http-port 8000 ...")
# make lint    the checks alone; make format fixes what can be fixed
# make bench   the figures of docs/performance.md, on this machine
SHELL := /bin/bash
PYTHON ?= python3
MODEL ?= smollm2-135m
JOBS ?= 2
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE # what is imported is compiled once: the packages are installed without

.DEFAULT_GOAL := help
.PHONY: help demo test soak test-cluster serve lint format bench model

help:
	@sed -n 's/^# //p' Makefile

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pilotfish needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[server,dev]'
	@touch $@

model: .venv/.ready
	@$(BIN)/pilotfish pull $(MODEL)

demo: model
	@$(BIN)/python -m pilotfish.cli.demo $(MODEL)

serve: model
	@$(BIN)/pilotfish serve $(MODEL) $(ARGS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .venv/lint && ln -sfn ../.. .venv/lint/pilotfish  # the repository root is the package, whatever its folder is called
	$(BIN)/mypy --num-workers $(JOBS)
	$(BIN)/lint-imports --no-cache
	PYTHON=$(BIN)/python proto/generate.sh --check

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: .venv/.ready
	@$(MAKE) --no-print-directory --jobs=2 model lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

soak: model
	$(BIN)/python -m pytest tests/controller/test_chaos.py -m slow $(ARGS)

test-cluster: .venv/.ready
	$(BIN)/python -m pytest tests/cluster -m hosts -rs $(ARGS)

bench: model
	$(BIN)/python benchmarks/bench_scheduler.py
	$(BIN)/python benchmarks/bench_vs_transformers.py
	$(BIN)/python benchmarks/bench_path.py
