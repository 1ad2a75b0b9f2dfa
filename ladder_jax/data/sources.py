"""The documents of a source of text: files are found, opened, and read one document at a time.

A source is a folder, file or glob of text, JSONL (.jsonl, .ndjson) and Parquet files, text and JSONL also as .gz; or
"builtin", the documentation inside every CPython: the same for one Python version, different between versions.
What cannot be read is counted and left out; bytes that are not UTF-8 become U+FFFD and are counted, too.
"""

import ast
import collections
import dataclasses
import glob
import gzip
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from pathlib import Path

from ladder_jax.config import ConfigError

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass
class Tally:
    """What happened while reading: bytes read, and how many things of each kind were left out or repaired."""

    read: int = 0
    left_out: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    repaired: int = 0

    def text(self, value):
        """`value` (bytes or str) as text that is valid Unicode, or None if there is none in it."""
        text = (
            value.decode("utf-8-sig", "surrogateescape")
            if isinstance(value, bytes)
            else value
        )
        if not text.isascii() and _SURROGATES.search(
            text
        ):  # bytes that are no UTF-8, or JSON's half characters
            text = _SURROGATES.sub("\ufffd", text)
            self.repaired += 1
        if text.strip():
            return text
        self.left_out["empty documents"] += 1
        return None


def size_and_time(path):
    """(bytes, time of the last change in ns), (0, 0) for a file that cannot be seen: reading it will say so."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return 0, 0


def files(source):
    """Files of `data.source`, sorted (str -> list[Path]). Hidden files and folders inside a folder are skipped.

    Raises ValueError if there is none.
    """
    if source == "builtin":
        return _builtin_files()
    root = Path(source).expanduser()
    if root.is_dir():
        found = [
            Path(folder, name)
            for folder, folders, names in os.walk(root)
            for name in names
            if not any(
                part.startswith(".")
                for part in Path(folder, name).relative_to(root).parts
            )
        ]
    elif root.exists():
        found = [root]
    else:
        found = [
            Path(name)
            for name in glob.glob(str(root), recursive=True)
            if not os.path.isdir(name)
        ]
    if not found:
        why = (
            "has no files"
            if root.is_dir()
            else "matches no file"
            if glob.has_magic(source)
            else "does not exist"
        )
        raise ConfigError(
            f"data.source={source!r} {why}: it must be 'builtin', or a folder, file or glob of text, "
            "JSONL or Parquet files"
        )
    return sorted(found)


def _builtin_files():
    """Source files of the standard library that have documentation, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in sorted(sys.stdlib_module_names):
        found += [
            path
            for path in sorted((root / name).rglob("*.py"))
            if not {"test", "tests", "idle_test"} & set(path.parts[len(root.parts) :])
        ]
        found += [root / f"{name}.py"] if (root / f"{name}.py").exists() else []
    if not found:
        raise ConfigError(
            f"data.source='builtin' finds no source files of Python in {root}: name a folder, file or "
            "glob of text"
        )
    return found


def read(source, path, text_field, tally):
    """Yields the documents of one of the `files` of `source` as str, counting in `tally` what is left out.

    `text_field`: the field of JSONL rows and Parquet columns that holds the text. Raises ValueError for a Parquet file
    where pyarrow is not installed.
    """
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else [path.suffix]
    size, before = size_and_time(path)[0], tally.read
    try:
        if source == "builtin":
            values = _documentation(path)
        elif path.suffix == ".parquet":
            values = _parquet(path, text_field, tally, size)
        elif suffixes[0] in (".jsonl", ".ndjson"):
            values = _jsonl(path, text_field, tally)
        else:
            values = _plain(path, tally)
        for value in values:
            text = tally.text(value)
            if text is not None:
                yield text
    except (OSError, EOFError, zlib.error, SyntaxError):
        tally.left_out["unreadable files"] += 1
    tally.read = max(tally.read, before + size)


def _open(path):
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _plain(path, tally):
    with _open(path) as file:
        value = file.read()
    if b"\0" in value:
        tally.left_out["files that are not text"] += 1
    else:
        yield value


def _jsonl(path, text_field, tally):
    with _open(path) as file:
        for line in file:
            tally.read += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
            except (ValueError, RecursionError):
                tally.left_out["rows that are not JSON"] += 1
                continue
            value = row.get(text_field) if isinstance(row, dict) else None
            if isinstance(value, str):
                yield value
            else:
                tally.left_out[f"rows without a text field {text_field!r}"] += 1


def _parquet(path, text_field, tally, size):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"data.source: {str(path)!r} is Parquet, which needs pyarrow: "
            "pip install 'ladder_jax[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
            kind = (
                str(schema.field(text_field).type)
                if text_field in schema.names
                else None
            )
            if kind not in ("string", "large_string", "binary", "large_binary"):
                tally.left_out[f"rows without a text field {text_field!r}"] += rows
                return
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                tally.read += size * batch.num_rows // rows
                values = (
                    batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                )  # bytes: not always UTF-8
                tally.left_out[f"rows without a text field {text_field!r}"] += (
                    values.count(None)
                )
                yield from (value for value in values if value is not None)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _documentation(path):
    """The docstrings of a module as one document, laid out as `help` does; each of `pydoc_data.topics` as one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, about escapes in strings
        module = ast.parse(path.read_bytes())
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        yield from next(
            ast.literal_eval(node.value)
            for node in module.body
            if isinstance(node, ast.Assign)
        ).values()
        return
    parts = []

    def visit(node, indent):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.If, ast.Try)):
                visit(child, indent)
            elif isinstance(child, ast.ClassDef):
                bases = ", ".join(map(ast.unparse, child.bases))
                add(
                    child,
                    f"class {child.name}({bases})" if bases else f"class {child.name}",
                    indent,
                )
                visit(child, indent + "    ")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                add(child, f"{child.name}({ast.unparse(child.args)})", indent)

    def add(node, heading, indent):
        text = ast.get_docstring(node)
        if text:
            lines = [heading, *("    " + line for line in text.splitlines())]
            parts.append("\n".join((indent + line).rstrip() for line in lines))

    top = ast.get_docstring(module)
    visit(module, "")
    if top or parts:
        yield "\n\n".join([top] * bool(top) + parts) + "\n"
