# Everything a fresh machine needs: Python 3.11+, make and a C++ compiler.
PYTHON ?= python3
DEVICE ?= cpu
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
JOBS ?= 2
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
export TOKENIZERS_PARALLELISM = false

.PHONY: help quickstart install test test-fast test-end-to-end test-long test-gpu peer bench check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

quickstart: install $(MODEL)/config.json  ## install, then train the bundled 135M model on CPU
	@$(BIN)/python -m cluster.main train configs/quickstart.yaml run.folder=$(RUN) $(OVERRIDES)

install:  ## make .venv from the complete lock (DEVICE=cpu or gpu); instant when it is up to date
	@$(PYTHON) requirements/install.py $(DEVICE) $(VENV)

$(MODEL)/config.json:
	@$(BIN)/python -m cluster.main prepare $(MODEL)

test: install test-fast test-end-to-end  ## every test but the long ones, under 30 minutes on 2 cores

test-fast: install  ## tests without an engine, under 2.5 minutes; JOBS=N tests at once
	@$(BIN)/python -m pytest tests/fast -q -n $(JOBS) --dist worksteal

test-end-to-end: install  ## real Ray, vLLM and DeepSpeed on tiny models
	@$(BIN)/python -m pytest tests/end_to_end -q -n $(JOBS) --no-loadscope-reorder -m "not long"

test-long: install  ## further whole runs and benchmarks
	@$(BIN)/python -m pytest tests/end_to_end -q -n $(JOBS) --no-loadscope-reorder -m long

test-gpu: install  ## what runs on GPUs only; needs one, and DEVICE=gpu
	@$(BIN)/python -m pytest tests/gpu -q

peer: install  ## TRL for benchmarks/versus_trl.py, into .peer (it needs nothing that .venv does not have)
	@test -d .peer/trl || $(BIN)/python -m pip install --quiet --no-deps --target .peer trl==1.16.0

bench: install $(MODEL)/config.json peer  ## every benchmark with its table; an hour or more on 2 cores
	@$(BIN)/python -m benchmarks.learner --shape hh --json runs/bench/learner-hh.json
	@$(BIN)/python -m benchmarks.learner --shape gsm8k --json runs/bench/learner-gsm8k.json
	@$(BIN)/python -m benchmarks.plan --json runs/bench/plan.json
	@$(BIN)/python -m benchmarks.head --json runs/bench/head.json
	@$(BIN)/python -m benchmarks.memory --json runs/bench/memory.json
	@$(BIN)/python -m benchmarks.zero3 --ranks 1 --json runs/bench/zero3.json
	@$(BIN)/python -m benchmarks.zero3 --ranks 2 --beside modules --json runs/bench/zero3-2-modules.json
	@$(BIN)/python -m benchmarks.zero3 --ranks 2 --beside defaults --json runs/bench/zero3-2-defaults.json
	@$(BIN)/python -m benchmarks.zero3 --model narrow --shape tiny --groups 2 --ranks 1 --json runs/bench/zero3-narrow.json
	@$(BIN)/python -m benchmarks.versus_trl --shape hh --json runs/bench/versus-trl-hh.json
	@$(BIN)/python -m benchmarks.versus_trl --shape gsm8k --groups 1 --trl plain old-pass --json runs/bench/versus-trl-gsm8k.json
	@$(BIN)/python -m benchmarks.versus_trl --shape gsm8k --groups 1 --trl own-memory --json runs/bench/versus-trl-gsm8k-own.json
	@$(BIN)/python -m benchmarks.as_shipped --json runs/bench/as-shipped.json

check: install  ## format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: install  ## format and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and caches; runs and models stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
