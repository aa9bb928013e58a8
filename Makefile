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

# A slow test may take minutes, but not this many seconds; the quick ones' limit is in pyproject.toml.
SLOW := --timeout 1200 --durations 10
# All of them; CI leaves out the campaigns.
WHICH ?= slow
# Tests that compare with another process bit for bit have one without others' threads.
APART := tests/soap_net/test_train.py::test_on_a_disk_that_is_full_a_run_ends_in_one_line_and_goes_on_once_there_is_room

.PHONY: help install demo test test-slow test-gpu-proof test-lowest test-newest test-pythons lint benchmark benchmark-check docs \
	wheel clean

help:
	@echo "make install         set up $(VENV) alone"
	@echo "make demo            set up $(VENV), train and evaluate SOAP-Net on embedded videos, with and without SOAP"
	@echo "make test            set up $(VENV), run ruff, mypy and the quick tests"
	@echo "make test-slow       run the tests that take longer, those of test-gpu-proof among them"
	@echo "make test-gpu-proof  compile the GPU kernels for four architectures and run them on the CPU"
	@echo "make test-lowest     test the oldest Python here with the oldest of every dependency (an environment of its own)"
	@echo "make test-newest     test the newest Python here with the newest of every dependency"
	@echo "make test-pythons    test every Python here from 3.10 on"
	@echo "make benchmark       time SOAP's kernels against plain PyTorch on this machine"
	@echo "make benchmark-check run every benchmark once, on the smallest shapes, timing nothing"
	@echo "make docs            build the docs as a site, into site/; a link that leads nowhere fails"
	@echo "make wheel           build sdist and wheel as published, into dist/; install and check the wheel"
	@echo "make clean           remove $(VENV), build products and runs"

install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	@echo "==> Creating $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> Installing PyTorch and the build tools (a few minutes the first time)"
	$(PIP) install --quiet "setuptools>=77" wheel ninja "pybind11>=2.13" torch torchvision
	@echo "==> Building and installing soap-net with its kernels"
	$(PIP) install --quiet --no-build-isolation --editable ".[dev,videomae]"
	@touch $@

demo: $(INSTALLED)
	@echo "==> Running the demo: embedded videos, training and evaluation with and without SOAP"
	$(BIN)/soap-net demo --out runs/demo

lint: $(INSTALLED)
	@echo "==> Checking style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	@export PATH="$(BIN):$$PATH"; if command -v actionlint > /dev/null; then actionlint; fi

test: lint
	@echo "==> Running the quick tests"
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	@echo "==> Running the slow tests"
	$(PYTEST) -m "$(WHICH)" $(SLOW) $(APART:%=--deselect %)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(WHICH)" $(SLOW) $(APART)

test-gpu-proof: $(INSTALLED)
	@echo "==> Compiling the GPU kernels for four architectures and running them on the CPU (CUDA's need nvcc)"
	$(PYTEST) -m gpu_proof $(SLOW) tests/gpu_proof

test-lowest test-newest test-pythons:
	@echo "==> Testing other versions (the first time a few minutes of downloads and 6 GB for each Python)"
	$(PYTHON) tests/supported.py $(@:test-%=%)

benchmark: $(INSTALLED)
	@echo "==> Timing SOAP's kernels"
	$(BIN)/python -m benchmarks

benchmark-check: $(INSTALLED)
	@echo "==> Running every benchmark once on the smallest shapes, timing nothing"
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest benchmarks --benchmark-disable -q
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks --smallest --out build/benchmarks
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.pipeline --smallest --out build/benchmarks > /dev/null
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.growth --smallest --rows listing zip --out build/benchmarks > /dev/null
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.evaluation --tasks 20 --repeats 1 --clips 4000 --out build/benchmarks > /dev/null
	$(BIN)/python -m benchmarks.intervals --only 0 --repeats 1 --tasks 100 --out build/benchmarks/intervals.md
	$(BIN)/python -m benchmarks.autotune_triton --help > /dev/null

docs: $(INSTALLED)
	@echo "==> Building the docs into site/"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The sdist, from it the wheel, then the wheel as auditwheel names it: every library that it does not bring is PyTorch's or
# the system's. Unpacked beside nothing else, it has to pass the audit of its binary interface and the self-check.
wheel: $(INSTALLED)
	@echo "==> Building the sdist, and from it the wheel"
	rm -rf build/wheel dist && mkdir -p build/wheel
	SOAP_KERNELS_CPU=1 SOAP_KERNELS_CUDA=0 $(BIN)/python -m build --no-isolation --outdir build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	@echo "==> Installing and checking the wheel"
	$(PIP) install --quiet --no-deps --no-index --target build/wheel/installed dist/*.whl
	test ! -x $(BIN)/torch-abi-audit || $(BIN)/torch-abi-audit --check torch build/wheel/installed/soap_kernels
	cd build/wheel/installed && "$$OLDPWD/$(BIN)/python" -m soap_kernels.selfcheck

clean:
	rm -rf $(VENV) .venv-3.* build dist site runs *.egg-info csrc/cuda/build csrc/cuda/*.egg-info soap_kernels/*.so
