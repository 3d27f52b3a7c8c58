# Everything here creates and uses .venv/ in this folder; nothing is needed before.
PYTHON ?= python3
RUNS ?= $(HOME)/.cache/fedllm/runs
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedllm needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed ## create .venv and install the tested set of packages

demo: $(VENV)/.installed ## four hospitals fine-tune a language model, privately and not
	$(BIN)/fedllm models pull smollm2-135m-instruct
	$(BIN)/fedllm run demo/icd10-dp-fedsb run.dir=$(RUNS)/demo-$(STAMP)/private
	$(BIN)/fedllm run demo/icd10-fedsb run.dir=$(RUNS)/demo-$(STAMP)/open
	@echo
	$(BIN)/fedllm show $(RUNS)/demo-$(STAMP)/private $(RUNS)/demo-$(STAMP)/open
	@echo "reports: $(RUNS)/demo-$(STAMP)/private/report.html and $(RUNS)/demo-$(STAMP)/open/report.html"

test: $(VENV)/.installed ## the whole test suite, two tests at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed ## lint, format, types, spelling, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/unit/test_architecture.py

bench: $(VENV)/.installed ## the benchmarks of tests/benchmarks, one by one
	for script in tests/benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
