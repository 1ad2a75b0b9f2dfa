"""Rows as a table: text for a terminal, Markdown for a document, CSV for a program."""

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ladder_jax import files

Row = TypeVar("Row")  # a dataclass of numbers and texts


class Column(NamedTuple):
    """One column: its title, and what a cell shows of a row."""

    title: str
    cell: Callable[[Any], str]
    left: bool = False  # text aligns left, numbers right


def number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    """A cell that formats the value `key` of a row, such as number("bytes", ",")."""
    return lambda row: format(row[key], form)


def text_table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """The table as lines of aligned columns."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    lines = [[column.title for column in columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column.left else text.rjust(width)
            for text, width, column in zip(line, widths, columns)
        ).rstrip()
        for line in lines
    )


def markdown_table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """The table in Markdown."""
    lines = [
        [column.title for column in columns],
        ["---" if column.left else "---:" for column in columns],
        *([column.cell(row) for column in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------- CSV

CASTS: dict[object, Callable[[str], object]] = {int: int, float: float, str: str}


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a CSV file; an empty list if there is no file.

    A row that the end of a process cut off is left out.
    """
    if not path.exists():
        return []
    types = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    with path.open(encoding="utf-8", newline="") as file:
        return [
            kind(**{name: CASTS[types[name]](text) for name, text in row.items()})
            for row in csv.DictReader(file)
            if None not in row.values()
        ]


def write_csv(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Writes a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
        writer.writerows(map(_texts, rows))


def append_csv(path: Path, row: Any) -> None:
    """Adds a row to the end of a CSV file in one write: several processes may do so."""
    if not path.exists():
        write_csv(path, type(row), [])
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(_texts(row))
    with path.open("a+b", buffering=0) as file:
        file.seek(-1, os.SEEK_END)
        cut_off = file.read(1) != b"\n"  # the row before
        file.write(("\n" * cut_off + line.getvalue()).encode())


def _texts(row: Any) -> list[str]:
    """The fields of a row as the file has them."""
    values = dataclasses.astuple(row)
    return [
        f"{value:.10g}" if isinstance(value, float) else str(value) for value in values
    ]
