"""Train and serve Ladder-Residual transformers in JAX.

    load("runs/short")   loads a checkpoint, see `loading.load`
    load_hf("org/model") loads a Hugging Face checkpoint, see `hugging_face`
    save_hf(loaded, out) writes one
    Engine(...)          decodes many requests at once, see `serve.engine`
    Config(...)          defines a run, see `config`

Names are imported when they are first used: `import ladder_jax` does not start JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ladder_jax.config import Config
    from ladder_jax.hugging_face import load_hf, save_hf
    from ladder_jax.loading import load
    from ladder_jax.serve.engine import Engine

__all__ = ["Config", "Engine", "load", "load_hf", "save_hf"]

_MODULES = {
    "Config": "ladder_jax.config",
    "Engine": "ladder_jax.serve.engine",
    "load": "ladder_jax.loading",
    "load_hf": "ladder_jax.hugging_face",
    "save_hf": "ladder_jax.hugging_face",
}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ladder_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
