# `make demo` and `make test` need nothing but Python 3.11 or newer; the environment goes to .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-gpu gpu planted-bugs lint format tables docs wheel bench compare growth clean
export PYTHONSAFEPATH := 1

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
SUPPORTED := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
# The first interpreter that is new enough; `make PYTHON=/path/to/python3` takes another one.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$p; break; }; done)

help:  ## say what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(READY)  ## complete four prompts, forked, in one batch on the demo model
	@$(VENV)/bin/pagefork demo

# Tests side by side take cores from each other: threads that wait must not spin.
test: $(READY)  ## run the tests, side by side on up to four cores
	@OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

test-long: $(READY)  ## run the tests that take minutes
	@$(RUN) -m pytest -m 'long and not gpu'

test-gpu: $(READY)  ## run the tests that need a CUDA device
	@$(RUN) -m pytest -m gpu

# Where torch for CUDA is installed already and there is no index: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(RUN)
GPU_OUTPUT ?= benchmarks/results
gpu: $(if $(filter $(RUN),$(GPU_PYTHON)),$(READY))  ## on a CUDA device: its tests and the benchmarks of engine and kernels, within 8 minutes
	@$(GPU_PYTHON) benchmarks/gpu.py --output '$(GPU_OUTPUT)'

planted-bugs: $(READY)  ## plant bugs in scheduler, service and gateway, one at a time: does a test catch each?
	@$(RUN) tests/planted_bugs.py

lint: $(READY)  ## ruff and mypy --strict
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@rm -rf build/typed && mkdir -p build/typed/pagefork
	@ln -s "$(CURDIR)"/engine/* "$(CURDIR)/kernels" "$(CURDIR)/scheduler" build/typed/pagefork/
	$(RUN) -m mypy -p pagefork
	$(RUN) -m mypy benchmarks docs examples

format: $(READY)  ## rewrite the files as `make lint` wants them
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

tables: $(READY)  ## write the tables in docs/ from the code: parameters, and what compiled kernels take
	$(RUN) docs/tables.py
	$(RUN) docs/compiled.py

docs: $(READY) $(VENV)/.docs  ## build the guides and the API reference into build/docs
	$(RUN) -m sphinx --quiet --fail-on-warning --fresh-env -b html docs build/docs

wheel: $(READY)  ## build the wheel into dist/
	@rm -rf dist build/lib build/bdist.*
	$(RUN) -m build --wheel --no-isolation

bench: $(READY)  ## compare the throughput with transformers; takes minutes
	$(RUN) benchmarks/throughput.py

compare: $(READY)  ## compare with llama.cpp, OpenVINO, vLLM, CTranslate2 and transformers on a CPU; installs them, then takes half an hour
	$(RUN) benchmarks/compare.py

growth: $(READY)  ## measure how rates, times and memory grow with batch, context, beams, ...; takes ten minutes
	$(RUN) benchmarks/growth.py

clean:  ## remove what was made, but for the environment in .venv
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find engine kernels scheduler tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt $(wildcard kernels/csrc/*.h kernels/csrc/*.inc kernels/csrc/*.cpp)
	@'$(PYTHON)' -c '$(SUPPORTED)' 2>/dev/null || { echo "Pagefork needs Python 3.11 or newer with venv and pip," \
		"found '$(PYTHON)'; name one by: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing into $(VENV) by $(PYTHON); this takes a few minutes."
	@test -x $(RUN) || '$(PYTHON)' -m venv $(VENV)
	@$(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,bench]'
	@touch $@

$(VENV)/.docs: $(READY)
	@$(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	@touch $@
