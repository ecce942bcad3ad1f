# Burnish.  Every target sets up what it needs in .venv; `make help` lists them.
SHELL := /bin/bash
BIN := .venv/bin
RUN_DIR ?= runs

.DEFAULT_GOAL := help
.PHONY: help install demo trap pipeline study ensemble-study iterate iterate-dpo compare chaos test test-full lint bench gpu docs clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## .venv with everything a CPU machine needs
	@bash scripts/install.sh

demo: install ## a 135M model learns arithmetic by GRPO on two cores
	@$(BIN)/python -m scripts.demo --directory $(RUN_DIR)

trap: install ## the same task with a format bonus: a reward that is hacked
	@$(BIN)/python -m scripts.demo --recipe cpu-format-trap --directory $(RUN_DIR)

pipeline: install ## SFT, preferences, reward model, PPO and evaluation, ending in one page
	@$(BIN)/python -m scripts.pipeline --directory $(RUN_DIR)/pipeline

study: install ## over-optimisation of the pipeline's reward model: gold and proxy against KL (after make pipeline)
	@$(BIN)/python -m scripts.study --directory $(RUN_DIR)/pipeline

ensemble-study: install ## the same of one reward model against three as one, at equal KL (after make pipeline; two hours)
	@$(BIN)/python -m scripts.study --ensemble worst_case --directory $(RUN_DIR)/pipeline

iterate: install ## label the policy's own samples, retrain the reward model, then the policy, repeat (after make pipeline)
	@$(BIN)/python -m launch.cli iterate rlhf --directory $(RUN_DIR)/pipeline

iterate-dpo: install ## label the policy's own samples, train by DPO on them, repeat (after make pipeline)
	@$(BIN)/python -m launch.cli iterate dpo --directory $(RUN_DIR)/pipeline

compare: install ## thirteen algorithms on one task and budget, two seeds each: docs/compare.md (some hours)
	@$(BIN)/python -m launch.cli compare cpu-compare --directory $(RUN_DIR)/compare --page docs/compare.md

chaos: install ## faults under real runs: 100 on a seeded schedule, two hours (docs/chaos.md)
	@$(BIN)/python -m scripts.chaos --directory $(RUN_DIR)/chaos

test: install ## the tests CI runs, with lint and types (20 minutes or less on two cores)
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q -m "not slow"

test-full: install ## every test
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q

lint: install ## ruff, mypy, import contract
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

bench: install ## the ratios of docs/benchmarks.md, measured on this machine
	@$(BIN)/python -m benchmarks.report

.PHONY: curves
curves: install ## reward curves of stale runs, with and without correction (half an hour)
	@$(BIN)/python -m benchmarks.staleness_curves --directory $(RUN_DIR)/staleness

gpu: ## checks for a CUDA machine, in the environment that is active there
	@$${PYTHON:-python3} -m benchmarks.gpu_check

docs: install ## regenerate the tables in docs/
	$(BIN)/python -m trainers.metrics
	$(BIN)/python -m trainers.alarms
	$(BIN)/python -m launch.config_reference
	$(BIN)/python -m trainers.algorithm_table

clean: ## remove .venv and caches (runs stay)
	rm -rf .venv .bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
