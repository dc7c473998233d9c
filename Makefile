# Tools come from .venv where it is, which `make setup` makes, else from the environment that is active.
PYTHON ?= python3
BIN := .venv/bin
RUN = $(if $(wildcard $(BIN)/python),$(BIN)/)
FILES ?=

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup check format test build peft-suite clean

help:            ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup:           ## a virtual environment with the package and all that developing it takes
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[dev]"

check:           ## linter, formatter and type checker
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright --pythonpath $(RUN)python

format:          ## put the source into its form
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

test:            ## the tests, offline, on two processes of one thread each
	OMP_NUM_THREADS=1 $(RUN)python -m pytest -n 2 $(FILES)

build:           ## the wheel and the source package, into dist/
	$(RUN)python -m build

peft-suite:      ## PEFT's own tests on METHOD (default MSPLoraConfig), see docs/peft-suite.md
	$(RUN)python -m tests.peft_suite $(or $(METHOD),MSPLoraConfig) $(FILES)

clean:           ## what tests and builds leave behind
	rm -rf dist build .pytest_cache .ruff_cache .hypothesis
