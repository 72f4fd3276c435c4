# `make quickstart` and `make test` do all the set-up there is; a second run starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS_quickstart := tensorboard
EXTRAS_test := test

.PHONY: quickstart test test-next lint types clean

quickstart: $(VENV)/.quickstart
	$(BIN)/meshwright train configs/quickstart.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The newest JAX needs Python 3.12 or later; the first such interpreter that really starts is used.
NEXT_PYTHON ?= $(shell for python in python3.13 python3.12 $(HOME)/.pyenv/versions/3.1[23].*/bin/python; do \
	"$$python" -c 'import venv' 2>/dev/null && command -v "$$python" && break; done)

test-next:
ifeq ($(strip $(NEXT_PYTHON)),)
	@echo "no Python 3.12 or later on this machine: the newest JAX is not tested here"
else
	$(MAKE) test VENV=.venv-next PYTHON=$(NEXT_PYTHON) PYTEST_ARGS="$(or $(PYTEST_ARGS),tests/sharding)"
endif

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(VENV)/.test
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "meshwright needs Python 3.11 or later; %s is %s" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS_$*)]"
	@touch $@

.PRECIOUS: $(VENV)/.%

clean:
	rm -rf .venv .venv-next build dist *.egg-info
