"""A real HTTP server in this process, for tests."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from unittest import mock

import helpers
import httpx2
import openai
import uvicorn

from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.server.app import create_app
from ladder_jax.server.connections import Protocol
from ladder_jax.server.logs import LogWriter
from ladder_jax.server.serving import Options

LENGTH = 128  # tokens of the engine's longest request


class Log(LogWriter):
    """Keeps the lines of the log."""

    def __init__(self):
        self.lines = []

    def write(self, event, level="info", **fields):
        self.lines.append(dict(event=event, level=level) | fields)

    def last(self, path):
        """The line about the last request for a path."""
        return [line for line in self.lines if line.get("path") == path][-1]


class Server:
    """A server's address, its application and clients for it."""

    def __init__(self, app, address, log):
        self.app, self.address, self.log = app, address, log
        self.serving = app.state.serving
        self.engine = self.serving.engine
        self.url = f"http://{address[0]}:{address[1]}"
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        self._client = dict(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60
        )
        self.openai = openai.OpenAI(**self._client)

    def async_openai(self):
        return openai.AsyncOpenAI(**self._client)

    def post(self, path, body=None, **options):
        return self.http.post(path, json=body, **options)

    def events(self, path, body):
        """The events of a stream, parsed, without the last one, [DONE]."""
        with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        datas = [line.removeprefix("data: ") for line in lines]
        assert datas[-1] == "[DONE]"
        return [json.loads(data) for data in datas[:-1]]

    def connect(self):
        """A connection without HTTP."""
        return socket.create_connection(self.address, timeout=20)

    def raw(self, data):
        """What the server answers to `data`, until it closes the connection."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            return read_all(connection)

    def wait_idle(self, seconds=20):
        """Waits until no request is in the engine."""
        wait_until(lambda: not (self.engine.waiting or self.engine.on_device), seconds)


def read_all(connection):
    """All bytes until the other side closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def wait_until(condition, seconds=20):
    """Waits until `condition()` is true, or fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


def post_bytes(path, body, *headers, host="test"):
    """The bytes of a POST request of JSON."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@contextlib.contextmanager
def serve(engine, **options):
    """Serves an engine on a free port; the port closes at the end."""
    log, was_running = Log(), engine.running
    app = create_app(engine, Options(**dict(model_name="tiny") | options), log)
    config = uvicorn.Config(
        app,
        port=0,
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    listener = server.servers[0].sockets[0]
    running = Server(app, listener.getsockname(), log)
    running.listener, running.uvicorn = listener, server
    try:
        yield running
    finally:
        running.http.close()
        running.openai.close()
        server.should_exit = True
        thread.join(20)
        if not was_running:  # else it serves another server, too
            engine.close()


@contextlib.contextmanager
def small_queue(engine, size):
    """The engine's queue has room for `size` requests inside."""
    options = dataclasses.replace(engine.options, queue_size=size)
    with (
        mock.patch.object(engine, "options", options),
        mock.patch.object(engine._queue, "size", size),
    ):
        yield


def make_engine(tokenizer, **options):
    """A small engine with a tokenizer, its programs compiled."""
    model_config = dataclasses.replace(helpers.ENGINE_MODEL, max_length=LENGTH)
    defaults = dict(max_length=LENGTH, max_stop_ids=8, max_logit_bias=8, slots=4)
    engine = helpers.make_engine(
        model_config, tokenizer=tokenizer, **defaults | options
    )
    engine.warm_up()
    return engine


SHARED = []


def shared_engine():
    """One engine for all test files; it reads bytes. Another one if it has failed."""
    if not SHARED or SHARED[-1].stepper.failed is not None:
        SHARED.append(make_engine(ByteTokenizer()))
    return SHARED[-1]


def check_error(response, status, param=None, word=""):
    """The response is an error in OpenAI's format, about the field `param`."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    message = body["error"]["message"]
    assert word in message and "\n" not in message and 0 < len(message) <= 500
