"""The source "builtin": Python's own documentation, as documents.

It comes with every CPython. It is the same wherever one version of Python is installed,
and differs between versions.
"""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ladder_jax.config import ConfigError

_TEST_FOLDERS = {"test", "tests", "idle_test"}


def files() -> list[Path]:
    """Returns the source files of Python's standard library, without its tests.

    Raises:
      ConfigError: if this Python has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for name in sorted(sys.stdlib_module_names):
        for path in sorted((root / name).rglob("*.py")):
            if not _TEST_FOLDERS & set(path.parts[len(root.parts) :]):
                paths.append(path)
        module = root / f"{name}.py"
        if module.exists():
            paths.append(module)
    if not paths:
        raise ConfigError(
            f"data.source='builtin' finds no source files of Python in {root}: name a "
            "folder, file or glob of text"
        )
    return paths


def read_file(path: Path) -> Iterator[str]:
    """Yields the docstrings of a module as one document, in the layout of `help`.

    From `pydoc_data/topics.py` it yields a document for each topic.

    Raises:
      OSError, SyntaxError: if the file cannot be read.
    """
    with warnings.catch_warnings():
        # Python warns of some escapes in strings of its standard library.
        warnings.simplefilter("ignore")
        module = ast.parse(path.read_bytes())
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        table = next(node for node in module.body if isinstance(node, ast.Assign))
        yield from ast.literal_eval(table.value).values()
        return
    parts = list(_docstrings(module, ""))
    module_docstring = ast.get_docstring(module)
    if module_docstring:
        parts.insert(0, module_docstring)
    if parts:
        yield "\n\n".join(parts) + "\n"


def _docstrings(node: ast.AST, indent: str) -> Iterator[str]:
    """Yields heading and docstring of each documented class and function in `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try)):
            yield from _docstrings(child, indent)
        elif isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            heading = f"class {child.name}" + (f"({bases})" if bases else "")
            yield from _heading_and_docstring(child, heading, indent)
            yield from _docstrings(child, indent + "    ")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            heading = f"{child.name}({ast.unparse(child.args)})"
            yield from _heading_and_docstring(child, heading, indent)


def _heading_and_docstring(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    heading: str,
    indent: str,
) -> Iterator[str]:
    """Yields the heading and the indented docstring, if there is a docstring."""
    text = ast.get_docstring(node)
    if text:
        lines = [heading, *("    " + line for line in text.splitlines())]
        yield "\n".join((indent + line).rstrip() for line in lines)
