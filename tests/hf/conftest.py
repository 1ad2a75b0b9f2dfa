"""Comparisons with PyTorch, transformers and lm-eval. They run in .venv-hf."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob.append("test_*.py")
