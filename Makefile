# Everything a fresh machine needs to run is here: each target makes .venv first, from Python 3.11 or newer and pip.
# PYTHON chooses the interpreter, JOBS the test processes; pip's own settings (PIP_INDEX_URL, ...) apply.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/stamp
EXTRAS := dev,export,hf,peft,synth,track
SRC := src/manyvoice
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -qq -c constraints.txt

# One thread a process: several torch processes with several threads each stall one another. No test reaches a hub.
ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(ENV) $(BIN)/python -m pytest -q -rs -n $(JOBS) --dist loadfile

.PHONY: help venv demo test test-slow lint types clean

help:
	@echo "make demo       train a small model of many sizes and voices, and try it"
	@echo "make test       the tests (FILES=tests/data for some of them)"
	@echo "make test-slow  the tests that take long"
	@echo "make lint       style and formatting"
	@echo "make types      type check"
	@echo "make venv       only install, into .venv"
	@echo "make clean      remove .venv and caches"

venv: $(STAMP)

# torch goes first and pinned: a resolver that is free to choose brings a newer build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "set-up 1/3: .venv"
	@$(PYTHON) -m venv .venv
	@echo "set-up 2/3: torch"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@echo "set-up 3/3: manyvoice with $(EXTRAS)"
	@$(PIP) -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/manyvoice demo

test: $(STAMP)
	@$(PYTEST) $(FILES)

# pytest exits with 5 where it selects no test; a selection of FILES may hold no slow one.
test-slow: $(STAMP)
	@$(PYTEST) -m slow --timeout 900 $(FILES) || [ $$? -eq 5 ]

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)
	@$(BIN)/mypy --strict $(SRC)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
