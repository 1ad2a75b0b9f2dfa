"""Clients that ask for too much, are too slow, or go away; devices that fail."""

import contextlib
import dataclasses
import json
import math
import socket
import threading
import time
from unittest import mock

import pytest
import served
from served import check_error, post_bytes, read_all, small_queue, wait_until

from ladder_jax.server import connections, streaming

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FOREVER = dict(prompt="x", max_tokens=120, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine(), max_body=100_000) as running:
        yield running


# ---------------------------------------------------------------- overload


@contextlib.contextmanager
def held_engine(server, queue_size=1024):
    """The engine takes no step inside."""
    with small_queue(server.engine, queue_size), server.engine._stepping:
        yield


def in_thread(function, *arguments):
    """Starts a thread; returns a function that waits for the result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()

    def result():
        thread.join(30)
        return results[0]

    return result


def test_a_full_queue_refuses_and_says_when_to_come_back(server):
    rejected = server.serving.metrics.rejected.labels("queue_full")
    before = rejected._value.get()
    with held_engine(server, queue_size=3):
        body = FOREVER | dict(max_tokens=5)
        accepted = [in_thread(server.post, COMPLETIONS, body) for _ in range(3)]
        wait_until(lambda: server.engine.waiting == 3)
        for stream in (False, True):
            response = server.post(COMPLETIONS, body | dict(stream=stream))
            check_error(response, 429, None, "wait")
            assert 1 <= int(response.headers["retry-after"]) <= 60
        response = server.post(COMPLETIONS, body | dict(n=2))
        assert response.status_code == 429
        assert server.engine.waiting == 3  # none of the two is left
    assert [wait().status_code for wait in accepted] == [200] * 3
    assert rejected._value.get() == before + 3
    assert server.post(COMPLETIONS, body).status_code == 200


def test_a_request_that_no_queue_could_hold_is_an_error_of_the_client(server):
    with held_engine(server, queue_size=3):
        body = dict(prompt=["a"] * 4, max_tokens=1)
        check_error(server.post(COMPLETIONS, body), 400, "prompt", "3")
        check_error(server.post(COMPLETIONS, dict(prompt="a", n=4)), 400, "n", "3")


def test_a_request_that_takes_too_long_ends(server):
    options = dataclasses.replace(server.serving.options, request_timeout=0.3)
    with mock.patch.object(server.serving, "options", options):
        with held_engine(server):
            for stream in (False, True):
                body = FOREVER | dict(stream=stream)
                check_error(server.post(COMPLETIONS, body), 504, None, "0.3 s")
            assert server.engine.waiting == 0
        server.wait_idle()


def test_a_stream_that_takes_too_long_ends_with_an_error(server):
    options = dataclasses.replace(server.serving.options, request_timeout=0.5)
    with mock.patch.object(server.serving, "options", options):
        lines = slow_stream(server)
    assert "data: [DONE]" not in lines
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "timeout"
    server.wait_idle()


def slow_stream(server, act=None):
    """The lines of a stream whose engine stops to feed it after its first event.

    act: is called there instead, and the engine goes on.
    """
    lines = []
    body = FOREVER | dict(stream=True)
    with server.http.stream("POST", COMPLETIONS, json=body) as response:
        with contextlib.ExitStack() as stack:
            for line in response.iter_lines():
                if not lines:
                    stack.enter_context(server.engine._stepping)
                    if act is not None:
                        act()
                        stack.close()
                if line:
                    lines.append(line)
    return lines


def test_a_stream_without_tokens_has_comments(server):
    options = dataclasses.replace(
        server.serving.options, keep_alive=0.05, request_timeout=0.6
    )
    with mock.patch.object(server.serving, "options", options):
        lines = slow_stream(server)
    assert lines.count(": waiting") >= 3


# ---------------------------------------------------------------- failures


@contextlib.contextmanager
def broken_device(server, message):
    """No chunk runs inside."""
    programs = type(server.engine.programs)
    with mock.patch.object(programs, "run_chunk", side_effect=RuntimeError(message)):
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_a_device_error_fails_the_requests_and_the_server_goes_on(server, stream):
    server.wait_idle()  # another error in a row may end the engine
    with broken_device(server, "the device is broken\nin two lines"):
        with held_engine(server):
            waits = [
                in_thread(server.post, COMPLETIONS, FOREVER | dict(stream=stream))
                for _ in range(2)
            ]
            wait_until(lambda: server.engine.waiting == 2)
        for wait in waits:
            check_error(wait(), 500, None, "the device is broken in two lines")
    assert server.post(COMPLETIONS, FOREVER).status_code == 200
    assert server.http.get("/ready").status_code == 200


def test_a_device_error_in_a_stream_is_its_last_event(server):
    server.wait_idle()
    with contextlib.ExitStack() as stack:
        lines = slow_stream(
            server,
            lambda: stack.enter_context(broken_device(server, "the device is broken")),
        )
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert "the device is broken" in error["message"]
    assert "data: [DONE]" not in lines
    assert server.post(COMPLETIONS, FOREVER).status_code == 200


def test_an_error_of_the_server_itself_is_a_500(server):
    from ladder_jax.server import texts

    with mock.patch.object(texts, "_tokenize", side_effect=KeyError("secret")):
        response = server.post("/tokenize", dict(prompt="x"))
    check_error(response, 500, None, "KeyError")
    assert "secret" not in response.text


# ---------------------------------------------------------------- slow, or gone


def last_error(server):
    lines = [line for line in server.log.lines if line.get("path") == COMPLETIONS]
    return lines[-1].get("error") if lines else None


def test_a_client_that_goes_away_frees_its_slot(server):
    body = json.dumps(FOREVER | dict(stream=True)).encode()
    with held_engine(server):
        with server.connect() as connection:
            connection.sendall(post_bytes(COMPLETIONS, body))
            wait_until(lambda: server.engine.waiting == 1)
        wait_until(lambda: server.engine.waiting == 0)
    with server.connect() as connection:
        connection.sendall(post_bytes(COMPLETIONS, body))
        assert connection.recv(100)  # it runs
        server.engine._stepping.acquire()  # the next chunk waits
        connection.close()
        wait_until(lambda: not server.serving.running)
        server.engine._stepping.release()
    chunks = server.engine.counters.chunks
    server.wait_idle()
    assert server.engine.counters.chunks - chunks <= 3
    wait_until(lambda: last_error(server) == "disconnected")
    assert server.log.last(COMPLETIONS)["finish"] == "cancelled"


def test_a_client_that_goes_away_without_a_stream_frees_its_slot(server):
    body = json.dumps(FOREVER).encode()
    with held_engine(server), server.connect() as connection:
        connection.sendall(post_bytes(COMPLETIONS, body))
        wait_until(lambda: server.engine.waiting == 1)
        connection.close()
        wait_until(lambda: server.engine.waiting == 0)


def test_a_client_that_goes_away_while_its_prompt_is_encoded(server):
    tokenizer = server.engine.tokenizer
    started, go_on = threading.Event(), threading.Event()
    encode = type(tokenizer).prompt

    def slow_prompt(self, text, bos=None):
        started.set()
        go_on.wait(20)
        return encode(self, text, bos)

    body = json.dumps(FOREVER | dict(n=3)).encode()
    submitted = server.engine.counters.submitted
    server.log.lines.clear()
    with mock.patch.object(type(tokenizer), "prompt", slow_prompt):
        with server.connect() as connection:
            connection.sendall(post_bytes(COMPLETIONS, body))
            started.wait(20)
            # The event loop does not wait for the tokenizer.
            assert server.http.get("/health").status_code == 200
        wait_until(lambda: last_error(server) == "disconnected")
        go_on.set()
        wait_until(lambda: server.serving.encoding == 0)
    assert server.engine.counters.submitted == submitted
    server.wait_idle()


def test_a_slow_reader_stalls_nobody_and_is_dropped(server):
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    options = dataclasses.replace(server.serving.options, request_timeout=1.5)
    body = FOREVER | dict(stream=True, n=12, logprobs=3, max_tokens=120)
    with mock.patch.object(server.serving, "options", options):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(server.address)
            connection.sendall(post_bytes(COMPLETIONS, json.dumps(body).encode()))
            assert connection.recv(10)
            other = server.post(COMPLETIONS, dict(prompt="y", max_tokens=20))
            assert other.status_code == 200
            server.wait_idle()  # its requests end although nobody reads them
            wait_until(lambda: last_error(server) == "slow_reader")
            assert b"[DONE]" not in read_all(connection)
    assert not server.serving.running


def test_headers_and_bodies_that_come_too_slowly(server):
    with mock.patch.object(connections, "HEADER_SECONDS", 0.2):
        started = time.monotonic()
        assert server.raw(b"POST /v1/comp") == b""
        with server.connect() as connection:  # nothing at all
            assert read_all(connection) == b""
        with server.connect() as connection:  # a byte at a time, after a request
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            with contextlib.suppress(ConnectionError):
                for byte in b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.01)
            assert read_all(connection) == b""
        assert time.monotonic() - started < 10
    options = dataclasses.replace(server.serving.options, body_timeout=0.2)
    with mock.patch.object(server.serving, "options", options):
        head = post_bytes(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 50")
        assert server.raw(head + b'{"prompt"').startswith(b"HTTP/1.1 408")


def test_two_hundred_idle_connections_do_not_disturb(server):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(200)]
        for connection in idle[:100]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert server.post(COMPLETIONS, dict(prompt="x")).status_code == 200


def test_headers_without_an_end(server):
    for head in (b"GET /" + b"x" * 10**6, b"GET / HTTP/1.1\r\nA: " + b"b" * 10**6):
        assert b"200" not in server.raw(head)
    chunked = post_bytes(COMPLETIONS, b"").replace(
        b"Content-Length: 0", b"Transfer-Encoding: chunked"
    )
    trailers = b"".join(b"T%d: %b\r\n" % (i, b"t" * 1000) for i in range(100))
    body = b"1\r\n{\r\n0\r\n" + trailers + b"\r\n"
    assert b"200" not in server.raw(chunked + body)
    assert server.http.get("/health").status_code == 200


def test_a_response_that_nobody_reads_is_dropped():
    engine = served.shared_engine()
    with served.serve(engine, write_timeout=0.3, max_choices=100) as other:
        other.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = dict(prompt="x" * 60, max_tokens=60, n=60, logprobs=3, ignore_eos=True)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(other.address)
            connection.sendall(post_bytes(COMPLETIONS, json.dumps(body).encode()))
            wait_until(lambda: last_error(other) == "slow_reader", 60)
            assert not read_all(connection).endswith(b"}")
        assert other.post(COMPLETIONS, dict(prompt="x")).status_code == 200


def test_bodies_that_arrive_at_once_have_a_limit_together(server):
    with (
        mock.patch.object(streaming, "MOST_BODIES", 2),
        contextlib.ExitStack() as stack,
    ):
        for _ in range(3):
            connection = stack.enter_context(server.connect())
            head = post_bytes(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 90000")
            connection.sendall(head + b" " * 80_000)
        wait_until(lambda: last_error(server) == "unavailable")
        assert connection.recv(100).startswith(b"HTTP/1.1 503")
    wait_until(lambda: server.serving.reading == 0)
    assert server.post(COMPLETIONS, dict(prompt="x")).status_code == 200


@pytest.mark.slow
def test_500_connections_that_all_stream(server):
    """Takes half a minute."""
    body = json.dumps(FOREVER | dict(stream=True)).encode()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(500)]
        for connection in connections:
            connection.settimeout(300)
            connection.sendall(post_bytes(COMPLETIONS, body))
        answers = [read_all(connection) for connection in connections]
    assert all(b"data: [DONE]\n\n" in answer for answer in answers)
    assert math.isclose(len(set(map(len, answers))), 1, abs_tol=500)
