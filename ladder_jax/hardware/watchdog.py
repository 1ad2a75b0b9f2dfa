"""Notices a step that does not end, such as where devices wait for each other for ever.

A host starts each step before the device has ended the one before it, but only a few
ahead. So where the device hangs, the host does too, a few steps later.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable

STEP_TIMEOUT = 1800.0  # seconds: an evaluation and a save belong to a step


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Calls `on_stuck` with a line where no step begins for `timeout` seconds.

    It starts with the first call of `step`: the compilation before it does not count.

    Args:
      timeout: seconds; 0: it never does.
      on_stuck: must end the process. None: shows the stacks of all threads, and ends
        the process with status `status`.
    """

    def __init__(
        self,
        timeout: float,
        status: int,
        on_stuck: Callable[[str], object] | None = None,
    ) -> None:
        self.timeout, self.status = timeout, status
        self.on_stuck = on_stuck or self._end
        self._last: tuple[int, float] | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def step(self, number: int) -> None:
        """Says that a step begins, after `number` complete ones."""
        self._last = number, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.timeout / 10)):
            if (last := self._last) is None:
                continue
            number, began = last
            if time.monotonic() - began >= self.timeout:
                self.on_stuck(
                    f"step {number + 1} has not ended for {self.timeout:.0f} s "
                    "(--step-timeout); the stacks of the threads are above"
                )
                return

    def _end(self, line: str) -> None:
        faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(OSError):
            os.write(2, f"\nladder-jax: {line}\n".encode())
        os._exit(self.status)
