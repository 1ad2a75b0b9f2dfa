"""Reads bodies and sends responses: limits, disconnects, server-sent events."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ladder_jax.server import errors
from ladder_jax.server.access import ABORT, ClientGone
from ladder_jax.server.serving import Options, Serving

log = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
_CHUNKED = ("transfer-encoding", "chunked")
MOST_BODIES = 16  # times max_body: what the bodies that arrive may have together


# ---------------------------------------------------------------- bodies


async def read(request: HTTPRequest, cls: type[Body]) -> Body:
    """Returns the body of a request as a `cls`.

    Raises APIError: 415 unless it is JSON, not compressed, 413 if it is too large, 408
    if it does not arrive in time, 503 if too many others arrive, 400 if it is not
    accepted.
    """
    serving: Serving = request.app.state.serving
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise errors.APIError(
            415,
            f"content-type={kind!r} is not accepted: it must be application/json",
        )
    for header, plain in (("content-encoding", "identity"), _CHUNKED):
        coding = request.headers.get(header, plain).strip().lower()
        if coding != plain:
            raise errors.APIError(
                415,
                f"{header}={coding[:40]!r} is not accepted: send the body as it is",
            )
    data = await _read_bytes(request, serving)
    try:
        return cls.model_validate_json(data)
    except ValidationError as error:
        raise errors.from_validation(error) from None


async def _read_bytes(request: HTTPRequest, serving: Serving) -> bytes:
    options = serving.options
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > options.max_body:
        raise _too_large(options)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(options.body_timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                serving.reading += len(part)
                if size > options.max_body:
                    raise _too_large(options)
                if serving.reading > MOST_BODIES * options.max_body:
                    raise errors.unavailable("too many bodies arrive at once")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise errors.APIError(
            408,
            f"the body did not arrive within {options.body_timeout:g} s",
            headers={"Connection": "close"},
        ) from None
    finally:
        serving.reading -= size


def _too_large(options: Options) -> errors.APIError:
    return errors.APIError(
        413,
        f"the body is too large: it must have at most {options.max_body} bytes",
        headers={"Connection": "close"},
    )


# ---------------------------------------------------------------- responses


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, Result]
) -> Result:
    """Returns the result of `work`; cancels it if the client goes away.

    The body of the request must have been read. Raises ClientGone.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for future in (task, watcher):
            future.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def to_json(data: BaseModel) -> bytes:
    """Returns a body, without the fields that have not been set."""
    return data.model_dump_json(exclude_unset=True).encode()


def event(data: BaseModel) -> bytes:
    """Returns a server-sent event."""
    return b"data: %b\n\n" % to_json(data)


def text_json(text: str) -> bytes:
    """Returns a text as JSON."""
    return pydantic_core.to_json(text)


def delta_json(text: str, is_first: bool) -> bytes:
    """Returns the delta of a chat as JSON. The first one has the role."""
    if is_first:
        return b'{"role":"assistant","content":%b}' % text_json(text)
    return b'{"content":%b}' % text_json(text) if text else b"{}"


class Events:
    """Writes server-sent events that differ in their choices alone.

    What they have in common is encoded once: pydantic would take more time for a token
    than all else that the server does for it.

    Args:
      empty: an event without choices.
    """

    def __init__(self, empty: BaseModel) -> None:
        # Text cannot look like this: its quotes are escaped.
        head, _, self._tail = event(empty).partition(b'"choices":[]')
        self._head, self._tail = head + b'"choices":[', b"]" + self._tail

    def write(
        self,
        index: int,
        name: bytes,
        content: bytes,
        logprobs: BaseModel | None,
        finish: str | None,
    ) -> bytes:
        """Returns the event of one choice.

        Args:
          index: of the choice.
          name, content: the field for what is new, and its JSON.
          logprobs: of the new tokens.
          finish: "stop", "length" or None.
        """
        return b'%b{"index":%d,"%b":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            index,
            name,
            content,
            b"null" if logprobs is None else to_json(logprobs),
            b"null" if finish is None else b'"%b"' % finish.encode(),
            self._tail,
        )


class EventStream(Response):
    """A stream of server-sent events, which ends with [DONE].

    The status is sent with the first event: an error before it is a response of its
    own, with its status. An error after it is an event.

    Args:
      events: the events; it is closed at the end, however that comes about.
      deadline: loop.time() at which the stream must have ended.
      timeout: the seconds until then, for the message.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], deadline: float, timeout: float
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"x-accel-buffering": "no"})
        self._events, self._deadline, self._timeout = events, deadline, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._has_begun = False
        try:
            await while_connected(receive, self._send_all(scope, receive, send))
        except ClientGone:
            scope["state"]["log"].setdefault("error", "disconnected")

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = scope["state"]["log"]
        try:
            try:
                async with asyncio.timeout_at(self._deadline):
                    async for data in self._events:
                        await self._send(send, data)
                    await self._send(send, DONE, is_last=True)
                    return
            except TimeoutError:
                error = errors.timed_out(self._timeout)
            except errors.APIError as raised:
                error = raised
            fields["error"] = error.code
            scope["app"].state.serving.metrics.refused(error)
            if not self._has_begun:
                return await error.response()(scope, receive, send)
            try:
                async with asyncio.timeout(1):
                    await self._send(send, _error_event(error), is_last=True)
            except TimeoutError:  # the client does not read
                fields["error"] = "slow_reader"
                if abort := scope.get("extensions", {}).get(ABORT):
                    abort()
        finally:
            if aclose := getattr(self._events, "aclose", None):
                await aclose()

    async def _send(self, send: Send, data: bytes, is_last: bool = False) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
        await send(
            {"type": "http.response.body", "body": data, "more_body": not is_last}
        )


def _error_event(error: errors.APIError) -> bytes:
    return b"data: %b\n\n" % json.dumps(error.body()).encode()
