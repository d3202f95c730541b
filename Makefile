SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two cores are enough for two test workers; each computes on one.
TEST_WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-crash test-networks bench check format docs clean

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## install everything into .venv, with the rankpress command in .venv/bin

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "Python 3.11 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)  ## train a network on handwritten digits and compress it through the service
	$(BIN)/python docs/demo/digits.py

test: $(INSTALLED)  ## run the tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

test-crash: $(INSTALLED)  ## the long proofs that no job is lost: kills, stops and cuts (at most 45 minutes)
	$(ONE_THREAD) $(BIN)/python -m pytest -m full --timeout 1800

test-networks: $(INSTALLED)  ## compress every network of the corpus and use what comes of it (about 4 minutes on two idle cores)
	$(ONE_THREAD) $(BIN)/python -m pytest tests/engine/networks -m 'networks or not full' -n $(TEST_WORKERS) --dist worksteal

bench: $(INSTALLED)  ## measure speed against its limits (minutes; wants an idle machine)
	status=0; for name in lstep cstep upload overhead api queue checkpoint idle; do $(BIN)/python -m benchmarks.$$name || status=1; done; exit $$status

check: $(INSTALLED)  ## lint, format, types, import rules, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m service.openapi --check

docs: $(INSTALLED)  ## write the pages of docs/ that are made from the code
	$(BIN)/python -m service.openapi

format: $(INSTALLED)  ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, but not .venv
	rm -rf build dist demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
