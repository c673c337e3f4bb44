# Everything a checkout needs: `make demo` to see it work, `make test` to know that it does.
# The virtual environment is made once; it is brought up to date when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# One process per core, and one thread in each: otherwise the processes' threads fight for the cores.
WORKERS ?= 2
# How many times as much `make fuzz` tries as the test suite does.
TIMES ?= 20

INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
SOURCES := src tests results

.PHONY: help demo test fuzz survive results lint format clean

help:
	@echo "make demo     train and compare small models in a few minutes, and write a report"
	@echo "              (ARGS=\"--scale smoke\" for seconds instead)"
	@echo "make test     run the whole test suite (ARGS=\"-k recipe\" for a part of it)"
	@echo "make survive  kill a run 20 times, resume it, and compare it with an undisturbed one"
	@echo "              (some minutes; ARGS=\"--kills 3\" for fewer)"
	@echo "make fuzz     give the command line many times as much bad input"
	@echo "make results  make the tables and plots in results/ again from results/runs.csv"
	@echo "make lint     check style, format and types"
	@echo "make format   put the code into the common format"
	@echo "make clean    remove the virtual environment and all caches; runs/ stays"

demo: $(VENV)/.installed
	$(BIN)/contextlm run demo $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The list is for a person to read: each message must name the culprit and say what would be right.
fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 CONTEXTLM_FUZZ=$(TIMES) $(BIN)/python -m pytest tests/fuzz $(ARGS)

survive: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/survive.py $(ARGS)

results: $(VENV)/.installed
	$(BIN)/python results/make.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "contextlm needs Python 3.11 or newer as '$(PYTHON)'; name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing contextlm and what it needs (once; minutes where torch has to be fetched)"
	$(INSTALL) -e .
	@touch $@

# The development set holds all of the other, so it counts as both.
$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing contextlm and its tools (once; minutes where torch has to be fetched)"
	$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.installed $@
