"""Sends the newest state to everyone who watches, and takes it once for all of them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

INTERVAL = 0.2  # seconds between two states
# With these, a stream ends after one state: an open one would keep the server from
# ending. The page then asks again.
LAST = frozenset({"draining", "failed"})


Take = Callable[[], Mapping[str, Any]]


class Sample(NamedTuple):
    """A state as it is sent, and whether a stream goes on after it."""

    taken: float  # of the feed's clock
    body: bytes  # JSON
    event: bytes  # the same as a server-sent event
    is_last: bool


class Feed:
    """The newest state, at most `INTERVAL` old, for any number of clients.

    It takes a state only when a client wants one, at most five times a second, on a
    thread of its own: the event loop does not wait for it. A client that reads slowly
    skips states, and holds no more memory than one.

    Args:
      take: returns the state, see state.state. Any thread may call it.
      clock: seconds, ascending.
    """

    def __init__(self, take: Take, clock: Callable[[], float] = time.monotonic) -> None:
        self._take, self._clock = take, clock
        self._lock = asyncio.Lock()
        self._sample: Sample | None = None

    async def newest(self) -> Sample:
        """Returns the newest state."""
        async with self._lock:  # those who wait here get the state of the first
            sample = self._sample
            if sample is None or self._clock() - sample.taken >= INTERVAL:
                sample = await asyncio.to_thread(self._encode)
                self._sample = sample
            return sample

    def _encode(self) -> Sample:
        taken, state = self._clock(), self._take()
        body = json.dumps(state, separators=(",", ":")).encode()
        return Sample(taken, body, b"data: " + body + b"\n\n", state["status"] in LAST)

    async def watch(self) -> AsyncIterator[bytes]:
        """Yields every state as a server-sent event, five a second."""
        while True:
            sample = await self.newest()
            yield sample.event
            if sample.is_last:
                return
            # Those who watch wake together, so that one of them takes the next state.
            await asyncio.sleep(max(sample.taken + INTERVAL - self._clock(), 0.01))
