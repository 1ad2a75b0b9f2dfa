"""Rows as a table: text for a terminal, Markdown for a document, CSV for a program."""

import csv
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ladder_jax import files

Row = TypeVar("Row")


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


def read_csv(path: str | Path, kind: type[Row]) -> list[Row]:
    """The rows of a file as dataclasses of numbers and texts; [] if there is no file.

    kind: the dataclass; its fields are the columns.
    """
    path = Path(path)
    if not path.exists():
        return []
    types: dict[str, Any] = {
        field.name: field.type
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]
    }
    with path.open(encoding="utf-8", newline="") as file:
        return [
            kind(**{name: types[name](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def write_csv(path: str | Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Writes dataclasses to a file; `read_csv` reads them again."""
    with files.replacing(path) as part, part.open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row)  # type: ignore[call-overload]
            writer.writerow(
                {
                    name: f"{value:.10g}" if isinstance(value, float) else value
                    for name, value in values.items()
                }
            )
