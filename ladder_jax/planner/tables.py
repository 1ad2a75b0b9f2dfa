"""Writes rows as a table: aligned text for a terminal, Markdown for a document."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


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
