# Two commands on a fresh machine: `make demo` and `make test`; each does the set-up it needs.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test lint bench clean
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "holdfast needs Python 3.11 or newer; make PYTHON=python3.11 picks one")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/holdfast demo --out runs/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Slow proofs behind the README's figures; each prints its table and keeps it with today's date.
bench: setup
	for name in startup objective step step_time sampling cache resume demo probes gate rewind fisher context_frozen lab levers ordering real_input; do \
	  $(BIN)/python benchmarks/$$name.py | tee benchmarks/results/$$(date +%F)-$$name.txt || exit 1; \
	done

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
