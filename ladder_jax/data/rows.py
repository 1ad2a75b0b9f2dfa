"""Rows of a file of JSON Lines, JSON or Parquet, as dicts of a few fields.

The content decides how a file is read, as in `formats`, which reads text. A JSON file
is a list of rows.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ladder_jax.data import formats
from ladder_jax.data.formats import Part, Tally

NO_ROWS = "files without rows"
# The start of a JSON list of objects.
_LIST_START = re.compile(rb"\s*\[\s*\{")
_START_BYTES = 1 << 16
_FIRST_ROWS = 8


def first_rows(path: Path, fields: Sequence[str]) -> list[Any]:
    """Returns a few rows of the beginning of a file, none if it is a file of text.

    Args and raises: as in `read_rows`.
    """
    rows = read_rows(Part(path), fields, Tally())
    return list(itertools.islice(rows, _FIRST_ROWS))


def read_rows(part: Part, fields: Sequence[str], tally: Tally) -> Iterator[Any]:
    """Yields the rows of one file: dicts, or other JSON values.

    Args:
      part: of a regular file.
      fields: the only columns that are read of Parquet.
      tally: counts what is left out: lines that are not JSON, files without rows.

    Raises:
      ConfigError: if a package that the format needs is not installed.
      one of formats.UNREADABLE: if the file is damaged.
    """
    path = part.path
    if formats.is_parquet(path):
        yield from _parquet_rows(part, fields, tally)
        return
    try:
        with formats.open_text(path, Tally()) as file:
            is_named = formats.is_named_json_lines(path)
            is_json_lines = is_named or formats.holds_json_lines(file)
        with formats.open_text(path, tally) as file:
            if is_json_lines:
                yield from formats.json_lines_rows(file, tally, part)
            else:
                yield from _json_rows(file, tally)
    except formats.NotText:
        tally.left_out[NO_ROWS] += 1


def _json_rows(file: BinaryIO, tally: Tally) -> Iterator[Any]:
    """Yields the rows of a file that is one JSON list."""
    start = file.read(_START_BYTES)
    if not _LIST_START.match(start.removeprefix(codecs.BOM_UTF8)):
        tally.left_out[NO_ROWS] += 1
        return
    content = start + file.read()
    tally.read += len(content)
    try:
        values = json.loads(content.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        tally.left_out["files that are not valid JSON"] += 1
        return
    yield from values


def _parquet_rows(part: Part, fields: Sequence[str], tally: Tally) -> Iterator[Any]:
    """Yields the rows of Parquet, with the columns that are among `fields`."""
    pyarrow, parquet = formats.import_parquet(part.path)
    size = len(part.of(part.path.stat().st_size))
    try:
        with parquet.ParquetFile(part.path) as file:
            groups, rows = formats.row_groups(file, part)
            names = file.schema_arrow.names
            columns = [name for name in fields if names.count(name) == 1]
            if not columns:
                tally.left_out[NO_ROWS] += 1
                return
            for batch in file.iter_batches(1024, groups, columns):
                tally.read += size * batch.num_rows // rows
                yield from _batch_rows(batch, tally)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _batch_rows(batch: Any, tally: Tally) -> Iterator[Any]:
    """Yields the rows of a batch. Parquet does not check that strings are UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                tally.left_out["rows that are not UTF-8"] += 1
