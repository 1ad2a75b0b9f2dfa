"""Answers a request that generates: with one body, or with a stream."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from pydantic import BaseModel
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ladder_jax.server import errors, streaming
from ladder_jax.server.generation import Generation
from ladder_jax.server.serving import Served, Serving
from ladder_jax.server.submission import Wanted, submit


class Writer(Protocol):
    """Writes the outputs of a generation in the shape of one API."""

    async def collect(self, running: Generation) -> BaseModel:
        """Returns the whole response, once all outputs are complete."""

    def events(self, running: Generation, keep_alive: float) -> AsyncIterator[bytes]:
        """Yields the events of a stream."""


async def respond(
    request: HTTPRequest,
    served: Served,
    wanted: Wanted,
    writer: Writer,
    stream: bool,
) -> Response:
    """Returns the response to a request that generates.

    The generation is cancelled if the client goes away, or the time is over.

    Args:
      served: the model.
      wanted: what the request wants of the engine.
      writer: writes the outputs.
      stream: whether the client wants server-sent events.
    """
    serving: Serving = request.app.state.serving
    timeout = serving.options.request_timeout
    deadline = asyncio.get_running_loop().time() + timeout
    fields = request.scope["state"]["log"]
    fields["stream"] = stream

    async def events() -> AsyncGenerator[bytes]:
        running = await submit(serving, served, wanted)
        try:
            async for data in writer.events(running, serving.options.keep_alive):
                yield data
        finally:
            fields.update(running.close())

    async def collect() -> BaseModel:
        running = await submit(serving, served, wanted)
        try:
            return await writer.collect(running)
        finally:
            fields.update(running.close())

    if stream:
        return streaming.EventStream(events(), deadline, timeout)
    try:
        async with asyncio.timeout_at(deadline):
            body = await streaming.while_connected(request.receive, collect())
    except TimeoutError:
        raise errors.timed_out(timeout) from None
    text = body.model_dump_json(exclude_unset=True)
    return Response(text, media_type="application/json")
