"""Writes API pages of every module from the docstrings: python docs/api_pages.py OUT.

Stops at the first module that cannot be imported, and at any warning of pdoc.
"""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import ladder_jax


def main(out: Path) -> None:
    # pdoc takes a package's __all__ as the list of all its members and submodules,
    # and does not ask __getattr__: give it the lazy names, and every submodule.
    for name in ladder_jax.__all__:
        setattr(ladder_jax, name, getattr(ladder_jax, name))
    children = [child.name for child in pkgutil.iter_modules(ladder_jax.__path__)]
    ladder_jax.__all__ = sorted({*ladder_jax.__all__, *children} - {"__main__"})

    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc("ladder_jax", output_directory=out)
    modules = pkgutil.walk_packages(ladder_jax.__path__, "ladder_jax.")
    names = {module.name for module in modules} - {"ladder_jax.__main__"}
    missing = [name for name in sorted(names) if not page(out, name).exists()]
    if missing:
        sys.exit(f"pdoc wrote no page for {', '.join(missing)}")


def page(out: Path, module: str) -> Path:
    return out / f"{module.replace('.', '/')}.html"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
