"""Comparisons with PyTorch, transformers and lm-eval.

`make test` runs them in .venv-hf.
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parents[1]))  # for tests/helpers.py

collect_ignore_glob = []
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob.append("test_*.py")
else:  # pytest reads this file in every environment; these settings are for one
    import torch
    from helpers import FAST_FLAGS

    # Most of these tests' time is compilation.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_FLAGS}"

    # The models are tiny: where cores are busy, threads mostly wait for each other.
    torch.set_num_threads(1)
