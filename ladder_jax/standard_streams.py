"""Standard streams that are closed, broken, or cannot show a character."""

import os
import sys
from typing import Any


def open_standard_streams() -> None:
    """Opens the standard streams that the shell closed (`>&-`), as os.devnull.

    Otherwise the first files that it opens would take their numbers, and what XLA
    writes to number 2 would end up in a checkpoint.
    """
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for number, (name, mode) in enumerate(modes.items()):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:  # another file has taken it already
                os.close(descriptor)
                setattr(sys, name, open(os.devnull, mode))
            else:
                setattr(sys, name, open(descriptor, mode))
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_safely(text: str, stream: Any = None) -> None:
    """Prints a line. A line that cannot be written does not change the exit status."""
    try:
        print(text, file=stream or sys.stdout, flush=True)
    except (OSError, ValueError):
        pass


def discard_unwritten() -> None:
    """Points output streams that cannot be written to os.devnull.

    Otherwise Python would fail to flush them at exit, and exit with status 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nothing, stream.fileno())
            except (OSError, ValueError):
                pass
            os.close(nothing)
