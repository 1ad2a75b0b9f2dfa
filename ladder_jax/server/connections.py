"""Connections: time limits that uvicorn does not have."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ladder_jax.server.access import ABORT

MOST_HEADER_BYTES = 2**16
HEADER_SECONDS = 10.0  # from a connection's first byte to the end of the headers
GRACE_SECONDS = 0.5  # for connections without a request when the server stops


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with limits for headers: their time and their size.

    A client that opens a connection and sends nothing, or sends headers byte by byte,
    or without an end, is disconnected. Its scope has the function that drops the
    connection at once, for a client that does not read: an orderly end waits until it
    has read all.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0  # of the headers that are not complete, and of trailers
    _stops = False  # whether the server stops: a response is the last one

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._header_timer is None:
            self._expect_headers()
        super().data_received(data)
        if self._header_timer is not None:  # they are not complete
            self._count(len(data))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if self._header_timer is None:  # it comes after the body
            self._count(len(name) + len(value))

    def _count(self, size: int) -> None:
        """Counts bytes of headers, and drops the connection if they are too many."""
        self._header_bytes += size
        if self._header_bytes > MOST_HEADER_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._header_bytes = 0
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]
        super().on_headers_complete()
        if self._stops:
            self.cycle.keep_alive = False

    def timeout_keep_alive_handler(self) -> None:
        """Is called when no request has come for a while."""
        if self.transport.get_write_buffer_size():  # nor was the response read
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """Is called when the server stops: a request that is on its way is answered."""
        self._stops = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self._stop_timer()
            self._header_timer = self.loop.call_later(GRACE_SECONDS, self._give_up)

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        self.transport.abort()
