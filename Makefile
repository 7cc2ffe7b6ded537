# Two commands on a fresh machine: `make run` and `make test`. Both make their own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help run test check fix docs serve conformance accuracy peers bench browser clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.installed  ## Install what an estimate needs, and print one
	$(BIN)/estimate --model meta-llama/Llama-3.1-8B --gpu h100-80gb-sxm5

test: $(VENV)/.installed-dev  ## Install everything, and run every check
	$(MAKE) check
	$(BIN)/python -m pytest -n $(JOBS)

check: $(VENV)/.installed-dev  ## Lint, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.installed-dev  ## Format, and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-dev  ## Write the generated pages again
	$(BIN)/python docs/generate.py

serve: $(VENV)/.installed-dev  ## Start the web page on this machine
	$(BIN)/estimate serve

conformance: $(VENV)/.installed-dev  ## Analytic engine against dry run, the whole grid
	$(BIN)/python -m tests.conformance.report

accuracy: $(VENV)/.installed-dev  ## Records to calibrated ranges to docs/accuracy.md
	$(BIN)/python -m benchmarks.accuracy

peers: $(VENV)/.installed-dev  ## Other calculators on the published rows; installs each of them
	$(BIN)/python -m benchmarks.peers --install

bench: $(VENV)/.installed-dev  ## Speed of the estimate, of the command and of the dry run
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.dry_run

clean:  ## Remove the environment and every cache
	rm -rf $(VENV) .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name it with PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
