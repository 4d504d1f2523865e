# The commands of the README. `make demo` and `make test` set everything up; a second run starts in seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: setup demo test test-all check bench gpu gpu-install gpu-kernels gpu-rows gpu-plan clean

setup: $(STAMP)

# torch first and pinned: the extension is built against it, so nothing may be built in isolation. Of what is installed
# only what a run imports is compiled to bytecode, when it does.
$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch==2.13.0 setuptools wheel ninja
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-build-isolation -e '.[gpu,tensorrt,openvino,serve,models,bench,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/digits/demo.py

# Two workers, each with one thread; tests of the kernels' own threads ask for two (tests/conftest.py).
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Also what is marked slow: the plans of every layer, every family as standard operators.
test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/planmill bench

# On a machine with a CUDA device, in the Python that holds torch and triton, without a registry: the kernels' tests on the
# device, the rows, then a plan (`make -k gpu` goes on where one fails). Of what pyproject.toml declares the kernels need
# torch, triton, numpy and pytest, the rows typer and rich besides, the plan everything; an absent peer is noted and left out.
gpu: gpu-kernels gpu-rows gpu-plan

gpu-install:
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .

gpu-kernels: gpu-install
	$(PYTHON) -m pytest -m gpu --device cuda tests/kernels/test_triton_parity.py

gpu-rows: gpu-install
	failed=0; for family in neighbors routing moments attention; do \
		$(PYTHON) -m planmill.cli bench $$family --device cuda || failed=1; \
	done; exit $$failed

gpu-plan: gpu-install
	$(PYTHON) -m pytest -m gpu --device cuda tests/engine/test_gpu_plans.py

clean:
	rm -rf $(VENV) build *.egg-info
