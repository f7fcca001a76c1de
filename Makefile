# The verbs of the project. Each makes .venv itself, once, and again when what is compiled or needed has changed.
# Another Python, torch or Triton: `make clean`, then `make test PYTHON=python3.12 TORCH=torch==2.11.0 TRITON=triton==3.6.0`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
export PYTHON TORCH

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := dev,triton,plots,onnx,data
COMPILED := $(shell find csrc -name '*.h' -o -name '*.cpp')

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint wheel clean

help: ## say what the verbs do
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' Makefile

demo: .venv/installed ## the main job, on real text
	$(BIN)/python -m rnnkit demo

test: .venv/installed ## all tests, in two processes
	$(BIN)/python -m pytest -n 2 -q

bench: .venv/installed ## every backend against torch.nn; BENCH=--quick for a minute of it
	$(BIN)/python -m rnnkit bench $(BENCH)

lint: .venv/installed ## ruff, mypy, clang-format: looks, changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tests/ci/typecheck.py
	$(BIN)/clang-format --dry-run -Werror $(COMPILED)

wheel: .venv/installed ## sdist and wheel into dist/, tried in a fresh environment
	bash tests/ci/wheel.sh

clean: ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info rnnkit/_C*.so .pytest_cache .mypy_cache .ruff_cache

# torch comes first and alone; the constraints keep every later install from touching it.
.venv/torch:
	$(PYTHON) -m venv --clear .venv
	printf '%s\n' '$(TORCH)' '$(TRITON)' > .venv/constraints.txt
	$(PIP) install -q '$(TORCH)'
	$(PIP) install -q -c .venv/constraints.txt 'setuptools>=77' wheel ninja numpy
	touch $@

.venv/installed: .venv/torch pyproject.toml setup.py $(COMPILED)
	$(PIP) install -q -c .venv/constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(BIN)/python -c 'from rnnkit.backends import extension as e; print("C++ extension:", e.reason() or "built")'
	touch $@
