"""Reads one file of text, JSON Lines or Parquet, one document at a time.

The content decides how a file is read, so its name may be anything:

- Parquet has its magic number at both ends (a file named .parquet is always Parquet).
- gzip, bzip2, xz and Zstandard have one at the start; the text in them is read.
- JSON Lines: most of the first lines are JSON objects (a file named .jsonl or .ndjson
  is always JSON Lines).
- All else is text, a document a file: UTF-8, or UTF-16 or UTF-32 with a byte-order
  mark.
"""

import bz2
import codecs
import collections
import contextlib
import dataclasses
import gzip
import importlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ladder_jax.config import ConfigError
from ladder_jax.data.jsonl import read_lines
from ladder_jax.data.surrogates import without_surrogates

try:
    _zstd: Any = importlib.import_module("compression.zstd")
except ImportError:  # before Python 3.14
    _zstd = None

# The exceptions that opening or reading a damaged file raises.
UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    *((_zstd.ZstdError,) if _zstd else ()),
)

_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_PARQUET_MAGIC = b"PAR1"
_PARQUET_MIN_BYTES = 12  # the magic number twice, and the length of the footer
# The start of a JSON object or of an array of objects, arrays or strings.
_JSON_START = re.compile(rb'\s*(\{\s*["}]|\[\s*["{\[])')
# This many lines decide whether a file is JSON Lines. One line would not be enough, as
# it may be damaged.
_FIRST_LINES = 8
# A file with a larger share of NUL bytes or undecodable characters is not text.
_MAX_BROKEN_FRACTION = 0.01


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of the rows of a file: the rows of a whole file are those of its parts.

    The parts of a file in order have its rows in order.
    """

    path: Path
    index: int = 0
    count: int = 1

    def of(self, amount: int) -> range:
        """Returns this part's share of the numbers below `amount`."""
        start = amount * self.index // self.count
        return range(start, amount * (self.index + 1) // self.count)


@dataclasses.dataclass
class Tally:
    """Counts of documents, rows and files that the readers left out or changed.

    Attributes:
      read: bytes read so far, for a progress bar; within a file it is an estimate.
      left_out: {kind: how many were not read}.
      noted: {kind: how many were read, but perhaps not as the user expects}.
      repaired: documents in which bytes that are not UTF-8 became U+FFFD.
    """

    read: int = 0
    left_out: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    noted: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    repaired: int = 0

    def clean(self, value: bytes | str) -> str | None:
        """Returns a document as valid Unicode; counts a blank one and returns None."""
        if isinstance(value, bytes):
            text = value.decode("utf-8-sig", "surrogateescape")
        else:
            text = value
        # Surrogates stand for bytes that are not UTF-8, or come from JSON escapes.
        repaired = without_surrogates(text)
        self.repaired += repaired != text
        if repaired.strip():
            return repaired
        self.left_out["empty documents"] += 1
        return None


class NotText(Exception):
    """The content of a file is not text."""


def most_parts(path: Path) -> int | None:
    """Returns into how many parts a file can be divided; None: any number.

    Only Parquet, and JSON Lines that are not compressed, have more than one.

    Raises: as `read_file`.
    """
    if is_parquet(path):
        pyarrow, parquet = import_parquet(path)
        try:
            with parquet.ParquetFile(path) as file:
                return max(int(file.metadata.num_row_groups), 1)
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from None
    with open(path, "rb") as file:
        start = file.read(16)
    is_plain = next(p for p in _OPENERS if re.match(p, start)) == b""
    if not is_plain or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 1
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return 1
    with open(path, "rb") as file:
        is_json_lines = is_named_json_lines(path) or holds_json_lines(file)
    return None if is_json_lines else 1


def named_kind(path: Path) -> str:
    """Returns the kind of file that a name says, "" if the content alone decides."""
    if path.suffix.lower() in _PARQUET_SUFFIXES:
        return "parquet"
    return "json lines" if is_named_json_lines(path) else ""


def read_file(part: Part, text_field: str, tally: Tally) -> Iterator[bytes | str]:
    """Yields the documents of one file, as str or as UTF-8 that may have errors.

    Args:
      part: of a regular file.
      text_field: the field of JSON rows, or the Parquet column, that holds the text.
      tally: counts what is left out.

    Raises:
      ConfigError: if a package that the format needs is not installed.
      one of UNREADABLE: if the file is damaged.
    """
    path = part.path
    if is_parquet(path):
        yield from _read_parquet(part, text_field, tally)
        return
    try:
        with open_text(path, Tally()) as file:
            is_json_lines = is_named_json_lines(path) or holds_json_lines(file)
        with open_text(path, tally) as file:
            if is_json_lines:
                yield from _read_json_lines(file, text_field, tally, part)
            else:
                yield _read_text(file, tally)
    except NotText:
        tally.left_out["files that are not text"] += 1


# ------------------------------------------------------------------ opening


def _open_zstd(path: Path) -> BinaryIO:
    if _zstd:
        return _zstd.open(path)
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(
            f"data.source: {str(path)!r} is compressed with Zstandard, which needs "
            "Python 3.14 or pyarrow: pip install 'ladder_jax[parquet]'"
        ) from None
    return pyarrow.input_stream(str(path), compression="zstd")


def _open_plain(path: Path) -> BinaryIO:
    return open(path, "rb")


# {pattern of a file's first bytes: its opener}. The first pattern that matches counts.
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9]1AY&SY": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
    rb"\x28\xb5\x2f\xfd": _open_zstd,
    rb"": _open_plain,
}


@contextlib.contextmanager
def open_text(path: Path, tally: Tally) -> Iterator[BinaryIO]:
    """Opens a file as a stream of bytes, decompressed; UTF-16 and UTF-32 as UTF-8."""
    with open(path, "rb") as file:
        start = file.read(16)
    openers = (_OPENERS[pattern] for pattern in _OPENERS if re.match(pattern, start))
    open_file = next(openers)
    with open_file(path) as file:
        stream = io.BufferedReader(file)
        start = stream.peek(4)[:4]
        if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
            yield io.BytesIO(_to_utf8(stream.read(), "utf-32", tally))
        elif start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            yield io.BytesIO(_to_utf8(stream.read(), "utf-16", tally))
        else:
            yield stream


def _to_utf8(content: bytes, encoding: str, tally: Tally) -> bytes:
    """Returns UTF-16 or UTF-32 as UTF-8.

    Raises NotText if too many characters cannot be decoded.
    """
    text = content.decode(encoding, "replace")
    broken = text.count("\ufffd")
    if broken > _MAX_BROKEN_FRACTION * len(text):
        raise NotText
    tally.repaired += bool(broken)
    return text.encode()


# ------------------------------------------------------------------ text


def _read_text(file: BinaryIO, tally: Tally) -> bytes:
    """Returns the content of a text file. Raises NotText if it is not text."""
    content = file.read()
    if b"\0" in content and not _is_text_with_nul(content):
        raise NotText
    if _JSON_START.match(content.removeprefix(codecs.BOM_UTF8)):
        tally.noted["files that look like JSON, not JSON Lines, are read as text"] += 1
    return content


def _is_text_with_nul(content: bytes) -> bool:
    """Whether a file with NUL bytes is text: UTF-8 with few NUL bytes."""
    if content.count(0) > _MAX_BROKEN_FRACTION * len(content):
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


# ------------------------------------------------------------------ JSON Lines


def is_named_json_lines(path: Path) -> bool:
    """Whether the name of a file, compressed or not, is that of JSON Lines."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED_SUFFIXES:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in _JSON_LINES_SUFFIXES


def _parse_row(line: bytes) -> Any:
    """Returns a line's JSON value. Raises ValueError or RecursionError."""
    return json.loads(line.decode("utf-8-sig", "surrogateescape"))


def holds_json_lines(file: BinaryIO) -> bool:
    """Whether most of the first lines that are not blank are JSON objects."""
    lines = (line for _, line in read_lines(file) if line.strip())
    are_objects = [_is_object(line) for line in itertools.islice(lines, _FIRST_LINES)]
    return 2 * sum(are_objects) > len(are_objects)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_parse_row(line), dict)
    except (ValueError, RecursionError):
        return False


def no_text_field(text_field: str) -> str:
    """Returns the kind of `Tally.left_out` for rows without the text field."""
    return f"rows without a text field {text_field!r}"


def _lines_of(file: BinaryIO, part: Part) -> Iterator[bytes]:
    """Yields the lines that begin in a part of the bytes of a file."""
    if part.count == 1:
        yield from (line for _, line in read_lines(file))
        return
    span = part.of(file.seek(0, io.SEEK_END))
    file.seek(max(span.start - 1, 0))
    if span.start:  # the rest of a line that begins in the part before
        file.readline()
    position = file.tell()
    while position < span.stop and (line := file.readline()):
        position += len(line)
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def json_lines_rows(file: BinaryIO, tally: Tally, part: Part) -> Iterator[Any]:
    """Yields the JSON value of each line of a part; counts lines that are not JSON."""
    for line in _lines_of(file, part):
        tally.read += len(line)
        if not line.strip():
            continue
        try:
            yield _parse_row(line)
        except (ValueError, RecursionError):
            tally.left_out["rows that are not JSON"] += 1


def _read_json_lines(
    file: BinaryIO, text_field: str, tally: Tally, part: Part
) -> Iterator[bytes | str]:
    for row in json_lines_rows(file, tally, part):
        value = row.get(text_field) if isinstance(row, dict) else None
        if isinstance(value, str):
            yield value
        else:
            tally.left_out[no_text_field(text_field)] += 1


# ------------------------------------------------------------------ Parquet


def is_parquet(path: Path) -> bool:
    if path.suffix.lower() in _PARQUET_SUFFIXES:
        return True
    with open(path, "rb") as file:
        if file.read(len(_PARQUET_MAGIC)) != _PARQUET_MAGIC:
            return False
        if file.seek(0, io.SEEK_END) < _PARQUET_MIN_BYTES:
            return False
        file.seek(-len(_PARQUET_MAGIC), io.SEEK_END)
        return file.read() == _PARQUET_MAGIC


def import_parquet(path: Path) -> tuple[Any, Any]:
    """Returns the modules pyarrow and pyarrow.parquet, to read `path`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"data.source: {str(path)!r} is Parquet, which needs pyarrow: "
            "pip install 'ladder_jax[parquet]'"
        ) from None
    return pyarrow, parquet


def row_groups(file: Any, part: Part) -> tuple[list[int], int]:
    """Returns (the row groups of an open Parquet file in a part, their rows)."""
    groups = list(part.of(file.metadata.num_row_groups))
    return groups, sum(file.metadata.row_group(i).num_rows for i in groups)


def _read_parquet(part: Part, text_field: str, tally: Tally) -> Iterator[bytes | str]:
    """Yields the cells of a Parquet column of any type of strings or bytes."""
    pyarrow, parquet = import_parquet(part.path)
    size = len(part.of(part.path.stat().st_size))
    try:
        with parquet.ParquetFile(part.path) as file:
            groups, rows = row_groups(file, part)
            columns = file.schema_arrow.get_all_field_indices(text_field)
            if len(columns) > 1:
                kind = f"rows with {len(columns)} columns named {text_field!r}"
                tally.left_out[kind] += rows
                return
            if not columns or not _holds_text(file.schema_arrow.field(columns[0]).type):
                tally.left_out[no_text_field(text_field)] += rows
                return
            for batch in file.iter_batches(1024, groups, [text_field]):
                tally.read += size * batch.num_rows // rows
                # As bytes: Parquet does not check that strings are UTF-8.
                cells = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                tally.left_out[no_text_field(text_field)] += cells.count(None)
                yield from (cell for cell in cells if cell is not None)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _holds_text(arrow_type: Any) -> bool:
    """Whether an Arrow type is strings or bytes, also inside of a dictionary."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    arrow_type = getattr(arrow_type, "storage_type", arrow_type)
    kinds = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
    )
    return any(is_kind(arrow_type) for is_kind in kinds)
