# `make demo` and `make test` need nothing but python3 (3.11 or newer): they make .venv themselves.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

demo: $(VENV)/demo
	rm -rf runs/demo
	$(RUN)/ladder-jax train configs/demo.py --devices 8

test: $(VENV)/test
	$(RUN)/ruff check .
	$(RUN)/python -m pytest --junit-xml=runs/tests.xml
	@echo "done: every test passed, their times are in runs/tests.xml"

test-slow: $(VENV)/test
	$(RUN)/python -m pytest -m slow

$(VENV)/demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ladder_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[plot]'
	touch $@

$(VENV)/test: $(VENV)/demo
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs/demo
