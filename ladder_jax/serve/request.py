"""A request of the decode engine as its client sees it: iterate, cancel and read it."""

import asyncio
import collections
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from ladder_jax.serve.stop_strings import StopStringFilter
from ladder_jax.serve.submission import Submission


class QueueFull(RuntimeError):
    """More requests wait than decode.queue_size allows: try again later."""


class RequestFailed(RuntimeError):
    """Iterating a request raises it if the engine could not finish the request.

    Its `__cause__` is the error that ended the request.
    """


class EngineClosed(RuntimeError):
    """`async for` over a request raises it if the engine's thread ended meanwhile.

    The request is not lost: iterate it again, and the engine continues with it.
    """


class Token(NamedTuple):
    """One token of a request's output."""

    id: int | None  # None: no token, but text that was held back until the end
    text: str  # the text that it completes; "" if none, or if text is held back
    logprob: float | None = None  # of the model, if the request has `logprobs`
    # The likeliest ids and their log-probabilities, as many as `logprobs` says.
    top: tuple[tuple[int, float], ...] = ()


class Runner(Protocol):
    """What a request needs of its engine."""

    @property
    def running(self) -> bool: ...

    def start(self) -> object: ...

    def step(self) -> bool: ...

    def cancel(self, request: "Request") -> None: ...


class Request:
    """A request's handle: iterate it, also with `async for`, for its tokens.

    tokens: all ids so far, without the stop id. text: their text, cut at a stop string.
    finish: None while it runs, then "stop", "length", "cancelled" or "error".
    error: the exception that ended it, if `finish` is "error".
    submitted, times: seconds (time.perf_counter) of its submission, and of the arrival
      of each token on the host.
    """

    def __init__(
        self,
        engine: Runner,
        number: int,
        submission: Submission,
        stopper: StopStringFilter | None,
    ) -> None:
        self.number, self.submission = number, submission
        self.prompt, self.max_tokens = submission.prompt, submission.max_tokens
        self.priority, self.logprobs = submission.priority, submission.logprobs
        self.stopper = stopper
        self.tokens: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self.error: BaseException | None = None
        self.submitted = time.perf_counter()
        self.times: list[float] = []
        self._engine = engine
        self._unread: deque[Token] = deque()
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], object]] = []  # of `async for` loops that wait

    def cancel(self) -> None:
        """Ends it; its slot is free from the next chunk on.

        It does nothing if the request has finished.
        """
        self._engine.cancel(self)

    def result(self) -> "Request":
        """Runs it to its end and returns it. Raises RequestFailed as iterating does."""
        collections.deque(self, maxlen=0)
        return self

    def __iter__(self) -> Iterator[Token]:
        while (token := self._next()) is not None:
            yield token

    def _next(self) -> Token | None:
        while True:
            with self._changed:
                if self._unread or self.finish:
                    return self._take()
                if self._engine.running:
                    self._changed.wait(0.1)
                    continue
            self._engine.step()

    async def __aiter__(self) -> AsyncIterator[Token]:
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(event.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            if not self.finish:
                self._engine.start()
            while True:
                event.clear()
                with self._changed:
                    ready = bool(self._unread or self.finish)
                    token = self._take() if ready else None
                if token is not None:
                    yield token
                elif ready:
                    return
                elif not self._engine.running:
                    raise EngineClosed(
                        "the engine was closed, or its thread failed, before request "
                        f"{self.number} finished: iterate it again to continue"
                    )
                else:
                    await event.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def _take(self) -> Token | None:
        if self._unread:
            return self._unread.popleft()
        if self.error is not None:
            raise RequestFailed(
                f"request {self.number} failed: {self.error}"
            ) from self.error
        return None

    # ------------------------------------------------------------ for the engine

    def put(
        self,
        tokens: Sequence[Token] = (),
        finish: str | None = None,
        error: BaseException | None = None,
    ) -> bool:
        """Appends tokens and, with `finish`, ends it; a finished one stays as it is.

        Returns whether this call ended it.
        """
        with self._changed:
            if self.finish:
                return False
            ids = [token.id for token in tokens if token.id is not None]
            self._unread.extend(tokens)
            self.tokens += ids
            self.times += [time.perf_counter()] * len(ids)
            self.text += "".join(token.text for token in tokens)
            if finish:
                self.error = error
                self.finish = finish
        self.notify()
        return finish is not None

    def notify(self) -> None:
        """Wakes the threads and coroutines that iterate it."""
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                wake()
