# Every target that needs an environment makes .venv first, as constraints.txt pins it: no activating, nothing else to do.
THREADS ?= 1
FILES ?=
# Each process begins with a half of the tests and takes from the other's end: a file's tests, and their fixtures, stay together.
TWO := -n 2 --dist worksteal
QUICK := --ignore=tests/lowrank/test_triton_product.py tests/saved tests/lowrank tests/contracts/test_adapters.py tests/test_imports.py \
	tests/methods/msplora/test_equations.py tests/methods/lora2/test_equations.py \
	tests/methods/lor2c/test_path_equation.py tests/methods/dylora
BIN := .venv/bin
SITE := mkdocs-material "mkdocstrings[python]" nbconvert

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Two processes of several threads each on few cores: a thread that waits actively keeps a core from one that works.
export OMP_WAIT_POLICY ?= passive
export PYTHON

.PHONY: help demo test quick setup check format lock build peft-suite site clean

help:            ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

demo:            ## fine-tune the embedded model on the embedded data (some minutes on two cores)
	@.ci/environment demo
	@$(BIN)/ziggurat train output=ziggurat-runs/demo overwrite=true
	@echo "The command lies in $(BIN): type . $(BIN)/activate once, then these commands as they stand."

test: setup      ## all tests, offline, on two processes of THREADS threads each; FILES for a part
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest $(TWO) $(FILES)

quick: setup     ## the heart of the tests in under two minutes: equations, saved adapters, what every method promises
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest $(TWO) $(QUICK)

setup:           ## the environment for developing
	@.ci/environment dev

check: setup     ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup    ## put the source into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:            ## constraints.txt anew: every package in its newest version that lock.in allows, for Python 3.11 to 3.14
	.ci/lock

build: setup     ## the wheel and the source package, into dist/
	$(BIN)/python -m build

peft-suite: setup ## PEFT's own tests on METHOD (default MSPLoraConfig), see docs/peft-suite.md
	$(BIN)/python -m tests.peft_suite $(or $(METHOD),MSPLoraConfig) $(FILES)

site: setup      ## the pages and the docstrings as a site, into site/
	$(BIN)/python -m pip install --quiet $(SITE) || uv pip install --quiet --python $(BIN)/python $(SITE)
	$(BIN)/python -m mkdocs build --strict

clean:           ## what tests and builds leave behind
	rm -rf dist build site .pytest_cache .ruff_cache .hypothesis
