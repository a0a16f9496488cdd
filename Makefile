# Every target sets up what it needs: a virtual environment in .venv with the package and its tools.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)/lowest
# Where torch comes from; TORCH_INDEX=https://download.pytorch.org/whl/cpu spares the libraries of a GPU, some 5 GB.
TORCH_INDEX ?=

# Before commands that only root may run.
ROOT := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

# A file of tests stays in one process, for its tests share trained networks.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick lowest browser check fix clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip<26"
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/ready      ## what a student gains from its teacher, on the embedded digits, one table
	$(BIN)/spikedistill demo

check: $(VENV)/ready     ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check              ## style, types, tests, examples in README and docstrings
	$(BIN)/$(PYTEST)

quick: $(VENV)/ready     ## tests that are not marked slow: about a minute
	$(BIN)/$(PYTEST) -m "not slow"

browser:                 ## a browser of the distribution (Debian, Ubuntu), for the test of the pages
	command -v chromedriver >/dev/null || { $(ROOT) apt-get update -qq && $(ROOT) apt-get install -y -qq \
	  --no-install-recommends chromium chromium-driver; }

lowest: $(LOWEST)/ready  ## the quick tests with the oldest dependencies that pyproject.toml allows
	$(LOWEST)/bin/$(PYTEST) -m "not slow"

$(LOWEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade "pip<26"
	sed -n 's/^  "\([a-z-]*\)>=\(.*\)",/\1==\2/p' pyproject.toml | sort -u > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable ".[dev]"
	touch $@

fix: $(VENV)/ready       ## what can be put right by a machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
