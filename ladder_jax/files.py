"""Files that appear when they are complete, whatever ends the process that writes."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ladder_jax.addresses import local_path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to, which replaces `path` when the body succeeds.

    It is in the same folder and has the same suffix. If the body fails, it is removed,
    and `path` is as it was. What is no file is written to itself: /dev/stdout.

    Raises ConfigError where `path` is the address of an object store.
    """
    path = local_path(path, "file")
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()  # the file that a link names
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text in UTF-8, see `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
