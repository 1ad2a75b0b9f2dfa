# `make demo` and `make test` need nothing but python3 (3.11 or newer): they make .venv themselves.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# XLA's compilers for other machines have an environment of their own: where they are installed, every command logs a
# line or two.
COMPILERS ?= .venv-plan
# PyTorch, transformers and lm-eval, which tests/hf compares with, take 2 GB.
PARITY ?= .venv-hf
# Tests of single parts; and of the model, two schedules on one mesh.
FAST := architecture batches buckets capacity config corpus docs jsonl matmul metrics packing prefix_cache reductions \
	sampling schedule scheduler sharding sources stop_strings
FAST_MODEL := references and 1x1x8 and (standard or ladder)

.PHONY: demo test test-fast test-slow lint docs clean

demo: $(VENV)/demo
	rm -rf runs/demo
	$(RUN)/ladder-jax train configs/demo.py --devices 8

test: lint docs $(COMPILERS)/test $(PARITY)/test
	$(RUN)/python -m pytest --junit-xml=runs/tests.xml
	$(COMPILERS)/bin/python -m pytest --junit-xml=runs/plan.xml tests/test_plan.py
	$(PARITY)/bin/python -m pytest --junit-xml=runs/hf.xml tests/hf
	@echo "done: every test passed, their times are in runs/tests.xml, runs/plan.xml and runs/hf.xml"

test-fast: $(VENV)/test
	$(RUN)/python -m pytest $(FAST:%=tests/test_%.py)
	$(RUN)/python -m pytest tests/test_model.py -k "$(FAST_MODEL)"

test-slow: $(VENV)/test $(COMPILERS)/test $(PARITY)/test
	$(RUN)/python -m pytest -m slow
	$(PARITY)/bin/python -m pytest -m slow tests/hf
	$(COMPILERS)/bin/python -m pytest -m slow tests/test_plan.py

lint: $(VENV)/test
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# API pages from the docstrings. Fails where a module cannot be imported.
docs: $(VENV)/test
	rm -rf build/docs
	$(RUN)/python -m pdoc --docformat google --output-directory build/docs ladder_jax
	@echo "done: open build/docs/index.html"

$(VENV)/demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ladder_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[plot]'
	touch $@

$(VENV)/test: $(VENV)/demo
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(COMPILERS)/test: $(VENV)/test
	$(PYTHON) -m venv $(COMPILERS)
	$(COMPILERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,plan]'
	touch $@

$(PARITY)/test: $(VENV)/test
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,parity]'
	touch $@

clean:
	rm -rf $(VENV) $(COMPILERS) $(PARITY) build runs/demo
