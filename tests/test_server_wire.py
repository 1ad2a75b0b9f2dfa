"""Below the bodies: what the server makes of HTTP itself, and how a connection ends."""

import asyncio
import json
import os
import socket
import threading
import time
from unittest import mock

import pytest
import served
from served import post_bytes, read_all, wait_until

from ladder_jax.server import connections, streaming
from ladder_jax.server.access import SECURITY_HEADERS

COMPLETIONS = "/v1/completions"
ONE = dict(prompt="x", max_tokens=1)
BODY = json.dumps(ONE).encode()


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine(), max_body=100_000) as running:
        yield running


@pytest.fixture
def unused():
    """A server that nobody is connected to."""
    with served.serve(served.shared_engine(), max_body=100_000) as running:
        yield running


def parse(answer):
    """(status, headers, body) of the only response in `answer`."""
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.partition(": ") for line in lines]
    headers = {name.lower(): value for name, _, value in pairs}
    assert len(headers) == len(pairs)
    return int(status.split(" ")[1]), headers, body


def code_of(answer):
    """(status, code of the error) of the only response in `answer`."""
    status, headers, body = parse(answer)
    assert headers["content-type"] == "application/json"
    assert SECURITY_HEADERS.items() <= headers.items()
    error = json.loads(body)["error"]
    assert error["message"] and "\n" not in error["message"]
    return status, error["code"]


def post(*headers, body=BODY, path=COMPLETIONS):
    """The bytes of a POST request with these headers, and no others that delimit it."""
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    return "\r\n".join([*lines, *headers]).encode("latin-1") + b"\r\n\r\n" + body


SMUGGLED = b"GET /health HTTP/1.1\r\nHost: smuggled\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked"
NOT_HTTP = {
    "both lengths": post("Content-Length: 4", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED),
    "both, reversed": post(CHUNKED, "Content-Length: 4", body=b"0\r\n\r\n" + SMUGGLED),
    "two lengths": post("Content-Length: 4", "Content-Length: 5", body=b"12345"),
    "length twice": post("Content-Length: 5", "Content-Length: 5", body=b"12345"),
    "negative length": post("Content-Length: -1"),
    "signed length": post("Content-Length: +5"),
    "hexadecimal length": post("Content-Length: 0x10"),
    "list of lengths": post("Content-Length: 5, 5"),
    "empty length": post("Content-Length: "),
    "length in words": post("Content-Length: ten"),
    "odd coding": post("Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "chunked not last": post(
        "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n" + SMUGGLED
    ),
    "chunked twice": post("Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"),
    "space before a colon": post("Content-Length : 5", body=b"12345"),
    "folded header": post("X: a\r\n b", "Content-Length: 0", body=b""),
    "bare line feeds": b"GET /health HTTP/1.1\nHost: x\n\n",
    "bare carriage return": b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\rY: b\r\n\r\n",
    "zero byte": b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    "chunk of negative size": post(CHUNKED, body=b"-1\r\n\r\n"),
    "chunk of endless size": post(CHUNKED, body=b"f" * 18 + b"\r\n"),
    "chunk without a size": post(CHUNKED, body=b"zz\r\n"),
    "chunk with a bare line feed": post(CHUNKED, body=b"2\n{}\n0\n\n"),
    "unknown method": b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "method in small letters": b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "no HTTP": b"nonsense\r\n\r\n",
    "version 9": b"GET / HTTP/9.9\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"x" * 200,
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_what_is_not_http_gets_one_error_and_no_second_request(server, name):
    """A load balancer before it might see other requests in these bytes."""
    assert code_of(server.raw(NOT_HTTP[name])) == (400, "invalid_http")
    wait_until(lambda: not server.serving.running and not server.serving.reading)
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", b"GET /" + b"x" * 10**6])
def test_nonsense_after_a_request_does_not_disturb_its_response(server, nonsense):
    """Whether that has begun or not. It is the last one."""
    for stream in (True, False):
        body = json.dumps(dict(prompt="x", max_tokens=100, stream=stream)).encode()
        request = post(f"Content-Length: {len(body)}", body=body)
        with server.connect() as connection:
            connection.sendall(request + request)
            answer = connection.recv(100) if stream else b""
            connection.sendall(nonsense)
            answer += read_all(connection)
        assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200") == 2
        end = b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}"
        assert answer.endswith(end)
    server.wait_idle()


def test_headers_that_do_not_end_do_not_disturb_the_response_before_them(server):
    body = json.dumps(dict(prompt="x", max_tokens=100, stream=True)).encode()
    with mock.patch.object(connections, "HEADER_SECONDS", 0.2):
        with server.connect() as connection:
            with server.engine._stepping:
                request = post(f"Content-Length: {len(body)}", body=body)
                connection.sendall(request + b"GET / HTTP/1.1\r\nA: b")
                time.sleep(0.4)
            answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 ") == 1 and b"data: [DONE]" in answer


def test_a_client_that_goes_away_ends_all_its_pipelined_requests(server, caplog):
    """uvicorn tells the newest alone, which has not begun."""
    body = json.dumps(dict(prompt="x", max_tokens=100, stream=True)).encode()
    request = post(f"Content-Length: {len(body)}", body=body)
    with server.engine._stepping:
        with server.connect() as connection:
            connection.sendall(request * 3)
            wait_until(lambda: server.engine.waiting == 1)
        wait_until(lambda: server.engine.waiting == 0)
    server.wait_idle()
    assert not caplog.records


def test_codings_of_a_body_that_are_not_accepted(server):
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    length, last = f"Content-Length: {len(BODY)}", "Connection: close"
    for coding in ("gzip", "br", "deflate, gzip", "x"):
        answer = server.raw(post(f"Content-Encoding: {coding}", length, last))
        assert code_of(answer)[0] == 415 and coding.encode() in answer
    gzip = server.raw(post("Transfer-Encoding: gzip, chunked", last, body=chunks))
    assert code_of(gzip)[0] == 415
    for plain in ("Content-Encoding: identity", "Content-Encoding: Identity"):
        assert parse(server.raw(post(plain, length, last)))[0] == 200
    chunked = post("Transfer-Encoding: Chunked", last, body=chunks)
    assert parse(server.raw(chunked))[0] == 200


def test_headers_that_are_too_large(server):
    for head in (b"GET /" + b"x" * 10**6, b"GET / HTTP/1.1\r\nA: " + b"b" * 10**6):
        assert code_of(server.raw(head)) == (431, "headers_too_large")


# ---------------------------------------------------------------- upgrades

# As java.net.http.HttpClient sends every first request.
JAVA = (
    "Connection: Upgrade, HTTP2-Settings",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    "Upgrade: h2c",
)


@pytest.mark.parametrize("size", [1, 7, 250, 10**6])
def test_a_request_that_asks_for_another_protocol_is_answered_in_this_one(server, size):
    """However its bytes arrive. The connection goes on after it."""
    length = f"Content-Length: {len(BODY)}"
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    sent = b"".join(
        [
            post(*JAVA, length),
            post(*JAVA, CHUNKED, body=chunks),
            post("Connection: Upgrade", "Upgrade: websocket", length),
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + "\r\n".join(JAVA).encode(),
            b"\r\n\r\n",
            post(length, "Connection: close"),
        ]
    )
    with server.connect() as connection:
        for start in range(0, len(sent), size):
            connection.sendall(sent[start : start + size])
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b"HTTP/1.1") == 5
    assert answer.count(b'"prompt_tokens":2') == 4


def test_a_body_after_an_upgrade_is_no_request(server):
    length = f"Content-Length: {len(SMUGGLED)}"
    answer = server.raw(post(*JAVA, length, "Connection: close", body=SMUGGLED))
    assert code_of(answer) == (400, "invalid_json")


# ---------------------------------------------------------------- methods, pipelines


def test_every_method_on_every_path(server):
    """One answer each: an error in the form of the API that says what is allowed."""
    documented = server.http.get("/openapi.json").json()["paths"]
    paths = [path.replace("{model}", "tiny") for path in documented]
    paths += ["/", "/static/page.css", "/metrics", "/state", "/openapi.json"]
    for path in [*paths, "/nothing", "*"]:
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"):
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            status, headers, body = parse(server.raw(head.encode()))
            assert status in (200, 404, 405), (method, path, status)
            if method == "HEAD":
                assert body == b""
            else:
                assert status != 200 and "message" in json.loads(body)["error"]
            if status == 405:
                assert headers["allow"]
    for path in ("/", "/health", "/ready", "/metrics", "/v1/models"):
        assert server.http.head(path).status_code == 200


def test_pipelined_requests_are_answered_in_order(server):
    """Also streams, and requests that are refused."""
    bodies = [
        dict(prompt="x" * (i + 1), max_tokens=1, n=0 if i == 3 else 1, stream=i % 2 > 0)
        | (dict(stream_options=dict(include_usage=True)) if i % 2 else {})
        for i in range(12)
    ]
    texts = [json.dumps(body).encode() for body in bodies]
    sent = [post(f"Content-Length: {len(text)}", body=text) for text in texts]
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = server.raw(b"".join(sent) + last)
    parts = answer.split(b"HTTP/1.1 ")[1:]
    assert len(parts) == 13
    for i, part in enumerate(parts[:-1]):
        expected = b'"param":"n"' if i == 3 else b'"prompt_tokens":%d,' % (i + 2)
        assert expected in part, (i, part)


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize(
    "path, size, status",
    [
        ("/nothing", 2_000_000, 404),
        ("/health", 2_000_000, 405),
        (COMPLETIONS, 2_000_000, 413),
        (COMPLETIONS, 90_000, 415),
    ],
)
def test_a_client_that_sends_more_than_is_read_gets_the_answer(
    server, path, size, status
):
    """Not a reset of the connection, at which it would drop the answer."""
    kind = "text/plain" if status == 415 else "application/json"
    head = post_bytes(path, b"", f"Content-Length: {size}")
    head = head.replace(b"Content-Length: 0\r\n", b"")
    head = head.replace(b"application/json", kind.encode())
    for _ in range(3):
        with server.connect() as connection:
            connection.sendall(head)
            for _ in range(0, size, 10_000):
                connection.sendall(b" " * 10_000)
            assert code_of(read_all(connection))[0] == status


def test_a_client_that_sends_for_ever_is_dropped(server):
    head = post_bytes(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 999999999")
    with (
        mock.patch.object(connections, "SEND_SECONDS", 0.3),
        server.connect() as client,
    ):
        client.sendall(head)
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - started < 20:
                client.sendall(b" " * 1000)
                time.sleep(0.01)
        assert time.monotonic() - started < 10


def open_connections(server):
    """How many connections uvicorn has."""
    return len(server.uvicorn.server_state.connections)


def test_a_client_that_does_not_read_its_last_answer_is_dropped(unused):
    """The server has written all of it, so that no other limit counts."""
    unused.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps(dict(prompt=["x"] * 60, max_tokens=1, logprobs=3)).encode()
    with mock.patch.object(connections, "READ_SECONDS", 0.3), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(unused.address)
        client.sendall(post_bytes(COMPLETIONS, body))
        wait_until(lambda: open_connections(unused) == 1)
        wait_until(lambda: open_connections(unused) == 0)


# ---------------------------------------------------------------- streams


def test_an_event_sets_no_timer_and_outputs_share_a_write(server):
    """Each would take the event loop as long as the rest of an event."""
    events, timeouts, writes = [], [], []
    send = streaming.EventStream._send

    async def counted(self, *arguments, **options):
        writes.append(arguments)
        await send(self, *arguments, **options)

    for n, tokens in ((1, 1), (1, 100), (8, 100)):
        body = dict(prompt="x", max_tokens=tokens, n=n, stream=True, ignore_eos=True)
        writes.clear()
        with (
            mock.patch.object(asyncio, "timeout", side_effect=asyncio.timeout) as made,
            mock.patch.object(streaming.EventStream, "_send", counted),
        ):
            events.append(len(server.events(COMPLETIONS, body)))
        timeouts.append(made.call_count)
        server.wait_idle()
    assert timeouts[0] == timeouts[1] == timeouts[2]
    assert events[0] == 1 and events[1] > 4 and len(writes) < events[2]


# ---------------------------------------------------------------- all at once


def abuse(server, number):
    """One client of a kind that `number` names."""
    stream = json.dumps(dict(prompt="x", max_tokens=100, stream=True)).encode()
    several = json.dumps(dict(prompt="x", max_tokens=100, n=4)).encode()
    with server.connect() as connection:
        match number % 8:
            case 0:  # goes away in the middle of a stream
                connection.sendall(post_bytes(COMPLETIONS, stream))
                connection.recv(100)
            case 1:  # goes away before there is an answer
                connection.sendall(post_bytes(COMPLETIONS, several))
            case 2:  # goes away in the middle of a body
                connection.sendall(post_bytes(COMPLETIONS, several)[:-5])
            case 3:
                connection.sendall(list(NOT_HTTP.values())[number % len(NOT_HTTP)])
                read_all(connection)
            case 4:  # goes away with a reset
                connection.sendall(post_bytes(COMPLETIONS, stream))
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                )
            case 5:  # asks for all at once, and reads a part
                connection.sendall(post(f"Content-Length: {len(BODY)}") * 20)
                connection.recv(100)
            case 6:
                connection.sendall(post_bytes(COMPLETIONS, b"[" * 90_000))
                assert code_of(read_all(connection))[0] == 400
            case 7:
                connection.sendall(post_bytes(COMPLETIONS, BODY))
                assert parse(read_all(connection))[0] == 200


def test_a_storm_of_clients_leaves_nothing(unused):
    """Slots, pages, files, threads and connections are as before."""
    unused.wait_idle()
    count_files = lambda: len(os.listdir("/proc/self/fd"))
    files, threads = count_files(), threading.active_count()
    clients = [
        threading.Thread(
            target=lambda first=first: [abuse(unused, first + i) for i in range(24)]
        )
        for first in range(8)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(120)
    wait_until(lambda: open_connections(unused) == 0)
    unused.wait_idle()
    assert not unused.serving.running and not unused.serving.reading
    assert unused.serving.encoding == 0
    now = unused.engine.snapshot()
    assert (now.busy_slots, now.waiting, now.prefilling, now.staged) == (0, 0, 0, 0)
    wait_until(lambda: count_files() <= files)
    assert threading.active_count() <= threads + 2  # those that encode prompts
    assert parse(unused.raw(post_bytes(COMPLETIONS, BODY)))[0] == 200
