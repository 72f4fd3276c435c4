# `make quickstart` and `make test` do all the set-up there is; a second run starts at once.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
EXTRAS_quickstart := tensorboard
EXTRAS_test := test

# A module is compiled to bytecode once, and not again by each of some hundred processes that import JAX, whatever the
# environment says: that is 1 of the 1.5 seconds an import of it takes.
unexport PYTHONDONTWRITEBYTECODE

# The suite's processes: each has JAX of its own. Three keep two cores busy: one at a time waits for processes that it
# tests, and with two of them the cores were idle for 15 % of the time.
WORKERS ?= 3
# What of the suite depends on JAX itself: tracing, transforms, compiled programs, models and whole runs; of
# plans one of each kind of program. The rest of it sees JAX through these, and runs once. So do all cases of a test
# but its first, and tests that name the file whose tests go through the same of JAX (`@pytest.mark.once`): they are
# other ways through this package's code. Where cases are JAX's primitives all run.
ON_NEXT := --first-cases tests/test_generations.py \
	$(patsubst %,tests/frozen/test_frozen.py::test_a_config_is_planned_as_it_was[%], \
		deepseek-v3 llama3-8b mixtral-8x7b quickstart quickstart.declared) \
	tests/models/test_flax_versions.py \
	$(addprefix tests/runtime/train/test_run.py::test_,it_learns_what_it_always_did a_profile_is_captured_and_read) \
	$(addprefix tests/sharding/,api program transform ops hlo compiled verify/test_worker.py)

# The generation of JAX between the oldest and the newest: what reads its programs, and what makes manual regions.
ON_MIDDLE := tests/test_generations.py tests/sharding/ops tests/sharding/program/test_primitives.py \
	$(addprefix tests/sharding/program/,op_rules test_factors.py test_jaxpr.py test_layers.py test_tracing.py) \
	$(addprefix tests/sharding/transform/,test_packed_attention.py accumulation/test_region.py) \
	tests/benchmarks/test_own_runs.py::test_our_own_runs_are_scored_from_a_clean_checkout

.PHONY: quickstart test test-next test-middle environments check coverage gpu-kit lint types clean

quickstart: $(VENV)/.quickstart
	$(BIN)/meshwright train configs/quickstart.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# Lint, types, and the tests of what differs from BASE: the loop of one change.
check: lint types
	$(BIN)/python -m pytest -q -n $(WORKERS) $$($(BIN)/python tests/touched.py $(BASE))

# Lines that the suite runs, child processes included; the worst files first.
coverage: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS) --cov --cov-report= $(PYTEST_ARGS)
	$(BIN)/coverage report --sort=cover

# The newest JAX needs Python 3.12 or later; the first such interpreter that really starts is used.
NEXT_PYTHON ?= $(shell for python in python3.13 python3.12 $(HOME)/.pyenv/versions/3.1[23].*/bin/python; do \
	"$$python" -c 'import venv' 2>/dev/null && command -v "$$python" && break; done)

test-next:
ifeq ($(strip $(NEXT_PYTHON)),)
	@echo "no Python 3.12 or later on this machine: the newest JAX is not tested here"
else
	$(MAKE) test VENV=.venv-next PYTHON=$(NEXT_PYTHON) PYTEST_ARGS="$(or $(PYTEST_ARGS),$(ON_NEXT))"
endif

# Pins of constraints-jax-0.11.txt stand in for those of the same packages in constraints.txt.
test-middle:
ifeq ($(strip $(NEXT_PYTHON)),)
	@echo "no Python 3.12 or later on this machine: JAX 0.11 is not tested here"
else
	@mkdir -p .venv-middle
	@grep -vE "^($$(cut -d= -f1 constraints-jax-0.11.txt | paste -sd'|'))==" constraints.txt \
		| cat - constraints-jax-0.11.txt > .venv-middle/constraints.txt
	$(MAKE) test VENV=.venv-middle CONSTRAINTS=.venv-middle/constraints.txt PYTHON=$(NEXT_PYTHON) \
		PYTEST_ARGS="$(or $(PYTEST_ARGS),$(ON_MIDDLE))"
endif

# What the generations above install, before they are tested.
environments:
	$(MAKE) test-next test-middle PYTEST_ARGS=--version

# What benchmarks/gpu.sh needs on a machine without network, as wheels in .gpu/.
gpu-kit:
	benchmarks/gpu/collect.sh

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(VENV)/.test
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "meshwright needs Python 3.11 or later; %s is %s" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt constraints-jax-0.11.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS_$*)]"
	@touch $@

.PRECIOUS: $(VENV)/.%

clean:
	rm -rf .venv .venv-next .venv-middle build dist *.egg-info
