"""Progress of tokenising: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

LINE_S = 30.0


class Progress:
    """Shows documents, MB/s and the time that is left. Use it in a `with`.

    Args:
      name: of the work.
      total: bytes of files.
      say: writes one line, where stderr is no terminal.
    """

    def __init__(
        self, name: str, total: int, say: Callable[[str], None] | None = None
    ) -> None:
        self._name, self._total, self._say = name, total, say or print_to_stderr
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, desc=name, disable=None
        )
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()
        # Bytes and documents of this process's finished units, of those that others
        # finished, and of the units in work.
        self._done = [0, 0]
        self._elsewhere = 0
        self._in_work: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def elsewhere(self, size: int) -> None:
        """Counts a unit of `size` bytes that needs no work here."""
        with self._lock:
            self._elsewhere += size
            self._show()

    def update(self, number: int, read: int, documents: int) -> None:
        """Counts what a unit has so far."""
        with self._lock:
            self._in_work[number] = read, documents
            self._show()

    def finish(self, number: int, size: int) -> None:
        """Counts a unit of `size` bytes as complete."""
        with self._lock:
            _, documents = self._in_work.pop(number, (0, 0))
            self._done = [self._done[0] + size, self._done[1] + documents]
            self._show()

    def _show(self) -> None:
        read = self._done[0] + sum(read for read, _ in self._in_work.values())
        documents = self._done[1] + sum(count for _, count in self._in_work.values())
        complete = min(read + self._elsewhere, self._total)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            self._bar.update(max(complete - self._bar.n, 0))
            return
        now = time.monotonic()
        if now - self._last < LINE_S:
            return
        self._last = now
        seconds = now - self._start
        rate = read / seconds / 1e6
        left = (self._total - complete) * seconds / max(complete, 1)
        self._say(
            f"{self._name}: {complete / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, "
            f"{documents:,} documents here, {rate:.2f} MB/s here, "
            f"{int(left // 60)}m{int(left % 60):02}s left"
        )


def print_to_stderr(text: str) -> None:
    """Prints a line at once."""
    print(text, file=sys.stderr, flush=True)
