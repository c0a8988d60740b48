# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
PYTHON ?= python3
WORKERS ?= 2
OUT ?= build/bench
export PIP_DISABLE_PIP_VERSION_CHECK = 1

VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: help test bench microbench gpu tune lint format clean

help:
	@echo "make test        the tests (no GPU, no network)"
	@echo "make bench       the benchmarks of README: OUT=$(OUT), at most 5 minutes"
	@echo "make microbench  pytest-benchmark over every kernel"
	@echo "make gpu OUT=dir build, test and measure on a GPU with PYTHON as it is, no .venv"
	@echo "make tune        on a GPU: measure the kernels' configurations and write their table"
	@echo "make lint        ruff, mypy, clang-format; make format applies them"

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
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --durations 10

bench: $(VENV)/built
	$(BIN)/python -m benchmarks --out $(OUT)

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

clean:
	rm -rf build sep_attn/_C*.so
