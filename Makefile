# Two commands do everything: `make demo` runs the main job, `make test` the tests. Both fill .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The GPU library takes nvcc minutes: built here only where there is a GPU to run it. 1 builds it wherever nvcc is.
export SOAP_KERNELS_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)
# Tests of one file stay in one process, since they share what they built. Threads that wait must not spin meanwhile:
# they would take the cores from the other processes, and twice the time.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: help install demo test test-slow test-gpu-proof lint benchmark clean

help:
	@echo "make install         set up $(VENV) alone"
	@echo "make demo            set up $(VENV), train and evaluate SOAP-Net on embedded videos, with and without SOAP"
	@echo "make test            set up $(VENV), run ruff, mypy and the quick tests"
	@echo "make test-slow       run the tests that take longer"
	@echo "make test-gpu-proof  compile the GPU kernels for four architectures and run them on the CPU"
	@echo "make benchmark       time SOAP's kernels against plain PyTorch on this machine"
	@echo "make clean           remove $(VENV), build products and runs"

install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	@echo "==> Creating $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> Installing PyTorch and the build tools (a few minutes the first time)"
	$(PIP) install --quiet "setuptools>=77" wheel ninja "pybind11>=2.13" torch torchvision
	@echo "==> Building and installing soap-net with its kernels"
	$(PIP) install --quiet --no-build-isolation --editable ".[dev,timm,efficientnet-lite0,videomae]"
	@touch $@

demo: $(INSTALLED)
	@echo "==> Running the demo: embedded videos, training and evaluation with and without SOAP"
	$(BIN)/soap-net demo --out runs/demo

lint: $(INSTALLED)
	@echo "==> Checking style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	@echo "==> Running the quick tests"
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	@echo "==> Running the slow tests"
	$(PYTEST) -m "slow and not gpu_proof" --durations 10

test-gpu-proof: $(INSTALLED)
	@echo "==> Compiling the GPU kernels for four architectures and running them on the CPU (CUDA's need nvcc)"
	$(PYTEST) -m gpu_proof --durations 10 tests/gpu_proof

benchmark: $(INSTALLED)
	@echo "==> Timing SOAP's kernels"
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build runs *.egg-info soap_kernels/*.so
