"""Connections: time limits that uvicorn does not have, and orderly ends."""

import asyncio
import http
import sys
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, httptools

from ladder_jax.server import errors
from ladder_jax.server.access import ABORT, IS_PAUSED, SECURITY_HEADERS

MOST_HEADER_BYTES = 2**16
HEADER_SECONDS = 10.0  # from a connection's first byte to the end of the headers
GRACE_SECONDS = 0.5  # for connections without a request when the server stops
# After the response, before the connection ends: for a client that still sends, and for
# one that has not read all.
SEND_SECONDS, READ_SECONDS = 5.0, 60.0
_FRAMING = (b"content-length", b"transfer-encoding")  # headers that delimit a body


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with limits for headers: their time and their size.

    A client that opens a connection and sends nothing, or sends headers byte by byte,
    is disconnected. Its scope has the function that drops the connection at once, for a
    client that does not read: an orderly end waits until it has read all.

    A request that asks for another protocol (Java's client asks for HTTP/2) is answered
    in this one. What is not HTTP gets an error in the form of the API.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _end_timer: asyncio.TimerHandle | None = None  # once the last response is written
    _header_bytes = 0  # of the headers that are not complete, and of trailers
    _stops = False  # whether the server stops: a response is the last one
    _ends = False  # whether nobody reads what the client still sends
    _data = b""  # the newest bytes
    _reads_framing = False  # whether the parser gets headers of ours
    _cycles: Sequence[Any] = ()  # the requests that are not answered, and the newest

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._tell_gone()
        super().connection_lost(exc)

    def _ends_with_response(self) -> bool:
        """Makes the response that is under way the last one, if there is one."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        self._ends, cycle.keep_alive = True, False
        return True

    def _tell_gone(self) -> None:
        """Tells all requests, not the newest alone, that nobody waits for an answer."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._ends:
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._header_timer is None:
            self._expect_headers()
        self._data, timer = data, self._header_timer
        super().data_received(data)
        if timer is not None and timer is self._header_timer:  # all of it is headers
            self._count(len(data))

    # ------------------------------------------------------------ headers

    def on_message_begin(self) -> None:
        if not self._reads_framing:
            super().on_message_begin()
            if self._header_timer is None:
                self._expect_headers()

    def on_url(self, url: bytes) -> None:
        if not self._reads_framing:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reads_framing:
            return
        super().on_header(name, value)
        if self._header_timer is None:  # it comes after the body
            self._count(len(name) + len(value))

    def _count(self, size: int) -> None:
        """Counts bytes of headers, and ends the connection if they are too many."""
        self._header_bytes += size
        if self._header_bytes > MOST_HEADER_BYTES:
            message = f"the headers have more than {MOST_HEADER_BYTES} bytes"
            self._refuse(errors.APIError(431, message, code="headers_too_large"))

    def on_headers_complete(self) -> None:
        if self._reads_framing:
            return
        self._stop_timer()
        self._header_bytes = 0
        own: dict[str, Any] = {ABORT: self.transport.abort, IS_PAUSED: self._is_paused}
        self.scope["extensions"] = own
        super().on_headers_complete()
        self.cycle.transport = _Connection(self, self.cycle)  # type: ignore[assignment]
        going = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles = [*going, self.cycle]
        if self._stops:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else its body is still to come
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Is called after the headers of a request that asks for another protocol.

        httptools leaves the rest of the connection to that protocol, the request's body
        too. A parser that has only seen the headers that delimit the body reads it.
        """
        error = sys.exception()
        assert isinstance(error, httptools.HttpParserUpgrade)
        rest = self._data[error.args[0] :]
        framing = b"".join(
            b"%b: %b\r\n" % header for header in self.headers if header[0] in _FRAMING
        )
        self.parser = httptools.HttpRequestParser(self)
        self._reads_framing = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        self._reads_framing = False
        if rest:
            self.data_received(rest)

    def _is_paused(self) -> bool:
        """Whether a message waits until the client has read."""
        return self.flow.write_paused

    # ------------------------------------------------------------ the end

    def end(self, still_sends: bool) -> None:
        """Ends the connection once the client has read all.

        still_sends: whether the client has not sent all of its request. The connection
        then stays open for a while: a closed one would answer what comes with a reset,
        at which the client may drop a response that it has not read.
        """
        still_sends, self._ends = still_sends or self._ends, True
        if still_sends and self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            still_sends = False
            self.transport.close()
        seconds = SEND_SECONDS if still_sends else READ_SECONDS
        self._end_timer = self.loop.call_later(seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        message = "the request is not valid HTTP/1.1"
        self._refuse(errors.invalid(None, message, "invalid_http"))

    def _refuse(self, error: errors.APIError) -> None:
        """Answers a request that is not valid HTTP, and ends the connection."""
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._ends_with_response():
                return
            if self.pipeline or cycle.response_started:
                self.transport.abort()  # no error in the middle of another response
                return
            self._tell_gone()
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        headers += [(name.encode(), s.encode()) for name, s in SECURITY_HEADERS.items()]
        reason = http.HTTPStatus(error.status).phrase
        lines = [b"HTTP/1.1 %d %b" % (error.status, reason.encode())]
        lines += [b"%b: %b" % header for header in headers]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + response.body)
        self.end(still_sends=True)

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

    # ------------------------------------------------------------ timers

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if not self._ends_with_response():
            self.transport.abort()


class _Connection:
    """What a response knows of its connection: its end is Protocol's."""

    def __init__(self, protocol: Protocol, cycle: Any) -> None:
        self._protocol, self._cycle = protocol, cycle
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        self._protocol.end(still_sends=self._cycle.more_body)
