# `make train` and `make test` are all that is needed on a fresh machine with Python, a C++ compiler and GNU make.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TEXT ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := build/stamps

CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)
PACKAGE := $(wildcard bigramx/*.py bigramx/*.pyi)
CHECKED := $(CSRC) $(PACKAGE) $(wildcard tests/*.py benchmarks/*.py benchmarks/*.cpp benchmarks/*.h) setup.py pyproject.toml

.PHONY: help train test lint bench bench-quick wheel clean tools peers
.DELETE_ON_ERROR:

help:
	@echo "make train [TEXT=path]   train a model, write a sample, leave the model and pictures in runs/"
	@echo "make test                build what is stale, then linters, types, tests"
	@echo "make lint                linters and types alone"
	@echo "make bench               time and memory against PyTorch, JAX and NumPy, some ten minutes"
	@echo "make bench-quick         the same with few rounds, under three minutes"
	@echo "make wheel               an sdist and a wheel in dist/"
	@echo "make clean               remove what was built, the virtual environment included"

train: $(STAMPS)/built
	@$(BIN)/bigramx train $(TEXT)

test: $(STAMPS)/linted $(STAMPS)/tested
	@echo "make test: all passed (what has not changed since it last passed is not run again; make clean forgets)"

lint: $(STAMPS)/linted

bench: $(STAMPS)/built peers
	$(BIN)/python benchmarks/run.py

bench-quick: $(STAMPS)/built peers
	$(BIN)/python benchmarks/run.py --quick

# Others that the benchmarks compare with; one that cannot be installed is named there as skipped.
peers: $(STAMPS)/built
	@$(BIN)/python -c 'import jax, numpy, matplotlib' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[bench]" || echo "make bench: goes on without the peers that are missing"

wheel: $(STAMPS)/built
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info bigramx/_C*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

# What must be there already, each with one clear line where it is not.
tools:
	@command -v $(PYTHON) >/dev/null || { echo "bigramx: $(PYTHON) not found; install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "bigramx: needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "bigramx: $(PYTHON) cannot make a virtual environment; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "bigramx: the headers of $(PYTHON) are missing; install them (Debian: python3-dev)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "bigramx: no C++ compiler found; install one (Debian: g++), or name it with CXX=..." >&2; exit 1; }

$(STAMPS)/installed: pyproject.toml | tools
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH) and the tools"
	@$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) "setuptools>=77" ninja pybind11
	@echo "building the extension (a minute or two)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dev]"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/built: $(STAMPS)/installed $(CSRC) setup.py
	@$(BIN)/python setup.py --quiet build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@touch $@

$(STAMPS)/linted: $(STAMPS)/installed $(CHECKED) .clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) benchmarks/*.cpp benchmarks/*.h
	$(BIN)/mypy
	@touch $@

$(STAMPS)/tested: $(STAMPS)/built $(CHECKED) Makefile MANIFEST.in README.md
	$(BIN)/python -m pytest
	@touch $@
