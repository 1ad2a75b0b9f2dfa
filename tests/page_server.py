"""What the tests of the page share: states without an engine, and a server."""

import contextlib
import math
import shutil
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from ladder_jax.server import page
from ladder_jax.server.feed import Feed

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


def executable() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def state_at(seconds: float, slots: int = 8) -> dict:
    """The state of an engine with two requests in every three slots.

    A request takes 4 seconds; each slot begins its own a little later than the slot
    before it.
    """
    rows = []
    for i in range(slots):
        turn, within = divmod(seconds - 0.3 * i, 4)
        free = (i + int(turn)) % 3 == 0
        rows.append(
            None
            if free
            else dict(
                request=1 + i + slots * int(turn % 100),
                prompt_tokens=40 + 30 * (i % 4),
                tokens=int(100 * within),
                max_tokens=450,
            )
        )
    return dict(
        status="ready",
        detail=None,
        model="tiny",
        time=seconds,
        slots=rows,
        waiting=3 + int(3 * math.sin(seconds)),
        queue_size=1024,
        prefilling=1,
        staged=2,
        staging_size=4,
        kv_used_bytes=3 * 2**20,
        kv_total_bytes=8 * 2**20,
        prefix_used_bytes=0,
        programs_compiled=17,
        counters=dict(submitted=20, finished=9, tokens=int(500 * seconds)),
        latencies=dict(
            queue=None,
            first_token=dict(p50=0.0123, p99=1.5),
            per_token=dict(p50=0.004, p99=0.02),
            end_to_end=dict(p50=2.5, p99=12.0),
        ),
    )


class Source:
    """States for a feed: `state`, or those of `state_at` with the fields of `changed`.

    taken: how many it has given.
    """

    def __init__(self, slots: int = 8) -> None:
        self.slots, self.taken = slots, 0
        self.changed: dict = {}
        self.state: dict | None = None

    def __call__(self) -> dict:
        self.taken += 1
        return self.state or state_at(time.monotonic(), self.slots) | self.changed


def application(source: Source) -> FastAPI:
    """An application that has the page and no API."""
    app = FastAPI()
    app.include_router(page.router(Feed(source)))
    return app


@contextlib.contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[int]:
    """Serves an application at 127.0.0.1; yields the port."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
