"""Two kinds of English text that a Python installation has: for the conversion study.

Documentation is the docstrings of all installed packages and of the standard library.
Notices are the descriptions and licences that packages are distributed with.
"""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ladder_jax.data import python_docs

TESTS = {"test", "tests", "testing", "_testing"}


def write(folder: Path) -> dict[str, Path]:
    """Writes both kinds as text files, if they are not there; returns their folders."""
    kinds = {"documentation": documentation, "notices": notices}
    folders = {}
    for kind, texts in kinds.items():
        path = folders[kind] = folder / kind
        if path.exists():
            continue
        part = folder / f"{kind}.{os.getpid()}"
        part.mkdir(parents=True)
        for number, text in enumerate(texts()):
            (part / f"{number:06}.txt").write_text(text, errors="replace")
        part.rename(path)
    return folders


def packages() -> Path:
    """The folder of the installed packages."""
    return Path(sysconfig.get_paths()["purelib"])


def documentation() -> Iterator[str]:
    """Yields the docstrings of each module; modules without any are left out."""
    root = packages()
    modules = (
        path
        for path in sorted(root.rglob("*.py"))
        if not TESTS & set(path.relative_to(root).parts)
    )
    for path in (*python_docs.files(), *modules):
        try:
            yield from python_docs.read_file(path)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue


def notices() -> Iterator[str]:
    """Yields each package's description and licences, without copies."""
    seen = set()
    for path in sorted(packages().glob("*.dist-info/**/*")):
        is_notice = path.name == "METADATA" or "LICEN" in path.name.upper()
        if not is_notice or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.name == "METADATA":  # the fields, an empty line, the description
            text = text.partition("\n\n")[2]
        if text.strip() and text not in seen:
            seen.add(text)
            yield text
