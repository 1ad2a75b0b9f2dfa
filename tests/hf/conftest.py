"""Comparisons with PyTorch, transformers, lm-eval: `make test` runs them in .venv-hf."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob.append("test_*.py")
