"""Turns signals into a request to stop training after the current step."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
