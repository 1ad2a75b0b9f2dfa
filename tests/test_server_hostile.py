"""Clients that send nonsense, or what they may not."""

import contextlib
import json
import time

import pytest
import served
from served import LENGTH, check_error, post_bytes

from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.server import protocol

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FOREVER = dict(prompt="x", max_tokens=120, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine(), max_body=100_000) as running:
        yield running


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


# Values of every type, each of which some field does not accept.
ODD_VALUES = [
    *(None, True, 0, -1, 1.5, 10**30, -(10**30), 1e308, 2**63, -(2**63)),
    *("", "x", "x" * 1000, "\x00", [], [[]], [None], [1] * 3, [[1]], ["a"] * 1000),
    *([True], [1.5], [-1], [10**12], {}, {"a": 1}, {"1": 1e9}, {"99999": 1}),
]
BODIES = {
    COMPLETIONS: (protocol.CompletionRequest, dict(prompt="x", max_tokens=1)),
    CHAT: (protocol.ChatRequest, dict(messages=MESSAGES, max_tokens=1)),
    "/tokenize": (protocol.TokenizeRequest, dict(prompt="x")),
    "/detokenize": (protocol.DetokenizeRequest, dict(tokens=[1])),
}


@pytest.mark.parametrize("path", BODIES)
def test_every_field_with_values_of_every_type(server, path):
    """The answer is an output, or an error that names the field."""
    cls, own = BODIES[path]
    refused = dict.fromkeys(cls.model_fields, 0)
    for field in refused:
        for value in ODD_VALUES:
            response = server.post(path, own | {field: value})
            if response.status_code == 200:
                continue
            refused[field] += 1
            error = response.json()["error"]
            allowed = (400, 404) if field == "model" else (400,)
            assert response.status_code in allowed, (field, value, error)
            # Two fields that contradict each other: the error is about either.
            others = {"max_completion_tokens": "max_tokens", "messages": "prompt"}
            names = {field, others.get(field)}
            assert error["param"].partition(".")[0] in names, (field, value, error)
            assert "\n" not in error["message"] and len(error["message"]) <= 500
    assert all(refused.values()), refused
    server.wait_idle()


def test_of_a_field_that_is_there_twice_the_last_one_counts(server):
    """As in Python's json, and in OpenAI's server."""
    body = b'{"prompt": "abc", "max_tokens": "x", "max_tokens": 1, "prompt": "a"}'
    headers = {"Content-Type": "application/json"}
    response = server.http.post(COMPLETIONS, content=body, headers=headers)
    assert response.json()["usage"]["prompt_tokens"] == 2


def test_null_is_the_same_as_no_value(server):
    for path, (cls, own) in BODIES.items():
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
