# make install | quickstart | test | test-full | lint | bench | docs
#
# `make install TORCH=` keeps the torch that the machine's Python already has; `make PYTHON=python3.12 install` picks
# another interpreter. Installing happens once: it is redone only when a requirements file or setup.py changes.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# DeepSpeed compiles its kernels when they are first used, and only those.
export DS_BUILD_OPS := 0

.PHONY: install install-dev quickstart test test-full lint format bench docs clean

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

$(VENV)/installed: requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(BIN)/python -m pip install --quiet --upgrade setuptools wheel
	@# torch alone and first: for its CPU build where the index offers one, and so that nothing else chooses it.
	$(if $(TORCH),$(BIN)/python -m pip install --quiet $(TORCH))
	grep -v '^torch==' requirements.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

quickstart: install
	$(BIN)/omnivl pretrain configs/plans/quickstart.yaml

# Tests that need a GPU or a Slurm of their own skip themselves where there is none, and say so.
test: install-dev
	$(BIN)/python -m pytest -q --durations=25 tests

# With those that take long: every layout of every kind of stage, every fault.
test-full: install-dev
	$(BIN)/python -m pytest -q --full tests

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m engine.plan.reference --check

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install-dev
	$(BIN)/python -m benchmarks

docs: install
	$(BIN)/python -m engine.plan.reference

clean:
	rm -rf $(VENV) build dist *.egg-info
