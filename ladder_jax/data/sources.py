"""Finds the files of a source of text and reads them one document at a time.

A source is a folder, file or glob of text, JSON Lines and Parquet files (see
`formats`), or "builtin" (see `python_docs`). It holds text, or rows of chat (see
`chat_rows`). It counts what it leaves out.
"""

import contextlib
import functools
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError, Data
from ladder_jax.data import chat_rows, formats, python_docs, rows
from ladder_jax.data.formats import Part, Tally

# A folder that has both markers is the train.out of a run, which wrote these outputs.
_RUN_MARKERS = {"checkpoints", "metrics.jsonl"}
_RUN_OUTPUTS = _RUN_MARKERS | {"run.json", "loss.png", "tensorboard", "profile"}
# Orbax writes this file into each checkpoint.
_CHECKPOINT_MARKER = "_CHECKPOINT_METADATA"
# The names of the folders that `token_cache` writes, complete or not.
_TOKEN_CACHE = re.compile(r"tokens-[0-9a-f]{32}(\..*)?")
_OUTPUTS_LEFT_OUT = "files and folders that ladder_jax wrote"


def size_and_time(path: Path) -> tuple[int, int]:
    """Returns (bytes, time of the last change in ns), or (0, 0) without access."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def files(source: str, tally: Tally) -> list[Path]:
    """Returns the files of `data.source`, sorted.

    Of a folder or a glob, it leaves out and counts: outputs of this project (runs,
    checkpoints, token caches), links to folders, and FIFOs, sockets and devices, as
    opening one may block for ever. It leaves out hidden files and folders without
    counting them.

    Args:
      source: a value of `data.source`.
      tally: counts what is left out.

    Raises:
      ConfigError: if there is no file.
    """
    if source == "builtin":
        return python_docs.files()
    root = Path(source).expanduser()
    if root.is_dir():
        paths = list(_walk(root, tally))
        reason = "has no files"
    elif root.exists():
        paths = [root]
        reason = "is not a file"
    else:
        paths = list(_glob(root, tally))
        reason = "matches no file" if glob.has_magic(source) else "does not exist"
    paths = [path for path in paths if _is_readable_kind(path, tally)]
    if not paths:
        left_out = _describe_left_out(tally)
        reason += f" that can be read ({left_out})" if left_out else ""
        raise ConfigError(
            f"data.source={source!r} {reason}: it must be 'builtin', or a folder, file "
            "or glob of text, JSON Lines or Parquet files"
        )
    return sorted(paths)


def _outputs(folder: Path) -> set[str]:
    """Returns the names in a folder that this project wrote."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return set()
    if _CHECKPOINT_MARKER in names:
        return names
    outputs = {name for name in names if _TOKEN_CACHE.fullmatch(name)}
    if _RUN_MARKERS <= names:
        outputs |= _RUN_OUTPUTS & names
    return outputs


def _walk(root: Path, tally: Tally) -> Iterator[Path]:
    """Yields the files in a folder, at any depth: all that is not a folder."""

    def leave_out(error: OSError) -> None:
        tally.left_out["unreadable folders"] += 1

    for name, folders, names in os.walk(root, onerror=leave_out):
        folder = Path(name)
        outputs = _outputs(folder)
        if outputs:
            tally.left_out[_OUTPUTS_LEFT_OUT] += len(outputs)
        links = [n for n in folders if (folder / n).is_symlink()]
        if links:  # os.walk does not follow them: they may form a circle
            tally.left_out["links to folders"] += len(links)
        skipped = outputs | {n for n in (*folders, *names) if n.startswith(".")}
        folders[:] = [n for n in folders if n not in skipped]
        yield from (folder / n for n in names if n not in skipped)


def _glob(pattern: Path, tally: Tally) -> Iterator[Path]:
    """Yields the matches of a glob that are not folders."""
    parts = pattern.parts
    # The base is the folder in front of the first part with a wildcard.
    wildcards = [i for i, part in enumerate(parts) if glob.has_magic(part)]
    base = Path(*parts[: wildcards[0]]) if wildcards else Path()
    outputs_of = functools.cache(_outputs)
    for match in glob.glob(str(pattern), recursive=True):
        path = Path(match)
        names = path.relative_to(base).parts
        folders = [base.joinpath(*names[:i]) for i in range(len(names))]
        if any(name in outputs_of(folder) for folder, name in zip(folders, names)):
            tally.left_out[_OUTPUTS_LEFT_OUT] += 1
        elif not path.is_dir():
            yield path


def _is_readable_kind(path: Path, tally: Tally) -> bool:
    """Whether to read a path: a regular file, or one without access.

    `read` counts a file without access as unreadable.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return True
    if not stat.S_ISREG(mode):
        tally.left_out["FIFOs, sockets and devices"] += 1
        return False
    return True


@contextlib.contextmanager
def _count_unreadable(part: Part, tally: Tally) -> Iterator[None]:
    """Counts a damaged file, and its bytes as read, in whatever way it is read."""
    size, read_before = len(part.of(size_and_time(part.path)[0])), tally.read
    try:
        yield
    except (*formats.UNREADABLE, SyntaxError):
        tally.left_out["unreadable files"] += 1
    tally.read = max(tally.read, read_before + size)


def read(source: str, part: Part, text_field: str, tally: Tally) -> Iterator[str]:
    """Yields the documents of one of the `files` of a source.

    Args:
      source: the value of `data.source`.
      part: of one of its files.
      text_field: the field of JSON rows, or the Parquet column, that holds the text.
      tally: counts what is left out and repaired.

    Raises:
      ConfigError: if a package that the file's format needs is not installed.
    """
    values: Iterator[bytes | str]
    with _count_unreadable(part, tally):
        if source == "builtin":
            values = python_docs.read_file(part.path)
        else:
            values = formats.read_file(part, text_field, tally)
        for value in values:
            text = tally.clean(value)
            if text is not None:
                yield text


def read_rows(part: Part, fields: Sequence[str], tally: Tally) -> Iterator[Any]:
    """Yields the rows of one of the `files` of a source, see `rows.read_rows`.

    A damaged file is counted.
    """
    with _count_unreadable(part, tally):
        yield from rows.read_rows(part, fields, tally)


def holds_chat(data_config: Data, paths: Iterable[Path]) -> bool:
    """Whether a source is rows of chat: `data.format`, or the first file with rows.

    Rows that have the text field are text, whatever else they have.

    Args:
      data_config: with the source and its format.
      paths: the `files` of the source.
    """
    if data_config.format != "auto":
        return data_config.format == "chat"
    if data_config.source == "builtin":
        return False
    for path in paths:
        with _count_unreadable(Part(path), Tally()):
            fields = (data_config.text_field, *chat_rows.FIELDS)
            first_rows = rows.first_rows(path, fields)
            if first_rows:
                return _are_chat(first_rows, data_config.text_field)
    return False


def _are_chat(first_rows: list[Any], text_field: str) -> bool:
    """Whether most rows look like chat, and none has the text field."""
    values = [row.get(text_field) for row in first_rows if isinstance(row, dict)]
    if any(isinstance(value, str) for value in values):
        return False
    return 2 * sum(map(chat_rows.looks_like_chat, first_rows)) > len(first_rows)


def no_document(
    data_config: Data,
    tally: Tally,
    is_chat: bool = False,
    otherwise: str = "it is empty",
) -> ConfigError:
    """Returns the error for a source without a usable document, with the reason.

    otherwise: the reason if nothing was left out.
    """
    reason = _describe_left_out(tally) or otherwise
    name = f"data.source={data_config.source!r}"
    if is_chat:
        return ConfigError(
            f"{name} has no usable conversation ({reason}): it must hold "
            f"{chat_rows.ACCEPTED}"
        )
    return ConfigError(
        f"{name} has no usable document ({reason}): it must hold text, or rows with a "
        f"text field {data_config.text_field!r} (data.text_field), or "
        f"{chat_rows.ACCEPTED}"
    )


def _describe_left_out(tally: Tally) -> str:
    """Returns the counts of what was left out, as text."""
    counts = +tally.left_out  # without the kinds whose count is 0
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
