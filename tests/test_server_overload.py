"""A server that gets several times the work that it can do.

Clients, server and engine share this process, so its figures are low: `ladder-jax bench
serve` measures.

python -m pytest -m slow tests/test_server_overload.py -s
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import served
from httpx2 import AsyncClient

from ladder_jax.data.tokenizer import ByteTokenizer

SECONDS = 20.0
PROMPTS = [f"prompt number {i}" for i in range(24)]
TOKENS = 100
CLIENT = """
import socket, sys, time
for _ in range(12):
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    connection.sendall(sys.argv[2].encode().replace(b"|", b"\\r\\n"))
    globals().setdefault("open", []).append(connection)
print("sent", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine()) as running:
        yield running


@pytest.fixture(scope="module")
def texts(server):
    """What the engine itself answers."""
    requests = [
        server.engine.submit(
            ByteTokenizer().prompt(prompt), max_tokens=TOKENS, stop_token_ids=()
        )
        for prompt in PROMPTS
    ]
    return [request.result().text for request in requests]


async def load(server, texts, clients, seconds):
    """Clients that ask one request after the other, and come back if they are refused.

    Returns (tokens a second, requests that were refused).
    """
    tokens = refused = 0
    numbers = random.Random(0)
    end = time.perf_counter() + seconds

    async def run(client, number):
        nonlocal tokens, refused
        while time.perf_counter() < end:
            number = (number + 7) % len(PROMPTS)
            body = dict(prompt=PROMPTS[number], max_tokens=TOKENS, ignore_eos=True)
            body |= dict(temperature=0)
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 429:
                refused += 1
                assert int(response.headers["retry-after"]) >= 1
                # Earlier than it was told: else the requests here are so short that
                # the queue would be empty then.
                await asyncio.sleep(numbers.uniform(0.1, 0.5))
                continue
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["text"] == texts[number]
            if time.perf_counter() < end:
                tokens += TOKENS

    async with AsyncClient(base_url=server.url, timeout=120) as client:
        started = time.perf_counter()
        await asyncio.gather(*(run(client, number) for number in range(clients)))
    return tokens / (end - started), refused


@pytest.mark.slow
def test_what_is_accepted_under_overload_is_exact(server, texts):
    with served.small_queue(server.engine, 8):
        peak, none = asyncio.run(load(server, texts, 10, SECONDS / 2))
        rate, refused = asyncio.run(load(server, texts, 60, SECONDS))
    print(f"\n{peak:.0f} tokens/s with 10 clients, {rate:.0f} with 60;", end=" ")
    print(f"{none} and {refused} requests refused")
    assert refused > 10 * none + 20 and rate > 0
    server.wait_idle()


@pytest.mark.slow
def test_clients_that_are_killed_leave_nothing(server):
    body = '{"prompt": "x", "max_tokens": 120, "ignore_eos": true, "stream": true}'
    request = (
        "POST /v1/completions HTTP/1.1|Host: x|Content-Type: application/json|"
        f"Content-Length: {len(body)}||{body}"
    )
    command = [sys.executable, "-c", CLIENT, str(server.address[1]), request]
    with server.engine._stepping:
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"sent\n"
        served.wait_until(lambda: server.engine.waiting >= 8)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        served.wait_until(lambda: server.engine.waiting == 0)
    server.wait_idle()
    assert not server.serving.running
