"""Turns signals of the operating system into a request to stop."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignal(contextlib.AbstractContextManager):
    """Turns SIGTERM, Ctrl-C and SIGHUP into a request to stop after the current step.

    A second SIGTERM or Ctrl-C ends the process at once. A second SIGHUP does nothing,
    since a terminal that closes may send several. Under `nohup`, SIGHUP stays ignored.

    Args:
      every: where a run has several processes, they tell each other about signals after
        every so many steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.signal: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        # Python allows signal handlers in its main thread alone.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous_handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for other, handler in self._previous_handlers.items():
            hangup = other == signal.SIGHUP
            signal.signal(other, signal.SIG_IGN if hangup else handler)
        message = "stopping after this step; repeat it to stop at once"
        text = f"\n{self.signal.name}: {message}\n"
        # The signal may have interrupted a `print`, and a second one would fail then.
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    def requested(self, step: int) -> signal.Signals | None:
        """The signal that asks to stop, or None. All processes get the same answer."""
        if jax.process_count() == 1:
            return self.signal
        if step % self.every:
            return None
        sent = multihost_utils.process_allgather(np.array(self.signal or 0)).max()
        return signal.Signals(sent) if sent else None


class InsistentInterrupt(contextlib.AbstractContextManager):
    """Raises KeyboardInterrupt at Ctrl-C, and every second again until this ends.

    Python loses a KeyboardInterrupt that it raises in a callback, and the work would go
    on. JAX has one in the garbage collection, where an exception may also end the
    process with a segmentation fault: the interrupt waits until it has returned.
    """

    JAX_CALLBACK = "_xla_gc_callback"

    def __enter__(self) -> "InsistentInterrupt":
        self._previous_handlers: dict[signal.Signals, Any] = {}
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            for number in (signal.SIGINT, signal.SIGALRM):
                self._previous_handlers[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == self.JAX_CALLBACK:
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            return
        signal.setitimer(signal.ITIMER_REAL, 1)
        raise KeyboardInterrupt
