# Each target sets up what it needs: a machine with Python 3.11 (or newer) and make is enough.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
MILVUS := .venv-milvus/.installed
MODEL ?= models/default
# Most tests wait for processes that start. A file's tests stay together, as they share a service.
TOGETHER ?= --numprocesses 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup run milvus test test-fast test-slow check format bench lock golden clean

help: ## Lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## Makes .venv with everything that serving, training and testing need

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dinoserve needs Python 3.11 or newer; $(PYTHON) is older. Try: make setup PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

run: $(INSTALLED) ## Serves MODEL (models/default) on http://127.0.0.1:8000
	$(BIN)/dino-serve run --model $(MODEL)

milvus: $(MILVUS) ## Makes .venv-milvus with the Milvus server that tests start (no wheel for your machine: they skip)

# Of its own: a server from 2024 that nothing but tests starts. Where it has no wheel, make goes on without it.
$(MILVUS):
	test -x .venv-milvus/bin/python || $(PYTHON) -m venv .venv-milvus
	.venv-milvus/bin/python -m pip install --quiet --disable-pip-version-check 'milvus==2.3.5' \
		&& touch $@ || { rm -rf .venv-milvus; echo "no Milvus server for this machine: the tests that need one skip"; }

test: $(INSTALLED) $(MILVUS) ## All tests but the slow ones, with the coverage floor
	$(BIN)/python -m pytest $(TOGETHER) --cov --cov-report=term:skip-covered --cov-fail-under=85

test-fast: $(INSTALLED) ## The tests of the numerics and of the parts, without servers and browsers
	$(BIN)/python -m pytest tests/dino_core tests/app/search tests/app/inference -x -q

test-slow: $(INSTALLED) $(MILVUS) ## The slow, load and soak tests (minutes to an hour)
	$(BIN)/python -m pytest -m 'slow or load' --timeout 5400

check: $(INSTALLED) ## Format, lint, import directions, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED) ## Formats and mends what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## Measures against the limit of this machine; nothing else may compute meanwhile
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.augmentation
	$(BIN)/python -m benchmarks.search
	$(BIN)/python -m benchmarks.upserts
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.similar_http

golden: $(INSTALLED) ## The official implementation's numbers against ours (DINO_GOLDEN names another file)
	$(BIN)/python -m pytest tests/dino_core/test_golden.py -v

lock: ## Writes requirements.lock from a fresh environment with the newest allowed versions
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	(echo '# A pip constraints file, made by `make lock`: the versions that CI has tested.'; \
		.venv-lock/bin/python -m pip freeze --exclude dinoserve) > requirements.lock
	rm -rf .venv-lock build

clean: ## Removes what the targets made, but neither data nor runs
	rm -rf .venv .venv-milvus .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage build *.egg-info
