# make install      a virtual environment in .venv with the tested versions
# make mine         install, mine the embedded dataset, say what was found and where to look
# make test         install, lint, type-check, quick tests (minutes)
# make test-long    the whole mine, trainings of two workers, a million rows
# make test-release clusters, kills, whole runs on stores, unseen scenes, photographs
# make test-faults  kills, crashes and store faults, ten seeds of each (about an hour)
# make base         train the tiny base model again (about 35 minutes on 2 cores)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install mine test test-long test-release test-faults base clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes, most of them for torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable ".[s3]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) --editable ".[s3,dev]"
	@touch $@

mine: install
	$(BIN)/python jobs/mine.py configs/toytown.yaml

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not long and not release" --durations=5

test-long: $(VENV)/installed-dev
	$(BIN)/pytest -m long --durations=10

test-release: $(VENV)/installed-dev
	$(BIN)/pytest -m release --durations=10

test-faults: $(VENV)/installed-dev
	DIFFMINE_FAULT_SEEDS=10 $(BIN)/pytest tests/faults tests/stages/test_trainer.py -s

base: install
	$(BIN)/python scripts/make_tiny_base.py

clean:
	rm -rf $(VENV) runs
