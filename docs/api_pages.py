"""Writes API pages from the docstrings: python docs/api_pages.py FOLDER.

`pdoc ladder_jax` alone shows neither the names that `ladder_jax` imports when they are
first used nor, because it has `__all__`, any of its modules. Fails where a module
cannot be imported.
"""

import pkgutil
import sys
from pathlib import Path

import pdoc

import ladder_jax

# It is made for transformers, which loads it beside a model.
LEFT_OUT = "!ladder_jax.convert.exported"


def main(folder: str) -> None:
    """Writes the pages of the package and of all its modules."""
    for name in ladder_jax.__all__:
        getattr(ladder_jax, name)
    modules = [module.name for module in pkgutil.iter_modules(ladder_jax.__path__)]
    ladder_jax.__all__ += [name for name in modules if not name.startswith("_")]
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("ladder_jax", LEFT_OUT, output_directory=Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
