"""Sends the requests of one load at their times, and measures the client itself."""

import asyncio
import contextlib
import gc
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

from ladder_jax.bench.load_client import Endpoint, Exchange, Outcome, exchange, read
from ladder_jax.bench.workloads import Arrival

WATCH = 0.01  # seconds between two looks at the event loop's delay
Send = Callable[[Arrival], Awaitable[Exchange]]
Sent = list[tuple[Arrival, float, Exchange]]  # with the time at which each was due


class Run(NamedTuple):
    """One load that one server has served."""

    outcomes: list[Outcome]  # in the order of arrival
    seconds: float  # from the start until the last request has ended
    delays: list[float]  # seconds by which the event loop woke up late
    busy: float  # processor seconds that the client took, per second


async def run_load(send: Send, arrivals: Sequence[Arrival], users: int = 0) -> Run:
    """Sends all requests, and waits until each has ended.

    Args:
      send: sends one request.
      arrivals: the requests, in the order of arrival.
      users: each sends its next request when its last one has ended, and the times of
        `arrivals` do not count. 0: each request is sent at its time, whatever the
        others do.
    """
    clock = asyncio.get_running_loop().time
    delays: list[float] = []
    with _no_garbage_collection():
        watcher = asyncio.create_task(_watch(delays))
        processor = time.process_time()
        start = clock()
        if users:
            sent = await _closed_loop(send, arrivals, users)
        else:
            sent = await _open_loop(send, arrivals, start)
        duration = max(clock() - start, 1e-9)
        processor = time.process_time() - processor
        watcher.cancel()
    outcomes = [read(*one, start) for one in sent]
    return Run(outcomes, duration, delays, processor / duration)


async def _open_loop(send: Send, arrivals: Sequence[Arrival], start: float) -> Sent:
    """Sends each request at its time."""
    clock, sending = asyncio.get_running_loop().time, []
    for arrival in arrivals:
        wait = start + arrival.seconds - clock()
        if wait > 0:
            await asyncio.sleep(wait)
        sending.append(asyncio.ensure_future(send(arrival)))
    answers = await asyncio.gather(*sending)
    return [
        (one, start + one.seconds, answer) for one, answer in zip(arrivals, answers)
    ]


async def _closed_loop(send: Send, arrivals: Sequence[Arrival], users: int) -> Sent:
    """Sends requests from several users."""
    clock, remaining = asyncio.get_running_loop().time, iter(arrivals)
    sent: Sent = []

    async def use() -> None:
        for arrival in remaining:
            due = clock()
            sent.append((arrival, due, await send(arrival)))

    await asyncio.gather(*(use() for _ in range(users)))
    return sorted(sent, key=lambda one: one[1])


async def _watch(delays: list[float]) -> None:
    """Records by how much each short sleep is too long."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + WATCH
        await asyncio.sleep(WATCH)
        delays.append(clock() - due)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would stop the client for longer than a token takes."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


async def over_http(
    endpoint: Endpoint,
    arrivals: Sequence[Arrival],
    *,
    users: int = 0,
    timeout: float = 600.0,
    headers: dict[str, str] | None = None,
) -> Run:
    """Sends a load to a server, see `run_load`; each request ends after `timeout`."""
    import aiohttp

    bodies = {arrival: endpoint.body(arrival) for arrival in arrivals}
    connector = aiohttp.TCPConnector(limit=0)
    no_limit = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=no_limit, headers=headers
    ) as session:

        def send(arrival: Arrival) -> Awaitable[Exchange]:
            return exchange(session, endpoint.url, bodies[arrival], timeout)

        return await run_load(send, arrivals, users)
