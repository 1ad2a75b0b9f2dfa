"""A request of the engine as its client sees it: iterate, cancel and read it."""

import asyncio
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
    """`async for` over a request raises it if the engine's thread ends before it.

    The engine keeps the request: iterate it again, and the engine continues with it.
    """


class EngineFailed(RuntimeError):
    """A call of an engine that has ended by an error raises it, see Engine.failed.

    Its `__cause__` is that error.
    """


class Token(NamedTuple):
    """One token of a request's output."""

    id: int | None  # None: the rest of the text, which follows the last token
    # The text that it completes. "": it completes no character, or its text may begin a
    # stop string and comes with a later token.
    text: str
    logprob: float | None = None  # of the model; None if not requested
    # The likeliest ids and their log-probabilities, as many as requested.
    top: tuple[tuple[int, float], ...] = ()


# The log-probability of a prompt's token, and the likeliest ids there with theirs.
PromptLogprob = tuple[float, tuple[tuple[int, float], ...]]


class Runner(Protocol):
    """The methods of the engine that a request calls."""

    @property
    def running(self) -> bool: ...

    def start(self) -> object: ...

    def step(self) -> bool: ...

    def cancel(self, request: "Request") -> None: ...


class Request:
    """A client's handle of a request: `for` and `async for` over it yield its tokens.

    tokens: all ids so far, without the stop id. text: their text, cut at a stop string.
    finish: None while it runs, then "stop", "length", "cancelled" or "error".
    error: the exception that ended it, if `finish` is "error".
    prompt_logprobs: if requested, one entry for every token of the prompt, None for the
      first; complete when the first token or the end has arrived. Else empty.
    submitted, admitted, times: seconds (time.perf_counter) of its submission, of its
      admission to the device (None: it waits on the host), and of the arrival of each
      token on the host.
    """

    def __init__(
        self,
        engine: Runner,
        number: int,
        submission: Submission,
        text_filter: StopStringFilter | None,
    ) -> None:
        self.number, self.submission = number, submission
        self.prompt, self.max_tokens = submission.prompt, submission.max_tokens
        self.priority, self.logprobs = submission.priority, submission.logprobs
        self.text_filter = text_filter
        self.prompt_logprobs: list[PromptLogprob | None] = []
        if self.wants_scores:
            self.prompt_logprobs.append(None)
        self.tokens: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self.error: BaseException | None = None
        self.submitted = time.perf_counter()
        self.admitted: float | None = None
        self.times: list[float] = []
        self._engine = engine
        self._unread: deque[Token] = deque()
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], object]] = []  # see `watch`

    @property
    def wants_scores(self) -> bool:
        """Whether it wants the log-probabilities of its prompt."""
        return self.submission.prompt_logprobs is not None

    def cancel(self) -> None:
        """Ends the request; the next chunk frees its slot.

        It does nothing if the request has finished.
        """
        self._engine.cancel(self)

    def result(self) -> "Request":
        """Iterates the request to its end and returns it. May raise RequestFailed."""
        for _ in self:
            pass
        return self

    def __iter__(self) -> Iterator[Token]:
        while (token := self._next()) is not None:
            yield token

    def _next(self) -> Token | None:
        """Waits for the next token, or takes steps for it; None at the end."""
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

        self.watch(wake)
        try:
            if not self.finish:
                self._engine.start()
            while True:
                event.clear()
                with self._changed:
                    has_ended = bool(self.finish) and not self._unread
                    token = self._take()
                if token is not None:
                    yield token
                elif has_ended:
                    return
                elif not self._engine.running:
                    raise EngineClosed(
                        "the engine was closed, or its thread failed, before request "
                        f"{self.number} finished: iterate it again to continue"
                    )
                else:
                    await event.wait()
        finally:
            self.unwatch(wake)

    def _take(self) -> Token | None:
        """Returns the next unread token or None; a failed request raises instead."""
        if self._unread:
            return self._unread.popleft()
        if self.error is not None:
            raise RequestFailed(
                f"request {self.number} failed: {self.error}"
            ) from self.error
        return None

    # ------------------------------------------------------------ without waiting

    def take(self) -> tuple[list[Token], str | None]:
        """Returns (all tokens that nobody has read yet, `finish`); never waits.

        With `finish`, they are the last ones.
        """
        with self._changed:
            tokens = list(self._unread)
            self._unread.clear()
            return tokens, self.finish

    def watch(self, wake: Callable[[], object]) -> None:
        """Calls `wake`, from the engine's thread, after each change of the request."""
        with self._changed:
            self._wakers.append(wake)

    def unwatch(self, wake: Callable[[], object]) -> None:
        """Ends `watch`."""
        with self._changed:
            self._wakers.remove(wake)

    # ------------------------------------------------------------ for the engine

    def put(
        self,
        tokens: Sequence[Token] = (),
        finish: str | None = None,
        error: BaseException | None = None,
    ) -> bool:
        """Appends tokens and, with `finish`, ends the request.

        It does nothing if the request has finished. Returns whether this call ended it.
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

    def put_prompt_logprobs(self, entries: Sequence[PromptLogprob]) -> None:
        """Appends entries for the next tokens of the prompt.

        It does nothing if the request has finished.
        """
        with self._changed:
            if not self.finish:
                self.prompt_logprobs.extend(entries)

    def notify(self) -> None:
        """Wakes the threads and coroutines that iterate the request."""
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                wake()
