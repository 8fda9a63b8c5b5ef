# `make demo` and `make test` set up everything they need in .venv, from nothing but Python and this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
TESTS ?= tests

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/sparsekit demo $(MODEL)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadscope -q $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only

# The CPU build of torch comes first: it satisfies every later requirement, which alone would fetch gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "sparsekit needs Python 3.11 or later; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,dev]"
	# An editable install alone is found after the working directory: beside a clone called "sparsekit", Python would
	# take that folder for the package. Plain paths are found in time.
	printf '%s\n' '$(CURDIR)' '$(CURDIR)/kernels' > "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/sparsekit.pth"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
