"""Turns signals of the operating system into a request to stop."""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads this file before JAX may start
    from ladder_jax.hardware.group import Group

# Seconds that SIGTERM and SIGHUP leave the main thread to end by itself before the
# first step: it may be in the middle of a compilation, where Python runs no handler.
START_GRACE = 5.0


class StopSignal(contextlib.AbstractContextManager):
    """Turns SIGTERM, Ctrl-C and SIGHUP into a request to stop after the current step.

    Before the first step is complete, there is nothing to save: SIGTERM and SIGHUP then
    end the process within START_GRACE seconds, and any of the signals ends all
    processes of a group at once.

    A second SIGTERM or Ctrl-C ends the process at once. A second SIGHUP does nothing,
    since a terminal that closes may send several. Under `nohup`, SIGHUP stays ignored.

    Args:
      group: the processes of this run, which stop together; None: it is alone.
    """

    def __init__(self, group: "Group | None" = None) -> None:
        self.group = group
        self.signal: signal.Signals | None = None
        self._started, self._over = False, threading.Event()
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._pipe = self._previous_pipe = -1

    def __enter__(self) -> "StopSignal":
        # Python allows signal handlers in its main thread alone.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous_handlers[number] = signal.signal(number, self._request)
            # C writes each signal into a pipe at once, whatever the main thread does.
            reader, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._previous_pipe = signal.set_wakeup_fd(
                self._pipe, warn_on_full_buffer=False
            )
            threading.Thread(target=self._listen, args=[reader], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._over.set()
        if self._pipe >= 0:
            signal.set_wakeup_fd(self._previous_pipe)
            os.close(self._pipe)  # ends the thread
            self._pipe = -1

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

    def _listen(self, reader: int) -> None:
        """Acts on the first signal that the main thread may not see soon (a thread)."""
        stops = set(self._previous_handlers)
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while data := pipe.read(1):
                if (number := data[0]) in stops:
                    break
            else:
                return
            if self.group is not None:
                return self.group.request_stop(signal.Signals(number))
            if number == signal.SIGINT or self._started:
                return
        if not self._over.wait(START_GRACE) and not self._started:
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):
                os.write(2, f"stopped by {name} before the first step\n".encode())
            os._exit(128 + number)

    def started(self) -> None:
        """Says that a step is complete: from now on a signal saves first."""
        if not self._started:
            self._started = True
            if self.group is not None:
                self.group.started()

    def requested(self, step: int) -> signal.Signals | None:
        """The signal that asks to stop, or None. All processes get the same answer.

        Call it before each step, with the number of complete steps.
        """
        if self.group is not None:
            return self.group.stopped_by(step)
        return self.signal


IMPORT_SECONDS = 5.0
_ASYNCIO = logging.getLogger("asyncio")
# The commands that are running now and raise at Ctrl-C.
_insistent: list["InsistentInterrupt"] = []


def check_interrupted(error: BaseException) -> None:
    """Raises KeyboardInterrupt where Ctrl-C may be the cause of `error`.

    Call it before another try, or before the work goes on without what failed: an
    interrupt that reaches a library may come out as the library's own error, which
    looks like a damaged file or a store that fails.
    """
    pressed = any(interrupt.pressed for interrupt in _insistent)
    if pressed or any(isinstance(e, KeyboardInterrupt) for e in _chain(error)):
        raise KeyboardInterrupt from None


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and those that it was raised from or while they were handled."""
    chain: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and not any(one is other for other in chain):
            chain.append(one)
            left += [one.__cause__, one.__context__]
    return chain


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

    Orbax leaves tasks behind where an interrupt ends its reads. Python and asyncio may
    report them until the process ends: once Ctrl-C was pressed, their reports are
    dropped, and stay dropped.

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

    def __enter__(self) -> "InsistentInterrupt":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous_hook = sys.unraisablehook
            sys.unraisablehook = self._unraisable
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

    def _handle(self, number: signal.Signals, handler: Callable[..., None]) -> None:
        self._previous_handlers[number] = signal.signal(number, handler)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if not self.pressed:  # others may use the timer until then
            self._handle(signal.SIGALRM, self._again)
            self._pressed_at = time.monotonic()
            _ASYNCIO.addFilter(_drop)
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
