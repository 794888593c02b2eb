# Needs git, make and Python 3.11 or newer. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv

READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help nanogpt test test-slow lint lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

nanogpt: $(READY)  ## the main job: train a small GPT, compressed and not (about four minutes)
	$(VENV)/bin/python -m experiments.nanogpt $(ARGS)

test: $(READY)  ## all tests of the default run
	$(VENV)/bin/python -m pytest --numprocesses=auto --dist=loadfile $(ARGS)

test-slow: $(READY)  ## the tests that take minutes each
	$(VENV)/bin/python -m pytest -m slow --timeout=1800 $(ARGS)

lint: $(READY)  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check ef21_jax --python-interpreter-path $(VENV)/bin/python

lock:  ## pins every dependency anew (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --output-file requirements.lock

clean:  ## removes the environment and what the tests leave
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
