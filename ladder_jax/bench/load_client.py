"""An HTTP client of the OpenAI API that measures: one request, and what came back when.

`exchange` sends a request and keeps the bytes of its answer with the times at which
they came. `read` parses them, after the load has ended: on a machine that it shares
with the server, the client should take as little processor time as it can while it
measures. It never sends a request twice.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ladder_jax.bench.workloads import Arrival

if TYPE_CHECKING:
    import aiohttp

HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
DONE = "[DONE]"


class Exchange(NamedTuple):
    """A request and the bytes of its answer. Times are of the event loop's clock."""

    sent: float  # when the client began to send
    ended: float
    status: int  # 0: there was no answer
    chunks: list[tuple[float, bytes]]
    error: str  # "" or how the connection failed


@dataclass(frozen=True)
class Outcome:
    """What a client saw of one request. Times are seconds after the load's start."""

    request: Arrival
    arrival: float  # when it should have been sent; where users send, when it was
    sent: float
    times: tuple[float, ...] = ()  # of each event with output
    ended: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0  # of the output, as the server counts them, or else events
    text: str = ""
    finish: str = ""
    error: str = ""  # its kind; "": it completed


class Endpoint(NamedTuple):
    """Where requests go, and what is in all of them."""

    url: str
    fields: dict[str, Any]  # of every body, such as model
    chat: bool = False

    def body(self, arrival: Arrival) -> bytes:
        """The JSON of a request."""
        if self.chat:
            prompt: dict[str, Any] = dict(
                messages=[dict(role="user", content=arrival.prompt)]
            )
        else:
            prompt = dict(prompt=arrival.prompt)
        fields = self.fields | prompt | dict(max_tokens=arrival.max_tokens)
        return json.dumps(fields).encode()


async def exchange(
    session: "aiohttp.ClientSession", url: str, body: bytes, timeout: float
) -> Exchange:
    """Sends one request, and reads its answer to the end or for `timeout` seconds."""
    import aiohttp

    clock = asyncio.get_running_loop().time
    sent, status, error = clock(), 0, ""
    chunks: list[tuple[float, bytes]] = []
    try:
        async with asyncio.timeout(timeout):
            async with session.post(url, data=body, headers=HEADERS) as response:
                status = response.status
                async for data in response.content.iter_any():
                    chunks.append((clock(), data))
    except TimeoutError:
        error = "timeout"
    except aiohttp.ClientConnectorError:
        error = "no connection"
    except (aiohttp.ClientError, OSError):
        error = "connection lost"
    return Exchange(sent, clock(), status, chunks, error)


def events(chunks: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """The data of each server-sent event, with the time at which it was complete."""
    rest = b""
    data: list[str] = []
    for seconds, chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                text = line[5:].decode("utf-8", "replace")
                data.append(text.removeprefix(" "))
            elif not line and data:
                yield seconds, "\n".join(data)
                data = []


def read(request: Arrival, due: float, answer: Exchange, start: float) -> Outcome:
    """What a client saw of an exchange.

    Args:
      request: what was sent.
      due: when it should have been sent.
      answer: the exchange.
      start: of the load, from which the outcome's times count.
    """
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] = {}
    finish, error, is_done = "", _failure(answer), False
    for seconds, data in events(answer.chunks) if answer.status == 200 else ():
        if data == DONE:
            is_done = True
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                error = error or "error in the stream"
                continue
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                delta = choice.get("delta", choice)
                text = delta.get("content" if delta is not choice else "text") or ""
                finish = choice.get("finish_reason") or finish
                texts.append(text)
                # The event of a chat's role, and one that only ends, have no token.
                if text or not (delta.get("role") or choice.get("finish_reason")):
                    times.append(seconds - start)
        except (ValueError, TypeError, AttributeError):
            error = error or "not an OpenAI stream"
    if not error and not (is_done and finish):
        error = "ended early"
    return Outcome(
        request=request,
        arrival=due - start,
        sent=answer.sent - start,
        times=tuple(times),
        ended=answer.ended - start,
        prompt_tokens=usage.get("prompt_tokens", 0),
        tokens=usage.get("completion_tokens", len(times)),
        text="".join(texts),
        finish=finish,
        error=error,
    )


def _failure(answer: Exchange) -> str:
    """Why the answer is no stream, in a word or two; "" if it is one."""
    if answer.error:
        return answer.error
    return "" if answer.status == 200 else str(answer.status)
