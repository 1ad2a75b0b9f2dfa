"""The requests of the engine that one HTTP request needs, while they run."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from ladder_jax.serve.request import Request, Token
from ladder_jax.server import errors
from ladder_jax.server.serving import Serving


@dataclasses.dataclass
class Prompt:
    """A prompt of an HTTP request."""

    ids: list[int]
    text: str | None  # as the client gave it; None: it gave ids


Finish = Any  # None, "stop" or "length"


class Batch(NamedTuple):
    """What the engine has delivered of one output."""

    output: int  # its number
    tokens: list[Token]
    finish: Finish


class Generation:
    """The engine's requests of one HTTP request: `choices` outputs for every prompt.

    submission.submit makes one. Call `close` at its end.
    """

    def __init__(
        self, serving: Serving, prompts: list[Prompt], requests: list[Request]
    ) -> None:
        self._serving, self.prompts, self.requests = serving, prompts, requests
        self.choices = len(requests) // len(prompts)
        self._event = asyncio.Event()
        self._silence: asyncio.TimerHandle | None = None
        self._is_silent = False  # nothing has come for a while
        self._newest = 0.0  # loop.time() of the newest tokens
        self._wake = serving.wakeups.waker(self._event)
        for request in requests:
            request.watch(self._wake)
        serving.running.add(self.cancel)

    def cancel(self) -> None:
        """Ends all outputs that are not complete."""
        for request in self.requests:
            request.cancel()

    def prompt_of(self, index: int) -> Prompt:
        """Returns the prompt of output number `index`."""
        return self.prompts[index // self.choices]

    async def batches(
        self, keep_alive: float | None = None
    ) -> AsyncIterator[list[Batch]]:
        """Yields what the engine has delivered since the last time, for all outputs.

        The last batch of each output has its finish. After `keep_alive` seconds without
        anything, an empty list comes instead.
        Raises APIError 500 if the engine cannot finish one of them.
        """
        engine = self._serving.served().engine
        unfinished = list(enumerate(self.requests))
        if keep_alive is not None:
            self._watch_silence(keep_alive)
        while unfinished:
            self._event.clear()
            is_running = engine.running
            batches, unfinished, failed = _take(unfinished)
            if batches:
                self._newest = self._serving.wakeups.loop.time()
                yield batches
            if failed is not None:
                raise _failure(failed)
            if unfinished and not is_running:
                raise errors.failed("the engine has stopped")
            if unfinished:
                await self._event.wait()
                if self._is_silent:
                    self._is_silent = False
                    yield []

    def _watch_silence(self, seconds: float) -> None:
        """Wakes `batches` after so many seconds without tokens.

        One timer serves all waits: a timeout for each would cost more than an event.
        """
        loop = self._serving.wakeups.loop
        self._newest = loop.time()

        def look() -> None:
            rest = self._newest + seconds - loop.time()
            if rest <= 0:
                self._is_silent, rest = True, seconds
                self._newest = loop.time()
                self._event.set()
            self._silence = loop.call_later(rest, look)

        self._silence = loop.call_later(seconds, look)

    async def collect(self) -> tuple[list[list[Token]], list[Finish]]:
        """Waits for all outputs. Returns the tokens of each, and its finish.

        Raises what `batches` raises.
        """
        tokens: list[list[Token]] = [[] for _ in self.requests]
        finishes: list[Finish] = [None for _ in self.requests]
        async for batches in self.batches():
            for index, new, finish in batches:
                tokens[index] += new
                finishes[index] = finish
        return tokens, finishes

    def close(self) -> dict[str, Any]:
        """Cancels what still runs, and counts every request in the metrics.

        Returns the fields of the log's line about the HTTP request.
        """
        self._serving.running.discard(self.cancel)
        if self._silence is not None:
            self._silence.cancel()
        for request in self.requests:
            request.unwatch(self._wake)
            request.cancel()
            self._serving.metrics.finished(request)
        first = self.requests[0]
        fields: dict[str, Any] = self.usage()
        del fields["total_tokens"]
        fields["finish"] = ",".join({str(r.finish): 0 for r in self.requests})
        if first.admitted is not None:
            fields["queue_seconds"] = round(first.admitted - first.submitted, 6)
        if first.times:
            fields["first_token_seconds"] = round(first.times[0] - first.submitted, 6)
        if self._serving.options.log_prompts:
            fields["prompts"] = [p.text or p.ids for p in self.prompts]
            fields["outputs"] = [request.text for request in self.requests]
        return fields

    def usage(self) -> dict[str, int]:
        """Returns the counts of tokens so far."""
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        completion = sum(len(request.tokens) for request in self.requests)
        return dict(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
        )


Numbered = tuple[int, Request]  # an output's number and its request


def _take(
    unfinished: list[Numbered],
) -> tuple[list[Batch], list[Numbered], Request | None]:
    """Returns (what is new of these outputs, those that go on, one that failed)."""
    batches: list[Batch] = []
    still: list[Numbered] = []
    for index, request in unfinished:
        tokens, finish = request.take()
        if finish in ("error", "cancelled"):
            return batches, still, request
        if not finish:
            still.append((index, request))
        if tokens or finish:
            batches.append(Batch(index, tokens, finish))
    return batches, still, None


def _failure(request: Request) -> errors.APIError:
    """Returns the error for a request that the engine did not finish."""
    if request.finish == "cancelled":
        return errors.unavailable("the server stops: the request was cancelled")
    reason = " ".join(str(request.error).split()) or type(request.error).__name__
    return errors.failed(f"the engine could not finish the request: {reason}")
