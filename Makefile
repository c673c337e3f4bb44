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

.PHONY: help demo test contract clients fuzz survive results lint format clean

help:
	@echo "make demo     train and compare small models in a few minutes, and write a report"
	@echo "              (ARGS=\"--scale smoke\" for seconds instead)"
	@echo "make test     run the whole test suite (ARGS=\"-k recipe\" for a part of it)"
	@echo "make contract TRANSFORMERS=5.17.0   run the tests that lean on transformers with another version"
	@echo "make clients  install PEFT, TRL, lm-eval and others, try every architecture with them,"
	@echo "              and write the table into docs/use-it-with.md"
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

# An environment of its own with the tested versions, but for transformers and what it asks for otherwise.
CONTRACT := tests/contract tests/models tests/compress tests/evaluation/test_generation.py tests/evaluation/test_memory.py
OTHER := $(VENV)-transformers-$(TRANSFORMERS)
contract:
	@test -n "$(TRANSFORMERS)" || { echo "which version? make contract TRANSFORMERS=5.17.0" >&2; exit 1; }
	$(PYTHON) -m venv $(OTHER)
	grep -v -e '^transformers==' -e '^huggingface_hub==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --disable-pip-version-check --quiet -c $(OTHER)/constraints.txt \
	  "transformers==$(TRANSFORMERS)" ".[test]"
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(CONTRACT) $(ARGS)

# What is beside the tested versions is as new as it comes: this asks whether today's clients work.
CLIENTS := $(VENV)-clients
clients:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
	  -e ".[lm-eval,trackers]" -r tests/clients/requirements.txt
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python tests/clients/matrix.py $(ARGS)

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
	rm -rf $(VENV) $(VENV)-* build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
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
