"""The requests of the engine that one HTTP request needs, while they run."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from ladder_jax.serve.request import Request, Token
from ladder_jax.server import errors
from ladder_jax.server.serving import Serving


@dataclasses.dataclass
class Prompt:
    """A prompt of an HTTP request."""

    ids: list[int]
    text: str | None  # as the client gave it; None: it gave ids


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
    ) -> AsyncIterator[tuple[int, list[Token], Any] | None]:
        """Yields (output number, new tokens, finish) as the engine delivers them.

        finish: None, "stop" or "length"; it comes once for each output, with its last
        tokens. After `keep_alive` seconds without anything, None comes instead.
        Raises APIError 500 if the engine cannot finish one of them.
        """
        engine = self._serving.served().engine
        unfinished = list(enumerate(self.requests))
        while unfinished:
            self._event.clear()
            is_running = engine.running
            still: list[tuple[int, Request]] = []
            for index, request in unfinished:
                tokens, finish = request.take()
                if finish in ("error", "cancelled"):
                    raise _failure(request)
                if not finish:
                    still.append((index, request))
                if tokens or finish:
                    yield index, tokens, finish
            unfinished = still
            if unfinished and not is_running:
                raise errors.failed("the engine has stopped")
            if unfinished and not await self._changes(keep_alive):
                yield None

    async def collect(self) -> tuple[list[list[Token]], list[Any]]:
        """Waits for all outputs. Returns the tokens of each, and its finish.

        Raises what `batches` raises.
        """
        tokens: list[list[Token]] = [[] for _ in self.requests]
        finishes: list[Any] = [None for _ in self.requests]
        async for batch in self.batches():
            assert batch is not None  # only with `keep_alive`
            index, new, finish = batch
            tokens[index] += new
            finishes[index] = finish
        return tokens, finishes

    async def _changes(self, timeout: float | None) -> bool:
        """Waits until a request changes; returns whether one did."""
        if timeout is None:
            await self._event.wait()
            return True
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> dict[str, Any]:
        """Cancels what still runs, and counts every request in the metrics.

        Returns the fields of the log's line about the HTTP request.
        """
        self._serving.running.discard(self.cancel)
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


def _failure(request: Request) -> errors.APIError:
    """Returns the error for a request that the engine did not finish."""
    if request.finish == "cancelled":
        return errors.unavailable("the server stops: the request was cancelled")
    reason = " ".join(str(request.error).split()) or type(request.error).__name__
    return errors.failed(f"the engine could not finish the request: {reason}")
