# `make demo` and `make test` need nothing but Python 3.12 and a C++ compiler; they create .venv by themselves.
# PYTHON=/path/to/python chooses the interpreter, CONSTRAINTS=requirements-ci.txt the tested versions.

BIN := .venv/bin
# Several ranks share the cores of a laptop.
export OMP_NUM_THREADS ?= 1

# Tests of one process each, which need no quiet machine: a worker for each core.
ALONE := $(addprefix tests/, contracts ops models text tokens tokenizer figures docs checkpoints benchmarks batches data engines hosts)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-schedulers lint format ops clean venv venv-demo

help:
	@echo "make demo       text to a trained Russian model on this machine, in minutes"
	@echo "make test       lint, types and the tests that take seconds"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-schedulers  real Slurm, Grid Engine and Open MPI on hosts of this machine; root on Debian, minutes"
	@echo "make lint       ruff and mypy"
	@echo "make format     ruff, which rewrites files"
	@echo "make ops        compiles the ops again where sources changed (MEGATRON_RU_BUILD=cuda: for a GPU too)"
	@echo "make clean      removes what building and testing left; .venv stays"

demo: venv-demo
	$(BIN)/megatron-ru demo

# The tests run even where lint complains, and their closing line comes last.
test: venv
	@status=0; $(MAKE) --no-print-directory lint || status=1; \
	$(BIN)/python -m pytest -n auto -q -m "not slow and not hosts" $(ALONE) || status=1; \
	$(BIN)/python -m pytest -m "not slow and not hosts and not schedulers" $(ALONE:%=--ignore=%) || status=1; \
	exit $$status

test-slow: venv
	$(BIN)/python -m pytest -m "slow and not hosts and not schedulers"

# Installs by apt what is missing; skips, and says so, where that or a namespace cannot be had.
test-schedulers: venv
	$(BIN)/python -m pytest tests/schedulers

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ops: venv
	$(BIN)/megatron-ru build

clean:
	rm -rf build dist demo runs megatron_ru/ops/_compiled .venv/compiled-ops .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_ru tests -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@bash scripts/bootstrap.sh dev

venv-demo:
	@bash scripts/bootstrap.sh demo
