# make train    a trained model on real data
# make test     linters and all tests
# make docs     the manual as a site in build/site/, which needs no network to be read
# make image-test  both images, built and run, and the two machines of compose.yaml (podman)
# make mutants  one error at a time in a copy of our own code, and which test notices; half an hour to an hour
# make bench    time per step, to the first step and of a save, against hand-written PyTorch; memory and traffic of each strategy
PYTHON ?= python3
VENV := .venv
DOCS_VENV := build/docs-venv
BIN := $(VENV)/bin
WORKERS ?= 3

.PHONY: train test test-long docs mutants image-test lint bench venv clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(VENV)/installed

$(VENV)/installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@

train: venv
	$(BIN)/accelerate launch runtime/train.py configs/digits.yaml

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" --numprocesses $(WORKERS) --dist worksteal

test-long: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

# The tools of the manual need neither torch nor Lockstep itself: they read the source.
$(DOCS_VENV)/installed: .ci/docs-requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

docs: $(DOCS_VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --clean --config-file - < docs/mkdocs.yml

mutants: venv
	$(BIN)/python -m tests.mutants --workers $(WORKERS) --table benchmarks/mutants.md

image-test: venv
	$(BIN)/python -m pytest -s -p no:cacheprovider docker/test_image.py

bench: venv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_time.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/startup_time.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/checkpoint_time.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sharding.py

clean:
	rm -rf $(VENV) build runs
