# make demo, make test, make bench, make fuzz: each makes a virtual environment first and builds into it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN := $(VENV)/bin/python
export LKV_TORCH ?= ON

.PHONY: build demo test fuzz bench style clean

# Without isolation, so that the op library is built against the torch just installed.
$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q "$(TORCH)" "setuptools>=77" wheel cmake ninja pybind11 numpy \
	  "transformers>=4.56" tqdm pytest pytest-benchmark hypothesis matplotlib
	touch $@

build: $(VENV)/ready
	$(RUN) -m pip install -q --no-deps --no-build-isolation -e .

demo: build
	$(RUN) -m lkv.demo

test: build
	$(RUN) -m pytest

fuzz: build
	HYPOTHESIS_PROFILE=fuzz $(RUN) -m pytest tests/test_properties.py tests/test_budgets.py

bench: build
	$(RUN) -m pytest bench -q --benchmark-only --benchmark-quiet
	$(RUN) bench/report.py --readme README.md

style: $(VENV)/ready
	$(RUN) -m pip install -q ruff clang-format
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf build lkv_ext/*.so $(VENV)
