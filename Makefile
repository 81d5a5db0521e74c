# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first, once; nothing but Python 3.11+ is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEPENDS := pyproject.toml constraints.txt
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs docs-generate bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | awk -F': *' '{printf "make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Palmette needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-demo: $(DEPENDS) | $(BIN)/python
	@echo "Installing palmette into $(VENV) (once, a minute or two) ..."
	$(PIP) --editable ".[demo,onnx]"
	@touch $@

$(VENV)/.stamp-dev: $(DEPENDS) | $(BIN)/python
	@echo "Installing palmette and what its tests need into $(VENV) (once, about five minutes) ..."
	$(PIP) --editable ".[demo,onnx,zoo,hf,ray,openvino,executorch,width,search,evolution,dev]"
	@touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-docs: $(VENV)/.stamp-dev
	$(PIP) --editable ".[docs]"
	@touch $@

demo: $(VENV)/.stamp-demo ## shrink a small network on scikit-learn's digits, under two minutes
	$(BIN)/palmette demo --resume

test: $(VENV)/.stamp-dev ## the default tests
	$(PYTEST) -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.stamp-dev ## coverage of model families, 500 random networks, the kill test
	$(PYTEST) -n $(WORKERS) --dist worksteal -m slow --hypothesis-profile=slow --timeout=7200

lint: $(VENV)/.stamp-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## lay the code out, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-generate: $(VENV)/.stamp-dev ## rewrite the generated pages
	$(ONE_THREAD) $(BIN)/python docs/generate.py

docs: $(VENV)/.stamp-docs docs-generate ## build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.stamp-dev ## the benchmark behind the table of the README
	$(BIN)/python benchmarks/shrink_digits.py

clean: ## remove what was built, and the environment
	rm -rf $(VENV) site dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov .coverage
