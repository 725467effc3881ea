# make install | quickstart | test | test-full | lint | bench | docs
#
# `make install TORCH=` keeps the torch that the machine's Python already has; `make PYTHON=python3.12 install` picks
# another interpreter. Installing happens once: it is redone only when a requirements file or setup.py changes.
#
# On Linux with the Pythons of .ci/lock.py only files with the SHA-256 of requirements.lock are taken; torch, whose build
# differs between machines, by version. `make install LOCK=` takes everything by version, as other systems do.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
LOCK ?= 1
BIN := $(VENV)/bin
# DeepSpeed compiles its kernels when they are first used, and only those.
export DS_BUILD_OPS := 0

# The files of NAME.lock, or what NAME.txt says. Nothing chooses a torch here: it comes on its own, afterwards.
define install_pinned
	@if [ -n "$(LOCK)" ] && $(BIN)/python .ci/lock.py covers; then \
		echo "installing the files of $(1).lock"; \
		$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $(1).lock; \
	else \
		echo "installing $(1).txt by version, without hashes"; \
		grep -v '^torch==' $(1).txt > $(VENV)/$(1).txt && $(BIN)/python -m pip install --quiet -r $(VENV)/$(1).txt; \
	fi
endef

.PHONY: install install-dev quickstart test test-full lint format bench docs lock clean

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

$(VENV)/installed: requirements.txt requirements.lock setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	@# torch alone: for its CPU build where the index offers one, and so that nothing else chooses it. By version it has
	@# to come first; beside the locks it comes last, so that it takes their libraries.
	$(if $(TORCH),$(BIN)/python .ci/lock.py covers && [ -n "$(LOCK)" ] || $(BIN)/python -m pip install --quiet $(TORCH))
	$(call install_pinned,requirements)
	$(if $(TORCH),$(BIN)/python -m pip install --quiet $(TORCH))
	$(BIN)/python -m pip install --quiet 'setuptools>=69' wheel
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-dev.lock
	$(call install_pinned,requirements-dev)
	touch $@

quickstart: install
	$(BIN)/omnivl pretrain configs/plans/quickstart.yaml

# Unit tests, side by side on all cores, then those that start processes of their own, two at a time: two reports.
SIDE_BY_SIDE := --dist=loadfile --numprocesses=logical
define run_tests
	@status=0; \
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --maxprocesses=8 $(1) tests/unit || status=$$?; \
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --maxprocesses=2 $(1) --ignore=tests/unit tests || status=$$?; \
	exit $$status
endef

# Tests that need a GPU or a Slurm of their own skip themselves where there is none, and say so.
test: install-dev
	$(call run_tests,--durations=25)

# With those that take long: every layout of every kind of stage, every fault.
test-full: install-dev
	$(call run_tests,--full)

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

# After a change of requirements*.txt, on Linux with Python 3.11.
lock: install
	$(BIN)/python .ci/lock.py write

clean:
	rm -rf $(VENV) build dist *.egg-info
