# Everything a fresh machine needs: Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
DEVICE ?= cpu
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
export TOKENIZERS_PARALLELISM = false

.PHONY: help quickstart install test test-fast test-end-to-end check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

quickstart: install $(MODEL)/config.json  ## install, then train the bundled 135M model on CPU
	@$(BIN)/python -m cluster.main train configs/quickstart.yaml run.folder=$(RUN) $(OVERRIDES)

install:  ## make .venv from the complete lock (DEVICE=cpu or gpu); instant when it is up to date
	@$(PYTHON) requirements/install.py $(DEVICE) $(VENV)

$(MODEL)/config.json:
	@$(BIN)/python -m cluster.main prepare $(MODEL)

test: install test-fast test-end-to-end  ## every test

test-fast: install  ## tests without an engine, under 2 minutes
	@$(BIN)/python -m pytest tests/fast -q

test-end-to-end: install  ## real Ray, vLLM and DeepSpeed on tiny models
	@$(BIN)/python -m pytest tests/end_to_end -q

check: install  ## format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: install  ## format and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and caches; runs and models stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
