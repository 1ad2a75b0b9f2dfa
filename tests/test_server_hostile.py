"""Clients that send nonsense, too much, too slowly, or go away."""

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
from served import LENGTH, post_bytes, read_all, small_queue, wait_until

from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.server import connections, streaming

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FOREVER = dict(prompt="x", max_tokens=120, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine(), max_body=100_000) as running:
        yield running


def check_error(response, status, param=None, word=""):
    """The response is an error in OpenAI's format, about the field `param`."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    message = body["error"]["message"]
    assert word in message and "\n" not in message and 0 < len(message) <= 500


# ---------------------------------------------------------------- values

MESSAGES = [dict(role="user", content="x")]
# Fields of a body that are not accepted, the field that the error names, and a word of
# the message.
BAD_COMPLETIONS = [
    (dict(prompt=None), "prompt", ""),
    (dict(prompt=[]), "prompt", ""),
    (dict(prompt=[[]]), "prompt", ""),
    (dict(prompt=[[1], []]), "prompt", ""),
    (dict(prompt=[1.5]), "prompt", ""),
    (dict(prompt=["a", 1]), "prompt", ""),
    (dict(prompt=[[1], "a"]), "prompt", ""),
    (dict(prompt=[True]), "prompt", ""),
    (dict(prompt=[-1]), "prompt", ""),
    (dict(prompt=[259]), "prompt", "258"),
    (dict(prompt=[10**30]), "prompt", ""),
    (dict(prompt={"a": 1}), "prompt", ""),
    (dict(prompt="x" * 3 * LENGTH), "prompt", "tokens"),
    (dict(prompt="x" * 90_000), "prompt", "tokens"),
    (dict(prompt=[5] * LENGTH), "prompt", "tokens"),
    (dict(prompt=[1.5] * 20_000), "prompt", ""),
    (dict(prompt=["x"] * 129), "prompt", "128"),
    (dict(prompt=["x"] * 2, n=65), "n", "128"),
    (dict(n=0), "n", ""),
    (dict(n=-1), "n", ""),
    (dict(n=10**9), "n", ""),
    (dict(n=1.5), "n", ""),
    (dict(n="2"), "n", ""),
    (dict(best_of=1, n=2), "best_of", "n=2"),
    (dict(best_of=2, stream=True), "best_of", "stream"),
    (dict(max_tokens=-1), "max_tokens", ""),
    (dict(max_tokens=0), "max_tokens", "from 1 to"),
    (dict(min_tokens=2), "min_tokens", "max_tokens=1"),
    (dict(min_tokens=-1), "min_tokens", ""),
    (dict(echo=True, logprobs=4), "logprobs", "3"),
    (dict(max_tokens=True), "max_tokens", ""),
    (dict(max_tokens=10**20), "max_tokens", ""),
    (dict(max_tokens=LENGTH), "max_tokens", "126"),
    (dict(temperature=-0.1), "temperature", ""),
    (dict(temperature=1e-30), "temperature", "1e-6"),
    (dict(temperature="hot"), "temperature", ""),
    (dict(temperature=1e300), "temperature", ""),
    (dict(top_p=0), "top_p", ""),
    (dict(top_p=1.1), "top_p", ""),
    (dict(top_k=-2), "top_k", ""),
    (dict(min_p=1), "min_p", ""),
    (dict(presence_penalty=2.1), "presence_penalty", ""),
    (dict(frequency_penalty=-3), "frequency_penalty", ""),
    (dict(repetition_penalty=0), "repetition_penalty", ""),
    (dict(seed=1.5), "seed", ""),
    (dict(seed=2**64), "seed", ""),
    (dict(stop=""), "stop", ""),
    (dict(stop=["a", ""]), "stop", ""),
    (dict(stop=[1]), "stop", ""),
    (dict(stop="x" * 1000), "stop", "256"),
    (dict(stop=["x"] * 17), "stop", "16"),
    (dict(stop_token_ids=[-1]), "stop_token_ids", ""),
    (dict(stop_token_ids=[259]), "stop_token_ids", "258"),
    (dict(stop_token_ids=list(range(9))), "stop_token_ids", "8"),
    (dict(logprobs=4), "logprobs", "3"),
    (dict(logprobs=-1), "logprobs", ""),
    (dict(logprobs=True), "logprobs", ""),
    (dict(logit_bias={"x": 1}), "logit_bias", ""),
    (dict(logit_bias={"-1": 1}), "logit_bias", ""),
    (dict(logit_bias={"259": 1}), "logit_bias", "258"),
    (dict(logit_bias={"1": 101}), "logit_bias", ""),
    (dict(logit_bias={str(i): 1 for i in range(9)}), "logit_bias", "8"),
    (dict(logit_bias={"1": 1, "01": 1}), "logit_bias", "twice"),
    (dict(priority=1001), "priority", ""),
    (dict(stream="yes"), "stream", ""),
    (dict(stream_options=dict(include_usage=True)), "stream_options", "stream=true"),
    (dict(stream=True, stream_options=dict(x=1)), "stream_options.x", "unknown"),
    (dict(response_format=dict(type="json_object")), "response_format", "text"),
    (
        dict(response_format=dict(type="json_schema", json_schema={})),
        "response_format",
        "json_schema",
    ),
    (dict(suffix="after"), "suffix", ""),
    (dict(grammar="x"), "grammar", "unknown"),
    (dict(user=5), "user", ""),
    (dict(echo="yes"), "echo", ""),
]


@pytest.mark.parametrize(
    "fields, param, word", BAD_COMPLETIONS, ids=lambda value: str(value)[:40]
)
def test_a_field_of_completions_that_is_not_accepted(server, fields, param, word):
    body = dict(prompt="x", max_tokens=1) | fields
    check_error(server.post(COMPLETIONS, body), 400, param, word)
    server.wait_idle()


BAD_CHATS = [
    (dict(messages=None), "messages", ""),
    (dict(messages=[]), "messages", ""),
    (dict(messages="x"), "messages", ""),
    (dict(messages=["x"]), "messages", ""),
    (dict(messages=[dict(role="user")]), "messages", "content"),
    (dict(messages=[dict(content="x")]), "messages", "role"),
    (dict(messages=[dict(role="king", content="x")]), "messages", "king"),
    (dict(messages=[dict(role="tool", content="x")]), "messages", "tool"),
    (dict(messages=[dict(role="user", content=5)]), "messages", "content"),
    (dict(messages=[dict(role="user", content="x", age=5)]), "messages[0].age", ""),
    (
        dict(messages=[dict(role="user", content=[dict(type="image_url")])]),
        "messages",
        "image_url",
    ),
    (dict(messages=[dict(role="user", content="x" * 5000)]), "messages", "tokens"),
    (dict(logprobs=3), "logprobs", ""),
    (dict(top_logprobs=3), "top_logprobs", "logprobs=true"),
    (dict(logprobs=True, top_logprobs=21), "top_logprobs", "3"),
    (
        dict(max_completion_tokens=1000, max_tokens=None),
        "max_completion_tokens",
        "max_completion_tokens=1000",
    ),
    (dict(max_completion_tokens=2, max_tokens=3), "max_tokens", ""),
    (dict(tools=[dict(type="function")]), "tools", ""),
    (dict(tool_choice="required"), "tool_choice", ""),
    (dict(modalities=["audio"]), "modalities", ""),
    (dict(prompt="x"), "prompt", "unknown"),
]


@pytest.mark.parametrize(
    "fields, param, word", BAD_CHATS, ids=lambda value: str(value)[:40]
)
def test_a_field_of_chat_that_is_not_accepted(server, fields, param, word):
    body = dict(messages=MESSAGES, max_tokens=1) | fields
    check_error(server.post(CHAT, body), 400, param, word)


def test_null_is_the_same_as_no_value(server):
    from ladder_jax.server.protocol import ChatRequest, CompletionRequest

    for path, cls, own in (
        (COMPLETIONS, CompletionRequest, dict(prompt="x")),
        (CHAT, ChatRequest, dict(messages=MESSAGES)),
    ):
        body = dict.fromkeys(cls.model_fields) | own
        assert server.post(path, body).status_code == 200


BAD_BODIES = [
    b"",
    b" ",
    b"null",
    b"5",
    b"[]",
    b'"x"',
    b"{",
    b'{"prompt": "x"',
    b'{"prompt": "x"}}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "logit_bias": {"5": NaN}}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a\x00b"}',
    b'{"\xff": 1}',
    b"[" * 50_000,
    b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    b'{"prompt": "x", "metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
    b'{"prompt": "x", "seed": ' + b"9" * 50_000 + b"}",
    b"\x1f\x8b\x08\x00 gzip",
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:30]))
def test_a_body_that_is_not_accepted(server, body):
    headers = {"Content-Type": "application/json"}
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        response = server.http.post(path, content=body, headers=headers)
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["message"]


def test_a_control_character_in_a_prompt_is_text(server):
    response = server.post(COMPLETIONS, dict(prompt="a\x00\x1b\u2028😀", max_tokens=1))
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens"] == 1 + 3 + 3 + 4


def test_another_content_type_is_refused(server):
    """A form of another web page can send these without asking the server first."""
    body = json.dumps(dict(prompt="x")).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind}
        response = server.http.post(COMPLETIONS, content=body, headers=headers)
        check_error(response, 415, None, "application/json")


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    head = post_bytes(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 99999999999")
    started = time.monotonic()
    assert server.raw(head).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - started < 25
    assert server.raw(head.replace(b"99999999999", b"1" * 30)).startswith(b"HTTP/1.1 4")

    def pieces():
        for _ in range(100):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    with contextlib.suppress(Exception):  # the server may close while we still write
        response = server.http.post(COMPLETIONS, content=pieces(), headers=headers)
        check_error(response, 413)
    assert server.http.get("/health").status_code == 200


def test_paths_and_methods_that_there_are_not(server):
    check_error(server.http.get("/v1/nothing"), 404, None, "/v1/nothing")
    check_error(server.http.get(COMPLETIONS), 405, None, "GET")
    check_error(server.http.delete("/health"), 405)
    assert server.http.get("/v1/" + "x" * 5000).status_code == 404
    check_error(server.http.get("/health/"), 404)
    assert server.raw(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.raw(b"GET / HTTP/9.9\r\n\r\n").startswith(b"HTTP/1.1 400")
    for path, host in (
        (b"/\xff", b"x"),
        (b"/%ff%00", b"x"),
        (b"/x", b"["),
        (b"/", b""),
    ):
        head = b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"
        status = server.raw(head % (path, host)).split(b" ")[1]
        assert status in (b"200", b"400", b"404"), (path, host)
    assert server.http.get("/health").status_code == 200


# ---------------------------------------------------------------- injection

TEMPLATES = [
    "{{ 7 * 7 }}",
    "{% for i in range(9) %}x{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{% generation %}x{% endgeneration %}",
    "{# comment #}",
]


@pytest.mark.parametrize("content", TEMPLATES)
def test_a_template_in_a_message_is_text(server, content):
    messages = [dict(role="user", content=content, name=content)]
    ids = server.post("/tokenize", dict(messages=messages)).json()["tokens"]
    text = f"### user\n{content}\n\n### assistant\n"
    assert ids == ByteTokenizer().prompt(text)


def test_the_request_id_comes_back_unless_it_is_strange(server):
    def id_of(value):
        body = json.dumps(dict(prompt="x", max_tokens=1)).encode()
        answer = server.raw(post_bytes(COMPLETIONS, body, f"X-Request-Id: {value}"))
        head = answer.partition(b"\r\n\r\n")[0].decode("latin-1")
        lines = [line.partition(": ") for line in head.split("\r\n")[1:]]
        ids = [text for name, _, text in lines if name.lower() == "x-request-id"]
        assert len(ids) == 1 and "injected" not in head
        return ids[0]

    assert id_of("abc-1.2_3") == "abc-1.2_3"
    assert server.log.last(COMPLETIONS)["id"] == "abc-1.2_3"
    for strange in ("a b", "ä", "a\tb", "x" * 129, "", "a;injected=1", "<b>"):
        assert id_of(strange) != strange
        assert len(id_of(strange)) == 32
    smuggled = server.raw(
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"X-Request-Id: a\rinjected: b\r\n\r\n"
    )
    assert b"injected" not in smuggled


def test_the_log_has_no_text_of_a_prompt_or_an_output(server):
    secret = "a-secret-word"
    for path, body in (
        (COMPLETIONS, dict(prompt=secret, max_tokens=2)),
        (COMPLETIONS, dict(prompt=secret, max_tokens=2, nonsense=secret)),
        (CHAT, dict(messages=[dict(role="user", content=secret)], max_tokens=2)),
        ("/tokenize", dict(prompt=secret)),
    ):
        server.post(path, body)
        assert server.log.last(path)["status"] in (200, 400)
    assert secret not in json.dumps(server.log.lines)


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


# ---------------------------------------------------------------- keys


def test_keys_guard_everything_that_reads_or_writes_text():
    keys = ("first-key", "sécond")
    with served.serve(served.shared_engine(), api_keys=keys) as guarded:
        for path in ("/health", "/ready", "/metrics", "/", "/state", "/openapi.json"):
            assert guarded.http.get(path).status_code == 200
        guarded_paths = [
            ("GET", "/v1/models"),
            ("GET", "/tokenizer_info"),
            ("POST", COMPLETIONS),
            ("POST", CHAT),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/nothing"),
        ]
        for method, path in guarded_paths:
            for wrong in (None, "Bearer", "Bearer first-ke", "Basic first-key", "x"):
                headers = {} if wrong is None else {"Authorization": wrong}
                response = guarded.http.request(method, path, headers=headers)
                check_error(response, 401, None, "API key")
                assert response.headers["www-authenticate"] == "Bearer"
        for key in keys:
            headers = {b"Authorization": b"Bearer " + key.encode("utf-8")}
            if key.isascii():
                response = guarded.http.get("/v1/models", headers=headers)
                assert response.status_code == 200
        with pytest.raises(Exception, match="401"):
            guarded.openai.models.list()


def test_web_pages_of_other_origins_may_not_read_unless_they_are_named(server):
    origin = {"Origin": "https://page.example"}
    response = server.http.get("/v1/models", headers=origin)
    assert "access-control-allow-origin" not in response.headers
    preflight = origin | {"Access-Control-Request-Method": "POST"}
    response = server.http.options(COMPLETIONS, headers=preflight)
    assert response.status_code == 405
    origins = ("https://page.example",)
    with served.serve(served.shared_engine(), cors_origins=origins) as other:
        response = other.http.get("/v1/models", headers=origin)
        assert response.headers["access-control-allow-origin"] == origins[0]
        stranger = {"Origin": "https://stranger.example"}
        response = other.http.get("/v1/models", headers=stranger)
        assert "access-control-allow-origin" not in response.headers
