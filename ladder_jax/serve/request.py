"""A request of the decode engine as its client sees it: a handle to iterate, cancel and read."""

import asyncio
import collections
import contextlib
import threading
import time
from collections import deque
from typing import NamedTuple


class QueueFull(RuntimeError):
    """More requests wait than decode.queue_size allows: try again later."""


class RequestFailed(RuntimeError):
    """What a request's iteration raises where the engine could not finish it; the cause is attached."""


class Token(NamedTuple):
    """One token of a request's output."""

    id: int | None  # None: no token, but text that was held back until the end
    text: str  # what it completes, "" where text is held back or there is none
    logprob: float | None = None  # the model's own, if asked for
    top: tuple[
        tuple[int, float], ...
    ] = ()  # the likeliest ids and theirs, as many as were asked for


class Request:
    """A request's handle: iterate it (also with `async for`) for its tokens, `cancel` it, read what came of it.

    tokens: all ids so far, the stop excluded. text: theirs, cut at a stop string.
    finish: None while it runs, then "stop", "length", "cancelled" or "error" (see `error`).
    submitted, times: seconds (time.perf_counter) of its submission and of every token's arrival on the host.
    """

    def __init__(self, engine, number, prompt, max_tokens, row, priority, top, stopper):
        self.number, self.prompt, self.max_tokens, self.priority = (
            number,
            prompt,
            max_tokens,
            priority,
        )
        self.tokens, self.text, self.finish, self.error = [], "", None, None
        self.submitted, self.times = time.perf_counter(), []
        self._engine, self._row, self._top, self._stopper = engine, row, top, stopper
        self._unread, self._changed, self._wakers = deque(), threading.Condition(), []

    def cancel(self):
        """Ends it: its slot is free from the next chunk on. No effect on a finished one."""
        self._engine._cancel(self)

    def result(self):
        """Runs it to its end; returns itself. Raises RequestFailed as iterating does."""
        collections.deque(self, maxlen=0)
        return self

    def __iter__(self):
        while (token := self._next()) is not None:
            yield token

    def _next(self):
        while True:
            with self._changed:
                if self._unread or self.finish:
                    return self._take()
                if self._engine.running:
                    self._changed.wait(0.1)
                    continue
            self._engine.step()

    async def __aiter__(self):
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        wake = lambda: loop.call_soon_threadsafe(event.set)
        with self._changed:
            self._wakers.append(wake)
        try:
            self._engine.start()
            while True:
                event.clear()
                with self._changed:
                    ready = bool(self._unread or self.finish)
                    token = self._take() if ready else None
                if ready and token is None:
                    return
                if ready:
                    yield token
                else:
                    await event.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def _take(self):
        if self._unread:
            return self._unread.popleft()
        if self.error is not None:
            raise RequestFailed(
                f"request {self.number} failed: {self.error}"
            ) from self.error
        return None

    def _put(self, tokens=(), finish=None, error=None):
        with self._changed:
            if self.finish:
                return
            ids = [token.id for token in tokens if token.id is not None]
            self._unread.extend(tokens)
            self.tokens += ids
            self.times += [time.perf_counter()] * len(ids)
            self.text += "".join(token.text for token in tokens)
            if finish:
                self.finish, self.error = finish, error
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                wake()
