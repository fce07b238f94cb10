# make quickstart   from nothing to a GenEval score on the embedded data set (two cores, about 20 minutes)
# make test         the test suite;  make lint  style, types and import rules
# Everything lands in .venv, data/, runs/ and exports/. Each step goes on where an interrupted one stopped.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
RUN := runs/shapes-tiny
EXPORT := exports/shapes-tiny
export PATH := $(abspath $(VENV)/bin):$(PATH)
# Of the libraries' own accord each process would start a thread per core.
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart test test-fast lint format clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -3

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); install Python 3.11 or newer, or give PYTHON=" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[eval]'
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[eval,dev]'
	touch $@

install: $(INSTALLED_DEV)

# One step a line of the recipe below, echoed before it runs. The sets, the run and the pictures go on where they were, the
# last two from the newest checkpoint and the first picture missing; the export, seconds, is made again.
define QUICKSTART
t2i data shapes --out data/shapes --samples 20000
t2i data index data/shapes
t2i encode data/shapes --out data/shapes-encoded --image-size 64 --tokenizer shapes
deepspeed --num_accelerators 2 t2i/train.py shapes-tiny --deepspeed_config deepspeed_configs/cpu.json
t2i export $(RUN) --out $(EXPORT)
t2i sample $(EXPORT) "a photo of a red circle left of a blue star" --out $(EXPORT)/sample.png --images 8
t2i geneval run $(EXPORT) --judge shapes --run-dir $(RUN)
endef
export QUICKSTART

quickstart: $(INSTALLED)
	@while IFS= read -r step; do
		printf '\n\033[1m$$ %s\033[0m\n' "$$step"
		eval "$$step" </dev/null
	done <<< "$$QUICKSTART"

test: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -rsfE tests

test-fast: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 python -m pytest tests -m "not slow"

lint: $(INSTALLED_DEV)
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache

format: $(INSTALLED_DEV)
	ruff check --fix .
	ruff format .

# What the quickstart made; sets, runs and exports of one's own stay.
clean:
	rm -rf data/shapes data/shapes-encoded $(RUN) $(EXPORT)
