"""The page at `/`, and how the state reaches any number of clients."""

import asyncio
import contextlib
import http.client
import json
import socket
import time

import pytest
from page_server import Source, application, serving, state_at

from ladder_jax.server import page
from ladder_jax.server.feed import Feed

FILES = page.load_files()


@pytest.fixture(scope="module")
def source():
    return Source()


@pytest.fixture(scope="module")
def port(source):
    with serving(application(source)) as port:
        yield port


def ask(port, path, method="GET", **headers):
    """Returns (status, headers, body) of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


# ---------------------------------------------------------------- files


def test_the_page_is_its_html(port):
    status, headers, body = ask(port, "/")
    assert status == 200 and body == FILES["index.html"].body
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    for name in set(FILES) - {"index.html", "icon.svg"}:
        used = any(name.encode() in file.body for file in FILES.values())
        assert used, f"no file of the page uses {name}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_has_the_policy_and_its_type(port, name):
    path, file = f"/static/{name}", FILES[name]
    status, headers, body = ask(port, path)
    assert (status, body) == (200, file.body)
    assert headers["Content-Type"] == page.TYPES[name.rpartition(".")[2]]
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert ask(port, path, **{"If-None-Match": file.tag})[::2] == (304, b"")
    status, headers, body = ask(port, path, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(file.body)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_names_no_other_server_and_has_no_script_inline(name):
    text = FILES[name].body.decode()
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    for word in ("http:", "https:", "innerHTML", "eval(", " style=", "<script>"):
        assert word not in text


@pytest.mark.parametrize("name", ["", "../page.py", "%2e%2e/page.py", "none.js"])
def test_no_other_file_is_served(port, name):
    assert ask(port, f"/static/{name}")[0] == 404


# ---------------------------------------------------------------- state


def test_state_is_the_newest_as_json(port, source):
    status, headers, body = ask(port, "/state")
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    sent = json.loads(body)
    assert sent == state_at(sent["time"])
    assert 0 <= time.monotonic() - sent["time"] < 10


def test_state_streams_for_who_asks_for_events(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/state", headers={"Accept": "text/event-stream"})
        response = connection.getresponse()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [response.readline() for _ in range(6)]
    assert lines[1::2] == [b"\n"] * 3
    states = [json.loads(line.removeprefix(b"data: ")) for line in lines[::2]]
    for state in states:
        assert state == state_at(state["time"])


async def states_of(feed, seconds):
    """Returns the states that one client gets in so many seconds."""
    states = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for event in feed.watch():
                assert event.endswith(b"\n\n")
                states.append(json.loads(event.removeprefix(b"data: ")))
    return states


def test_a_hundred_clients_cost_as_one():
    source = Source()
    feed = Feed(source)

    async def run():
        return await asyncio.gather(*(states_of(feed, 2.1) for _ in range(100)))

    clients = asyncio.run(run())
    assert source.taken <= 11  # five a second, and the first
    for states in clients:
        times = [state["time"] for state in states]
        assert times == sorted(set(times)), "a client got a state twice"
        assert len(times) >= source.taken - 2


def test_nothing_is_taken_while_nobody_watches():
    source = Source()
    feed = Feed(source)
    asyncio.run(states_of(feed, 0.3))
    taken = source.taken
    time.sleep(0.5)
    assert source.taken == taken


@pytest.mark.parametrize("status", ["draining", "failed"])
def test_a_stream_ends_when_the_server_does(status):
    """An open one would keep the server from ending."""
    source = Source()
    source.changed = dict(status=status)
    states = asyncio.run(states_of(Feed(source), 5))
    assert [state["status"] for state in states] == [status]


def test_a_slow_source_does_not_hold_the_event_loop():
    def slow():
        time.sleep(0.3)
        return state_at(0)

    async def run():
        task = asyncio.create_task(Feed(slow).newest())
        waits = 0
        while not task.done():
            await asyncio.sleep(0.01)
            waits += 1
        return waits

    assert asyncio.run(run()) > 10


def test_clients_that_do_not_read_stall_nobody(port, source):
    request = b"GET /state HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
    source.slots = 4096  # 400 KB a state
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                client = socket.create_connection(("127.0.0.1", port))
                stack.enter_context(client).sendall(request)
            time.sleep(1)
            began = time.monotonic()
            assert ask(port, "/state")[0] == 200
            assert time.monotonic() - began < 10
    finally:
        source.slots = 8
