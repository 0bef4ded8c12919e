# `make demo` and `make test` set themselves up: they need python3 (>= 3.10, with headers and venv), a C++ compiler and make.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := CMakeLists.txt setup.py pyproject.toml $(filter %.cpp %.h %.cu %.cuh %.inc,$(wildcard csrc/* csrc/*/* kernels/*/*))
CXX_FILES = $(filter %.cpp %.h %.cu %.cuh %.inc,$(wildcard csrc/* csrc/*/* kernels/*/* tests/*/* tests/*/*/*))

.PHONY: help demo test test-compilers test-interpreter test-python bench lint gpu-check clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/built  ## train a small SigLIP on real pictures, search them, write demo/report.html
	$(BIN)/vlkern demo

test: .venv/built  ## build, lint and run everything that needs no GPU
	$(MAKE) --jobs 2 --output-sync lint test-python test-compilers test-interpreter

# Two of these run beside each other on two cores: a second thread of one would wait for the other's turn at every parallel
# loop (some tests took six times as long). The tests of threads ask for as many as they need.
test-python test-compilers test-interpreter: export OMP_NUM_THREADS := 1

# What compiles uses one core for minutes, so it runs beside the rest.
COMPILERS := tests/amx tests/triton tests/cuda tests/install
test-compilers: .venv/built
	$(BIN)/python -m pytest $(COMPILERS)

test-interpreter: .venv/built
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_contract.py tests/kernels -k triton

test-python: .venv/built
	$(BIN)/python -m pytest $(COMPILERS:%=--ignore=%)

bench: .venv/built  ## compare every op with its rivals, write bench/results/
	$(BIN)/vlkern bench

lint: .venv/built  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	rm -rf build/lint && $(BIN)/python setup.py --quiet build_py --build-lib build/lint
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

# Offline, with the packages that $(PYTHON) has; nothing is installed. What says nothing about a GPU stays out: it needs packages
# and tools that such a machine may lack. A failed test does not keep the benchmark from running.
NO_GPU := data train install test_cli.py test_demo.py
gpu-check: export PYTHONPATH := $(CURDIR)/python
gpu-check:  ## on a machine with a GPU: build, test every backend, benchmark
	$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check needs a GPU that PyTorch can use")'
	VLKERN_CUDA=on $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m vlkern info
	$(PYTHON) -m pytest --continue-on-collection-errors $(NO_GPU:%=--ignore=tests/%); tests=$$?; \
	  $(PYTHON) -m vlkern bench && exit $$tests

clean:  ## remove everything that was made
	rm -rf .venv build dist demo python/vlkern/*.so python/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# Of the thousands of modules few are ever imported, and those are compiled then: to do it here takes a minute.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile

.venv/installed: requirements.txt requirements-peers.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) $(shell grep ^torch== requirements.txt)
	$(PIP_INSTALL) --requirement requirements.txt
	$(PIP_INSTALL) --no-deps --requirement requirements-peers.txt
	touch $@

.venv/built: .venv/installed $(NATIVE)
	$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	touch $@
