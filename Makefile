# `make quickstart` and `make test` set everything up by themselves, once.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
INSTALLED_MM := $(VENV)/.installed-mm
OPERATORS := op:aggregated_attention op:super_token_attention op:token_merging
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart test test-core test-slow speed check

help:
	@echo "make quickstart  train UniFormer-S on the images that ship with the repository, minutes on 2 CPU cores"
	@echo "make test        run the tests, with the OpenMMLab packages: the first time their operators compile for minutes"
	@echo "make test-core   run the tests without setting up the OpenMMLab packages, whose tests are skipped then"
	@echo "make test-slow   run what takes too long for every change: all families under all heads, all dense recipes"
	@echo "make speed       fail where an operator is slower than its plain formulation"
	@echo "make check       lint, check the format and the types"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a download of several GB where pip has not cached it."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

$(INSTALLED_MM): $(INSTALLED) tools/build_mmcv.sh
	bash tools/build_mmcv.sh $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[dev,mm]'
	touch $@

quickstart: $(INSTALLED)
	$(VENV)/bin/effb train quickstart

test: $(INSTALLED) $(INSTALLED_MM)
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

test-core: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

test-slow: $(INSTALLED) $(INSTALLED_MM)
	$(VENV)/bin/python -m pytest -n 2 -m slow

speed: $(INSTALLED)
	$(VENV)/bin/effb bench $(OPERATORS) --vs ops=reference --mode inference train --batch 4 --at-least 1

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
