# make demo | test | asan | bench | gpu | aot | lint    Each sets up what it needs on a fresh machine.
#
# PYTHON   the interpreter a new virtual environment is made from (3.11 - 3.13; `pip install .`
#          takes 3.10 too)
# VENV     where it is put; reused by every target
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
DEMO_DIR ?= demo-output
# Byte code is kept whatever the environment says: without it every process compiles torch and
# transformers anew, 13 of the 21 seconds that importing them takes.
export PYTHONDONTWRITEBYTECODE :=
SOURCES := setup.py CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all lint bench bench-smoke micro gpu gpu-build gpu-test gpu-bench gpu-sanitize aot asan asan-sparse clean

# Dependencies, pinned by constraints.txt. torch first and by its exact version: a bare requirement
# would let the resolver pick a newer build with several gigabytes of CUDA libraries. Byte code is
# made of what is imported, when it is: of all packages it takes half as long as installing them.
PIP_INSTALL = $(BIN)/python -m pip install -q --no-compile
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints.txt "setuptools>=77" wheel pybind11 cmake ninja \
	  "$$(grep -i '^torch==' constraints.txt)"
	PYPRUNE_NATIVE=OFF $(PIP_INSTALL) --no-build-isolation -c constraints.txt -e '.[test,dev,datasets]'
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	mkdir -p build
	source $(BIN)/activate && python -m pip install -q --no-build-isolation --no-deps -e . \
	  > build/install.log 2>&1 || { cat build/install.log; exit 1; }
	$(BIN)/python -c "from pyprune import _native; assert _native.MODULE, _native.MISSING"
	touch $@

# Prunes the packaged model at 50 % and 2:4 and shows perplexity before and after.
demo: $(BUILT)
	$(BIN)/python examples/demo.py --out $(DEMO_DIR)

# One worker and one thread a core: more runnable threads than cores would spin at barriers.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

# All but what is marked slow; test-all runs that too. Markers are explained in pyproject.toml.
test: $(BUILT)
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(BUILT)
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# The CPU kernels under the address and undefined-behaviour sanitizers: the tests of the ops that read
# or write compressed formats, and of mask selection, on their small shapes, for every instruction
# set. The package is a directory of links around a module built for it. The C++ library is named
# too, so that the sanitizer finds the exceptions that the kernels throw. Torch is never unloaded:
# leaks would be its own. Tests of what is not built for it are left out: PyTorch's and Triton's. Two
# threads each, for what only happens with more than one, that sleep when they wait. Vector loads
# under a mask are not instrumented, which is why tests/ops/test_guard_page.py checks those against
# an unreadable page.
#
# asan-sparse builds the kernels of the compressed formats (and mask selection, which packing uses)
# alone: a minute instead of five. --capture=sys lets the report of a dying process through.
ASAN_DIR ?= build/asan
ASAN_OPS ?=
ASAN_SITE = $(ASAN_DIR)/site
ASAN_TESTS ?= $(addprefix tests/ops/test_,$(addsuffix .py,pack_24 pack_bitmap sparse_linear \
  sparse_panels bitmap_masks bitmap_table sparse_int8 coded guard_page mask_nm mask_topk mask_global column_norms))
asan: $(INSTALLED)
	mkdir -p $(ASAN_SITE)/pyprune
	for f in pyprune/*; do [[ $$f == *.so || $$f == *__pycache__ ]] \
	  || ln -sfn "$(CURDIR)/$$f" $(ASAN_SITE)/pyprune/; done
	source $(BIN)/activate && { cmake -S . -B $(ASAN_DIR) -G Ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DPYPRUNE_ASAN=ON -DPYPRUNE_CUDA=OFF -DPYPRUNE_OPS="$(ASAN_OPS)" \
	  -DPYPRUNE_OUTPUT_DIR="$(CURDIR)/$(ASAN_SITE)/pyprune" \
	  -DPython_EXECUTABLE="$$(command -v python)" -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" \
	  && cmake --build $(ASAN_DIR) --target _C; } > $(ASAN_DIR)/build.log 2>&1 \
	  || { tail -n 40 $(ASAN_DIR)/build.log; exit 1; }
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$(CURDIR)/$(ASAN_SITE)" \
	  OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	  $(BIN)/pytest -q --capture=sys -n auto --dist worksteal \
	  -k "not triton and not reference and not compile and not opcheck" $(ASAN_TESTS) $(PYTEST_ARGS)

asan-sparse:
	$(MAKE) asan ASAN_DIR=build/asan-sparse \
	  ASAN_OPS='kept_memory;pack;sparse_linear;sparse_int8;linear_int8;coded;linear_coded;unpack_coded;select;mask_nm;mask_topk;mask_global' \
	  ASAN_TESTS="$(addprefix tests/ops/test_,$(addsuffix .py,pack_24 pack_bitmap sparse_linear \
	  sparse_panels bitmap_masks bitmap_table sparse_int8 coded))"

# Every benchmark for real, rows into benchmarks/results/. Half an hour or more on two cores.
bench: $(BUILT)
	$(BIN)/python benchmarks/run_all.py

# One call of every op and backend, for comparing commits: pytest-benchmark's --benchmark-compare.
micro: $(BUILT)
	$(BIN)/python -m pytest -q benchmarks/test_micro.py --benchmark-enable \
	  --benchmark-group-by=param:op,param:shape --benchmark-columns=median,iqr,rounds $(PYTEST_ARGS)

bench-smoke: $(BUILT)
	$(BIN)/python benchmarks/run_all.py --smoke
	$(BIN)/python -m pytest -q benchmarks/test_micro.py

# Registers, spills, shared memory and instruction mix of every Triton kernel; needs no GPU.
aot: $(INSTALLED)
	$(BIN)/python benchmarks/aot.py --json benchmarks/results/aot.json --markdown docs/aot.md

# On a machine with a CUDA device and torch, Triton and nvcc already installed: uses PYTHON as it is
# (no virtual environment, no network), builds, runs the GPU tests and the benchmarks. A part that
# fails does not keep the next from running. Each can be had alone, e.g. where a GPU is there for
# minutes: make gpu-build gpu-bench GPU_BENCHES="model kron --limit 120 --out rows"
# Code for one architecture is built in a quarter of the time: PYPRUNE_CUDA_ARCHS=90a-real.
GPU_BENCHES ?=
gpu: gpu-build
	$(MAKE) -k gpu-test gpu-sanitize gpu-bench

gpu-build:
	mkdir -p build
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . > build/install.log 2>&1 || { cat build/install.log; exit 1; }
	$(PYTHON) -c "from pyprune import _native; assert _native.MODULE.has_cuda, 'built without CUDA'"

gpu-test:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m gpu -n auto --dist worksteal $(PYTEST_ARGS)

gpu-bench:
	$(PYTHON) benchmarks/run_all.py --device cuda --repetitions 5 $(GPU_BENCHES)

# Every kernel once, small, under compute-sanitizer: reads outside an allocation (without PyTorch's
# pools, whose blocks hide them) and races in shared memory.
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool
gpu-sanitize:
	status=0; for tool in memcheck racecheck; do \
	  $(SANITIZE) $$tool $(PYTHON) -m pytest -q -m gpu -k sanitized tests/ops || status=1; \
	done; exit $$status

clean:
	rm -rf build $(DEMO_DIR) pyprune/_C*.so $(BUILT)
