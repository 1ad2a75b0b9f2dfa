"""The process `ladder-jax serve`: its start, signals, failures and logs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import types
from unittest import mock

import helpers
import httpx2
import openai
import pytest
import served
import tiny
from served import wait_until

from ladder_jax import cli
from ladder_jax.config import ConfigError
from ladder_jax.serve.engine import Engine
from ladder_jax.server import command, draining, startup
from ladder_jax.server.logs import LogWriter

SMALL = ["--slots", "2", "--staging", "1", "--max-length", "64", "--no-fit-shapes"]
SMALL += ["--prefill-budget", "16", "--max-logprobs", "1"]
FOREVER = dict(prompt="x", max_tokens=60, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny-model"
    folder.mkdir()
    tiny.write_run(folder)
    return folder


@contextlib.contextmanager
def process(checkpoint, *options):
    """(the process, its URL): waits until the port is open."""
    port = helpers.free_address().rpartition(":")[2]
    child = subprocess.Popen(
        [*helpers.COMMAND, "serve", str(checkpoint), "--port", port, *SMALL, *options],
        env=helpers.code_environment()
        | {"LADDER_JAX_API_KEYS": "secret", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: child.poll() is not None or status_of(url, "/health"), 200)
        assert child.poll() is None, child.communicate()
        yield child, url
    finally:
        child.kill()
        child.communicate()


def wait(child):
    """The exit status; if it does not end, where its threads are."""
    try:
        return child.wait(60)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)
        raise AssertionError(child.communicate()[1]) from None


def counters(url):
    return httpx2.get(f"{url}/state").json()["counters"]


def status_of(url, path):
    try:
        return httpx2.get(url + path, timeout=5).status_code
    except httpx2.TransportError:
        return None


def test_a_server_from_start_to_end(checkpoint, tmp_path):
    """SIGTERM while many requests wait: all of them are answered, and it exits with 0.

    The disk of its log is full.
    """
    with process(checkpoint, "--log-file", "/dev/full") as (child, url):
        wait_until(lambda: status_of(url, "/ready") == 200, 300)
        assert child.stdout.readline() == f"serving tiny-model at {url}\n"
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert [card.id for card in client.models.list()] == ["tiny-model"]
            message = dict(role="user", content="Hi")
            answer = client.chat.completions.create(
                model="tiny-model", messages=[message], max_tokens=5
            )
            assert answer.usage.completion_tokens <= 5
        bodies = [FOREVER | dict(stream=bool(i % 2), n=50) for i in range(8)]
        answers = []

        def ask(body):
            headers = {"Authorization": "Bearer secret"}
            post = f"{url}/v1/completions"
            answers.append(httpx2.post(post, json=body, headers=headers, timeout=100))

        threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        wait_until(lambda: counters(url)["submitted"] == 1 + 8 * 50, 60)
        assert counters(url)["finished"] < 300
        child.send_signal(signal.SIGTERM)
        assert wait(child) == 0
        for thread in threads:
            thread.join(10)
        assert [answer.status_code for answer in answers] == [200] * 8
        for answer in answers:
            if "event-stream" in answer.headers["content-type"]:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.json()["usage"]["completion_tokens"] == 50 * 60
        assert status_of(url, "/health") is None


def test_a_second_signal_ends_the_process_at_once(checkpoint, tmp_path):
    """Also while the programs are compiled. Until then, it answers for drain_delay."""
    log = tmp_path / "log.jsonl"
    options = ["--drain-delay", "100", "--log-file", str(log)]
    with process(checkpoint, *options) as (child, url):
        assert status_of(url, "/ready") == 503
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx2.get(f"{url}/ready").json()["status"] == "draining")
        assert status_of(url, "/health") == 200
        child.send_signal(signal.SIGTERM)
        assert wait(child) == 128 + signal.SIGTERM
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["signal"] for line in lines if line["event"] == "draining"]


def test_a_terminal_that_closes_stops_the_server(checkpoint):
    """It may send several SIGHUP: none of them ends the process at once."""
    with process(checkpoint) as (child, url):
        for _ in range(3):
            child.send_signal(signal.SIGHUP)
        assert wait(child) == 0


def test_stderr_has_no_line_twice(checkpoint, tmp_path):
    """Importing Orbax makes Python's logging write to stderr."""
    log = tmp_path / "log.jsonl"
    with process(checkpoint, "--log-file", str(log)) as (child, url):
        with contextlib.closing(socket.create_connection(address_of(url))) as stranger:
            stranger.sendall(b"nonsense\r\n\r\n")
            assert stranger.recv(4096).startswith(b"HTTP/1.1 400")
        child.send_signal(signal.SIGTERM)
        assert wait(child) == 0
        err = child.stderr.read()
    assert "Invalid HTTP request" in log.read_text()
    assert "Invalid HTTP request" not in err and "uvicorn" not in err


def address_of(url):
    """(host, port) of a URL."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def interrupt_while_it_starts(checkpoint, seconds):
    """Ctrl-C after so many seconds: one line, or an orderly end if it serves then."""
    port = helpers.free_address().rpartition(":")[2]
    child = subprocess.Popen(
        [*helpers.COMMAND, "serve", str(checkpoint), "--port", port, *SMALL],
        env=helpers.code_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    try:
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode in (0, 130, -signal.SIGINT), (seconds, err)
    assert "Traceback" not in err and "Error" not in err, (seconds, err)
    if child.returncode == 130:
        assert err.endswith("ladder-jax serve: interrupted\n")


def test_ctrl_c_while_the_server_starts(checkpoint):
    interrupt_while_it_starts(checkpoint, 2.0)


@pytest.mark.slow
def test_ctrl_c_at_many_moments_of_the_start(checkpoint):
    """Imports, checks, compilation: some libraries lose an interrupt."""
    for i in range(30):
        interrupt_while_it_starts(checkpoint, 0.5 + i * 0.15)


# ---------------------------------------------------------------- in this process


@contextlib.contextmanager
def server(cancel_after=1, **options):
    """A command.Server around the shared engine, in a thread of its own.

    cancel_after: seconds after which uvicorn ends the requests that are left.
    """
    options = dict(drain_delay=0.0, drain_timeout=20.0) | options
    made = []

    class Recorded(draining.Server):
        def __init__(self, config, serving, *_):
            config.timeout_graceful_shutdown = cancel_after
            super().__init__(config, serving, **options)
            made.append(self)

    with (
        mock.patch.object(
            served.uvicorn,
            "Server",
            lambda config: Recorded(config, config.app.state.serving),
        ),
        served.serve(served.shared_engine()) as running,
    ):
        running.server = made[0]
        yield running


def stop(running):
    running.server._stop(signal.SIGTERM, None)


def start_posts(running, count, **fields):
    """Starts requests; returns their answers, in a list that grows."""
    answers = []

    def ask():
        answers.append(running.post("/v1/completions", FOREVER | fields))

    for _ in range(count):
        threading.Thread(target=ask).start()
    return answers


def test_a_server_that_drains_answers_what_it_has():
    with server(cancel_after=60, drain_timeout=60.0) as running:
        with running.engine._stepping:
            answers = start_posts(running, 3)
            wait_until(lambda: running.engine.waiting == 3)
            stop(running)
            wait_until(lambda: not running.server.servers[0].is_serving())
        wait_until(lambda: len(answers) == 3)
        assert [answer.status_code for answer in answers] == [200] * 3


def test_requests_that_do_not_finish_in_time_get_an_error():
    with server(drain_timeout=0.3) as running, running.engine._stepping:
        answers = start_posts(running, 1)
        wait_until(lambda: running.engine.waiting == 1)
        stop(running)
        wait_until(lambda: len(answers) == 1)
        assert answers[0].status_code == 503
        assert "stops" in answers[0].json()["error"]["message"]


def test_a_load_balancer_hears_of_the_end_before_it_comes():
    with server(drain_delay=1000.0) as running:
        stop(running)
        wait_until(lambda: running.serving.lifecycle.status == "draining")
        assert running.http.get("/ready").status_code == 503
        assert running.http.get("/health").status_code == 200
        assert running.post("/v1/completions", FOREVER).status_code == 200
        running.server._exit_at = time.monotonic()
        wait_until(lambda: status_of(running.url, "/health") is None)


def test_a_server_whose_engine_has_ended_ends_with_its_reason():
    with server() as running:
        with running.engine._stepping:
            answers = start_posts(running, 1)
            wait_until(lambda: running.engine.waiting == 1)
            broken = RuntimeError("no device\nanymore")
            with mock.patch.object(Engine, "failed", broken):
                wait_until(lambda: running.serving.lifecycle.status == "failed")
                [request] = running.engine._queue
                request.put(finish="error", error=broken)
                running.engine._queue.remove(request)
                wait_until(lambda: len(answers) == 1)
        assert answers[0].status_code == 500
        detail = "the engine has ended by an error: no device anymore"
        assert running.serving.lifecycle.detail == detail
        wait_until(lambda: status_of(running.url, "/health") is None)


# ---------------------------------------------------------------- arguments, logs


def test_mistakes_in_the_arguments_are_one_line(tmp_path, capsys):
    with contextlib.closing(command.bind("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        empty = helpers.write_files(tmp_path, {"empty": "# a comment\n"}) / "empty"
        for options, words in {
            ("--port", str(port)): "in use",
            ("--port", "70000"): "65535",
            ("--host", "300.1.2.3"): "300.1.2.3",
            ("--request-timeout", "0"): "request_timeout=0",
            ("--request-timeout", "inf"): "request_timeout=inf",
            ("--drain-timeout", "nan"): "drain_timeout=nan",
            ("--drain-delay", "1e300"): "drain_delay=1e+300",
            ("--max-body", "much"): "max_body='much'",
            ("--max-body", "0"): "max_body='0'",
            ("--cors-origins", "example.com"): "cors_origins='example.com'",
            ("--cors-origins", "https://a.example/"): "cors_origins='https://a.ex",
            ("--api-key-file", "/nowhere"): "/nowhere",
            ("--api-key-file", str(empty)): "no key",
            ("--log-file", "/nowhere/log"): "/nowhere/log",
            ("--max-prompt-tokens", "0"): "max_prompt_tokens=0",
        }.items():
            assert cli.run(["serve", "runs/x", *options]) == 2, options
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and words in error, error
    assert cli.run(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "nothing does not exist" in capsys.readouterr().err


def test_keys_come_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# comment\n one \n\ntwo\n")
    monkeypatch.setenv("LADDER_JAX_API_KEYS", "three,, one")
    arguments = command.Arguments(startup.Arguments("runs/x/"), api_key_file=str(file))
    assert arguments.options().api_keys == ("three", "one", "two")
    assert arguments.options().model_name == "x"
    file.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")  # of an editor of Windows
    assert arguments.options().api_keys == ("three", "one", "first", "second")
    for key in ("s\u00e9cret", "a\tb"):
        file.write_text(f"# comment\nfirst\n{key}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="key . is not accepted") as error:
            arguments.options()
        assert key not in str(error.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text"):
        arguments.options()


def test_an_address_of_ipv6_is_in_brackets():
    try:
        bound = command.bind("::1", 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(bound):
        front = types.SimpleNamespace(socket=bound)
        port = bound.getsockname()[1]
        assert command.Front.url.fget(front) == f"http://[::1]:{port}"
        bound.listen()
        socket.create_connection(("::1", port), timeout=5).close()


def test_a_log_that_cannot_be_written_never_waits(tmp_path):
    """Its queue is full: a pipe that nobody reads."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = LogWriter(str(pipe))
    started = time.monotonic()
    for i in range(30_000):
        writer.write("x" * 100, number=i)
    assert time.monotonic() - started < 20
    text = b""
    while b"dropped_lines" not in text:
        with contextlib.suppress(BlockingIOError):
            text += os.read(reader, 2**20)
        writer.write("y")
    os.close(reader)
    for line in text.decode().splitlines()[:100]:
        assert json.loads(line)["event"]


def test_prompts_are_in_the_log_if_they_are_asked_for():
    with served.serve(served.shared_engine(), log_prompts=True) as running:
        running.post("/v1/completions", dict(prompt="a text", max_tokens=2))
        line = running.log.last("/v1/completions")
        assert line["prompts"] == ["a text"] and len(line["outputs"]) == 1
        assert line["prompt_tokens"] == 7 and line["status"] == 200
        assert line["first_token_seconds"] > line["queue_seconds"] >= 0
