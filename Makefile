# `make quickstart` and `make test` set everything up by themselves, once.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: help quickstart test check

help:
	@echo "make quickstart  train UniFormer-S on the images that ship with the repository, minutes on 2 CPU cores"
	@echo "make test        run the tests"
	@echo "make check       lint, check the format and the types"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a download of several GB where pip has not cached it."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	$(VENV)/bin/effb train quickstart

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
