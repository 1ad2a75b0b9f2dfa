"""Reads JSON Lines, of a corpus or of a file of prompts: UTF-8, a JSON value a line.

Only \\n ends a line; a \\r before it is removed. JSON strings may hold
U+2028, U+0085 and other characters at which `str.splitlines` would cut them.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, the line without its line end) of a binary file.

    The file is read as a stream. Blank lines are yielded too; a last line may lack its
    line end.
    """
    for number, line in enumerate(file, 1):
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def parse_line(line: bytes) -> Any:
    """Returns the JSON value of one line.

    Raises:
      ValueError: with a message of one line, if the line is not UTF-8 or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("it is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None


def read_jsonl(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, the line's JSON value or its ValueError).

    Blank lines are skipped, but counted. A line that `parse_line` refuses does not end
    the file: its ValueError is yielded, and the caller decides what to do with it.
    """
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            value = parse_line(line)
        except ValueError as error:
            value = error
        yield number, value
