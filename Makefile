# Poet's commands. `make` lists them.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROMPT ?= a large red star rises on a navy background with a low flute sound
CLIP ?= demo.mp4
TESTS ?=
TOO_OLD := "Poet needs Python 3.11 or newer, but $(PYTHON) is older: make setup PYTHON=/path/to/a/newer/python"

# OpenMP's threads spin while they wait, against everything else on the machine: ten times slower on a busy one.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format serve bench nano golden lock clean

help:  ## list these commands
	@awk -F ':.*##  *' '/^[a-z-]+:.*##/ { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with every package at its locked version (a few minutes, once)

$(READY): requirements/cpu.txt requirements/install.py pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "Poet needs Python 3.11 or newer: $(PYTHON) was not found" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit($(TOO_OLD) if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python requirements/install.py
	@touch $@

demo: $(READY)  ## write a clip from a sentence with the shipped model, and show what is in it
	$(BIN)/poet generate "$(PROMPT)" -o $(CLIP)
	$(BIN)/poet info $(CLIP)

test: $(READY)  ## run the test suite; TESTS="tests/poet -k scene" runs a part of it
	$(BIN)/python -m pytest --durations=15 $(TESTS)

test-slow: $(READY)  ## run the tests that take minutes
	$(BIN)/python -m pytest --durations=15 -m slow $(TESTS)

check: $(READY)  ## formatting, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy requirements
	$(BIN)/lint-imports --no-logo

format: $(READY)  ## put every file in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: $(READY)  ## serve the shipped model over HTTP, with a page to chat with, at http://127.0.0.1:8000
	$(BIN)/poet serve

bench: $(READY)  ## measure this machine
	PATH="$(abspath $(BIN)):$$PATH" bash recipes/benchmarks/run.sh

nano: $(READY)  ## train the shipped model from nothing
	PATH="$(abspath $(BIN)):$$PATH" bash recipes/nano/train.sh

golden: $(READY)  ## write the golden files of the tests anew
	$(BIN)/python tests/golden/regenerate.py

lock: $(READY)  ## resolve requirements/cpu.txt again; UPGRADE=1 takes the newest versions
	$(BIN)/python requirements/lock.py $(if $(UPGRADE),--upgrade)

clean:  ## delete caches, build leftovers and the demo clip (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis $(CLIP)
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
