# `make train` and `make test` are all that is needed on a fresh machine with Python, a C++ compiler and GNU make.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TEXT ?=
SANITIZER ?= compute-sanitizer
SECONDS ?=
VENV := .venv
BIN := $(VENV)/bin
FRAMEWORKS := build/frameworks
STAMPS := build/stamps
# Python compiles what it imports, pip would compile all: of torch three quarters of a minute. It must keep what it has
# compiled: each process of the tests would compile torch and pytest anew.
PIP_OPTIONS := --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

CSRC := $(shell find csrc -type f)
SIMT := $(shell find tests/simt -name "*.h" -o -name "*.cpp" -o -name "*.cu")
TRUST_C := $(wildcard tests/trust/*.c tests/trust/*.cpp tests/trust/*.h)
PACKAGE := $(wildcard bigramx/*.py bigramx/*.pyi)
CHECKED := $(CSRC) $(SIMT) $(TRUST_C) $(PACKAGE) $(wildcard tests/*.py tests/*/*.py tests/simt/Makefile benchmarks/*.py examples/*.py benchmarks/*.cpp benchmarks/*.h) setup.py pyproject.toml

.PHONY: help train test lint cuda-checked tested dist-checked integration simt cuda-check cuda-instructions sanitize trust asan tsan fuzz fuzz-files faults statistics soak emulator portability bench bench-quick bench-cuda wheel distcheck clean tools peers peers-cuda
.DELETE_ON_ERROR:

help:
	@echo "make train [TEXT=path]   train a model, write a sample, leave the model and pictures in runs/"
	@echo "make test                build what is stale, then linters, types, tests"
	@echo "make lint                linters and types alone"
	@echo "make integration         tests with Lightning, Accelerate, Transformers, PEFT, Opacus and ONNX, which it installs"
	@echo "make cuda-check          compile the CUDA kernels for three architectures, and print what each takes"
	@echo "make cuda-instructions   count the machine instructions that the kernel of large tables takes for an element"
	@echo "make sanitize            run CUDA tests under compute-sanitizer; needs a GPU"
	@echo "make trust               all promises about faults, some hours: asan, tsan, fuzz, fuzz-files, faults, statistics, soak, emulator, portability"
	@echo "make fuzz [SECONDS=60]   one of these"
	@echo "make bench               time and memory against PyTorch, JAX and NumPy, some ten minutes"
	@echo "make bench-quick         the same with few rounds, under three minutes"
	@echo "make bench-cuda          time and memory on a GPU"
	@echo "make wheel               an sdist and a wheel in dist/"
	@echo "make distcheck           install the wheel of the sdist into an empty environment, and use it there"
	@echo "make clean               remove what was built, the virtual environment included"

train: $(STAMPS)/built
	@$(BIN)/bigramx train $(TEXT)

test: $(STAMPS)/linted $(STAMPS)/cuda-checked $(STAMPS)/tested $(STAMPS)/dist-checked
	@echo "make test: all passed (what has not changed since it last passed is not run again; make clean forgets)"

# The parts of make test.
lint: $(STAMPS)/linted
cuda-checked: $(STAMPS)/cuda-checked
tested: $(STAMPS)/tested
dist-checked: $(STAMPS)/dist-checked

integration: $(STAMPS)/integrated

# The CUDA kernels for the CPU, which the tests run.
simt: $(STAMPS)/built
	@$(MAKE) --no-print-directory -C tests/simt PYTHON=$(abspath $(BIN)/python)

# It needs neither torch nor the environment.
cuda-check: | tools
	@$(PYTHON) tests/cuda_check.py

cuda-instructions: $(STAMPS)/installed
	@command -v nvdisasm >/dev/null || $(BIN)/pip install --quiet $(PIP_OPTIONS) nvidia-cuda-nvdisasm
	@$(BIN)/python tests/cuda_instructions.py

# Without torch's pool each tensor is an allocation, whose ends memcheck knows. racecheck is for shared memory.
sanitize: $(STAMPS)/built
	@command -v $(SANITIZER) >/dev/null || { echo "make sanitize: $(SANITIZER) not found; it comes with the CUDA toolkit; name it with SANITIZER=..." >&2; exit 1; }
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "make sanitize: this torch sees no GPU" >&2; exit 1; }
	@for tool in memcheck initcheck synccheck "racecheck --kernel-name kns=bigramx"; do \
		echo "$(SANITIZER) --tool $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --error-exitcode 1 --tool $$tool $(BIN)/python -m pytest tests/test_cuda.py -k sanitize || exit 1; \
	done

# Each of these is a module of tests/trust, which runs for its own time or for SECONDS, prints what it tried and exits
# with 1 for a finding. make trust keeps what they print in tests/trust/results.
TRUST := asan tsan fuzz fuzz-files faults statistics soak emulator portability

trust: export BIGRAMX_TRUST_KEEP := 1
trust: $(STAMPS)/built
	@failed=; for target in $(TRUST); do $(MAKE) --no-print-directory $$target || failed="$$failed $$target"; done; \
		$(BIN)/python -m tests.trust.report; test -z "$$failed" || { echo "make trust: findings of:$$failed" >&2; exit 1; }

asan tsan: $(STAMPS)/built
	@$(BIN)/python -m tests.trust.sanitizers $@

fuzz: $(STAMPS)/built
	@$(BIN)/python -m tests.trust.fuzz_ops $(SECONDS)

fuzz-files: $(STAMPS)/built
	@$(BIN)/python -m tests.trust.fuzz_files $(SECONDS)

faults statistics soak portability: $(STAMPS)/built
	@$(BIN)/python -m tests.trust.$@ $(SECONDS)

emulator: $(STAMPS)/built
	@$(BIN)/python -m tests.trust.emulator

bench: $(STAMPS)/built peers
	$(BIN)/python benchmarks/run.py

bench-quick: $(STAMPS)/built peers
	$(BIN)/python benchmarks/run.py --quick

bench-cuda: $(STAMPS)/built peers-cuda
	$(BIN)/python benchmarks/run.py --device cuda

# Others that the benchmarks compare with; one that cannot be installed is named there as skipped.
peers: $(STAMPS)/built
	@$(BIN)/python -c 'import jax, numpy, matplotlib, polars, scipy, tokenizers' 2>/dev/null || $(BIN)/pip install --quiet $(PIP_OPTIONS) --no-build-isolation --editable ".[bench]" || echo "make bench: goes on without the peers that are missing"

peers-cuda: $(STAMPS)/built
	@$(BIN)/python -c 'import liger_kernel, numpy, matplotlib' 2>/dev/null || $(BIN)/pip install --quiet $(PIP_OPTIONS) --no-build-isolation --editable ".[bench-cuda]" || echo "make bench-cuda: goes on without the peers that are missing"

# The wheel, too, is built here, where the object files are.
wheel: $(STAMPS)/built
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir dist .

distcheck: $(STAMPS)/built
	@$(BIN)/python -m tests.distcheck "$(TORCH)"

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
	@$(BIN)/pip install --quiet $(PIP_OPTIONS) $(TORCH) "setuptools>=77" ninja pybind11
	@echo "building the extension (a minute or two)"
	@mkdir -p $(STAMPS)
	@$(BIN)/pip install --verbose $(PIP_OPTIONS) --no-build-isolation --editable ".[dev]" >build/install.log 2>&1 || { cat build/install.log; exit 1; }
	@touch $@

$(STAMPS)/built: $(STAMPS)/installed $(CSRC) setup.py
	@$(BIN)/python setup.py --quiet build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@touch $@

# The frameworks have an environment of their own, with the wheel in it.
$(STAMPS)/frameworks: pyproject.toml setup.py | $(STAMPS)/built
	@echo "installing the frameworks into $(FRAMEWORKS)"
	@rm -rf $(FRAMEWORKS) build/wheels && $(PYTHON) -m venv $(FRAMEWORKS)
	@$(BIN)/python -m tests.linked_torch $(FRAMEWORKS)
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/wheels .
	@$(FRAMEWORKS)/bin/pip install --quiet $(PIP_OPTIONS) $(TORCH) "$$(echo build/wheels/*.whl)[integration]"
	@touch $@

# A framework that is missing there is a failure, not a skipped test.
$(STAMPS)/integrated: $(STAMPS)/frameworks $(STAMPS)/built $(CHECKED)
	BIGRAMX_INTEGRATION=1 $(FRAMEWORKS)/bin/python -m pytest tests/integration
	@touch $@

$(STAMPS)/linted: $(STAMPS)/installed $(CHECKED) .clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(SIMT) $(TRUST_C) benchmarks/*.cpp benchmarks/*.h
	$(BIN)/mypy
	@touch $@

$(STAMPS)/cuda-checked: $(CSRC) tests/cuda_check.py | tools
	@mkdir -p $(STAMPS)
	@if command -v nvcc >/dev/null; then $(PYTHON) tests/cuda_check.py --architectures 90 && touch $@; else echo "make cuda-check: skipped, nvcc is not found"; fi

$(STAMPS)/dist-checked: $(STAMPS)/built $(PACKAGE) README.md MANIFEST.in tests/distcheck.py tests/readme_examples.py
	@$(MAKE) --no-print-directory distcheck
	@touch $@

# Two processes, however many cores there are: tests start others and take two threads. OpenMP's threads sleep while they
# wait: those that spin would keep the others from the core.
$(STAMPS)/tested: export OMP_WAIT_POLICY := passive
$(STAMPS)/tested: $(STAMPS)/built $(CHECKED) Makefile MANIFEST.in $(wildcard *.md docs/* benchmarks/results/* tests/trust/results/* tests/trust/*.supp)
	@$(MAKE) --no-print-directory simt
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	@touch $@
