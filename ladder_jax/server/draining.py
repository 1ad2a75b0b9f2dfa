"""uvicorn's server with an end of its own: it drains at a signal."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Generator
from types import FrameType

import uvicorn

from ladder_jax.server.connections import GRACE_SECONDS
from ladder_jax.server.serving import Serving


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that stop a server. Under `nohup`, SIGHUP stays ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    always = (signal.SIGTERM, signal.SIGINT)
    return always if is_ignored else (*always, signal.SIGHUP)


class Server(uvicorn.Server):
    """uvicorn's server, which drains at a signal and then ends with status 0.

    Args:
      config: of uvicorn.
      serving: the state of the application.
      drain_delay, drain_timeout: see Arguments.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        serving: Serving,
        drain_delay: float,
        drain_timeout: float,
    ) -> None:
        super().__init__(config)
        self._serving = serving
        self._drain_delay, self._drain_timeout = drain_delay, drain_timeout
        self._asked_by: str | None = None  # the signal that asked to stop
        self._exit_at: float | None = None  # time.monotonic()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handles signals while the server runs; the second one ends the process.

        A second SIGHUP does nothing: a terminal that closes may send several.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = stop_signals()
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._asked_by is not None and number != signal.SIGHUP:
            os._exit(128 + number)
        self.stop(signal.Signals(number).name)

    def stop(self, why: str) -> None:
        """Asks the server to stop. Any thread may call it, and a signal's handler.

        It takes no lock: the handler may have interrupted a thread that has it.
        """
        self._asked_by = self._asked_by or why

    def _drain(self) -> None:
        self._exit_at = time.monotonic() + self._drain_delay
        self._serving.lifecycle.drain()
        self._serving.log.write("draining", signal=self._asked_by)

    async def on_tick(self, counter: int) -> bool:
        """Is called ten times a second; returns whether to stop."""
        if self._asked_by is not None and self._exit_at is None:
            self._drain()
        engine, lifecycle = self._serving.engine, self._serving.lifecycle
        if engine is not None and lifecycle.serves and engine.failed is not None:
            reason = " ".join(str(engine.failed).split())
            lifecycle.fail(f"the engine has ended by an error: {reason}")
        if lifecycle.status == "failed":
            return True
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, and waits for the requests as long as drain_timeout."""
        await asyncio.sleep(GRACE_SECONDS / 10)  # accepts what the kernel has queued
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain_timeout, self._serving.cancel_all)
        await super().shutdown(sockets)
        timer.cancel()
