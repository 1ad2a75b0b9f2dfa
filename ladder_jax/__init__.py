"""Train and serve Ladder-Residual transformers in JAX.

    import ladder_jax

    ladder_jax.Config(...)            defines a run: model, data, mesh, optimizer, ...
    ladder_jax.train(config)          trains it; returns its metrics and its folder
    ladder_jax.load("runs/short")     a checkpoint's model, config, tokenizer and mesh
    ladder_jax.load_hf("org/model")   the same of a Hugging Face checkpoint
    ladder_jax.save_hf(loaded, out)   writes one
    ladder_jax.Engine(...)            decodes many requests at once
    ladder_jax.plan(config, target)   compiles a program for a machine that is not here

    ladder_jax.ConfigError            a user's mistake, in one line

A loaded model writes text with `loaded.generate(prompt)` and answers with
`loaded.chat(question)`. The sections of a Config (Model, Data, Mesh, Optimizer, Train,
Distill) are in `ladder_jax.config`. notebooks/ has examples.

Names are imported when they are first used: `import ladder_jax` does not start JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ladder_jax.config import Config, ConfigError
    from ladder_jax.hugging_face import load_hf, save_hf
    from ladder_jax.loading import load
    from ladder_jax.planner.planning import plan
    from ladder_jax.serve.engine import Engine
    from ladder_jax.training import train

__all__ = [
    "Config",
    "ConfigError",
    "Engine",
    "load",
    "load_hf",
    "plan",
    "save_hf",
    "train",
]

# No module of the package may have one of these names: its import would replace the
# attribute.
_MODULES = {
    "Config": "ladder_jax.config",
    "ConfigError": "ladder_jax.config",
    "Engine": "ladder_jax.serve.engine",
    "load": "ladder_jax.loading",
    "load_hf": "ladder_jax.hugging_face",
    "plan": "ladder_jax.planner.planning",
    "save_hf": "ladder_jax.hugging_face",
    "train": "ladder_jax.training",
}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ladder_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
