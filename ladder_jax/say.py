"""Prints lines for the user while a job runs."""

from collections.abc import Callable

Say = Callable[[str], None]  # takes a line


def say(line: str) -> None:
    """Prints a line at once, also into a pipe or a file."""
    print(line, flush=True)
