"""Ctrl-C ends a command, whatever library it reaches."""

import contextlib
import gc
import logging
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

IMPORT_SECONDS = 5.0
# Loggers with which libraries report what an interrupt broke in tasks and threads.
_REPORTERS = ("absl", "asyncio", "concurrent.futures")
# The commands that are running now and raise at Ctrl-C.
_insistent: list["InsistentInterrupt"] = []


def check_interrupted(error: BaseException) -> None:
    """Raises KeyboardInterrupt where Ctrl-C may be the cause of `error`.

    Call it before another try, or before the work goes on without what failed: an
    interrupt that reaches a library may come out as the library's own error, which
    looks like a damaged file or a store that fails.
    """
    is_interrupt = any(interrupt.pressed for interrupt in _insistent)
    cause: BaseException | None = error
    while cause is not None and not is_interrupt:
        is_interrupt, cause = isinstance(cause, KeyboardInterrupt), cause.__cause__
    if is_interrupt:
        raise KeyboardInterrupt from None


def _drop(_: object) -> bool:
    return False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. `made_by` gets a reference to it that does not keep it alive."""

    def __init__(self, made_by: "InsistentInterrupt") -> None:
        super().__init__()
        made_by.raised = weakref.ref(self)


class InsistentInterrupt(contextlib.AbstractContextManager):
    """Raises KeyboardInterrupt at Ctrl-C, and again a second later where it got lost.

    Python loses an exception in a callback that nobody waits for (a `__del__`, the
    garbage collection), and a library may drop it; the work would go on. A lost
    exception does not exist any more, while one that a `finally` or `with` delays does:
    cleanup that takes long is not disturbed. A second Ctrl-C raises in any case.

    JAX has a callback in the garbage collection, where an exception may also end the
    process with a segmentation fault: the interrupt waits until callbacks of the
    collection have returned. Libraries that are interrupted while they are imported
    print tracebacks of their own: it waits for an import, too, up to IMPORT_SECONDS.

    Orbax leaves tasks and threads behind where an interrupt ends its reads and writes.
    They, Python and asyncio may report what broke until the process ends: once Ctrl-C
    was pressed, these reports are dropped, and stay dropped.

    It does nothing outside the main thread, and where Ctrl-C is ignored (`nohup`, jobs
    in the background).

    Attributes:
      pressed: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._pressed_at = 0.0  # seconds of time.monotonic
        self.raised: weakref.ref[Interrupted] | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._previous_hook: Any = None
        self._previous_thread_hook: Any = None

    def __enter__(self) -> "InsistentInterrupt":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous_hook = sys.unraisablehook
            sys.unraisablehook = self._unraisable
            self._previous_thread_hook = threading.excepthook
            threading.excepthook = self._lost_in_thread
            self._handle(signal.SIGINT, self._pressed)
            _insistent.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _insistent:
            _insistent.remove(self)
        if signal.SIGALRM in self._previous_handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous_handlers.items():
            if handler is not None:  # None: not set from Python, and unknown
                signal.signal(number, handler)
        if self.pressed:
            warnings.simplefilter("ignore", RuntimeWarning)  # never awaited
        elif self._previous_hook is not None:
            sys.unraisablehook = self._previous_hook
            threading.excepthook = self._previous_thread_hook

    def _handle(self, number: signal.Signals, handler: Callable[..., None]) -> None:
        self._previous_handlers[number] = signal.signal(number, handler)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if not self.pressed:  # others may use the timer until then
            self._handle(signal.SIGALRM, self._again)
            self._pressed_at = time.monotonic()
            for logger in _reporters():
                logger.addFilter(_drop)
        self.pressed = True
        self._raise(frame)

    def _again(self, number: int, frame: FrameType | None) -> None:
        if self.raised is not None and self.raised() is not None:
            signal.setitimer(signal.ITIMER_REAL, 1)
        else:
            self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        may_import = time.monotonic() < self._pressed_at + IMPORT_SECONDS
        if _is_collecting(frame) or (may_import and _is_importing(frame)):
            self.raised = None
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            return
        signal.setitimer(signal.ITIMER_REAL, 1)
        # No variable may refer to it: it would live as long as its own traceback.
        raise Interrupted(self)

    def _unraisable(self, lost: Any) -> None:
        """Says nothing about an interrupt that gets lost, nor about what it broke."""
        if not self.pressed:
            self._previous_hook(lost)

    def _lost_in_thread(self, lost: Any) -> None:
        """Says nothing about a thread that an interrupt ended."""
        if not self.pressed:
            self._previous_thread_hook(lost)


def _reporters() -> list[logging.Logger]:
    """The loggers of _REPORTERS that exist: absl makes its own when it is imported."""
    known = logging.Logger.manager.loggerDict
    return [logging.getLogger(name) for name in _REPORTERS if name in known]


def _is_collecting(frame: FrameType | None) -> bool:
    """Whether `frame` runs in a callback of the garbage collection."""
    codes = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _is_importing(frame: FrameType | None) -> bool:
    """Whether `frame` runs in the import of a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
