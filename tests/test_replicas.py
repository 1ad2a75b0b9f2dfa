"""Two replicas of `ladder-jax serve` behind HAProxy, restarted and killed under load.

A minute: `pytest -m slow tests/test_replicas.py`.
"""

import collections
import http.client
import itertools
import json
import signal
import subprocess
import threading
import time
from typing import NamedTuple

import balancer as balancers
import helpers
import pytest
import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        balancers.executable() is None,
        reason="there is no haproxy: `make test-tools` installs it",
    ),
]
CLIENTS = 8  # of them, every second one streams
TOKENS = 60
START = 600  # seconds that a replica may take to start


class Replica:
    """A process of `ladder-jax serve` on one port, and its log over all starts."""

    def __init__(self, name, port, checkpoint, folder):
        self.name, self.port, self.log = name, port, folder / f"{name}.log"
        self.output = folder / f"{name}.out"
        options = {
            "--port": port,
            "--log-file": self.log,
            "--model-name": "tiny",
            "--compile-cache": folder / "compiled",
            "--drain-delay": 3,
            "--drain-timeout": 30,
            "--slots": 4,
            # Few programs, which compile fast.
            "--fit-shapes": "false",
            "--max-length": 128,
            "--prefill-budget": 32,
            "--max-logprobs": 0,
        }
        self.words = ["serve", checkpoint, *itertools.chain(*options.items())]
        self.start()

    def start(self):
        """Starts it; it loads the programs that one before it has compiled."""
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [*helpers.COMMAND, *map(str, self.words)],
                env=helpers.code_environment(),
                stdout=output,
                stderr=output,
            )

    def wait(self, balancer):
        """Waits until HAProxy sends it requests."""
        end = time.monotonic() + START
        while balancer.servers()[self.name]["status"] != "UP":
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.1)

    def lines(self):
        """What it logged about completions."""
        lines = map(json.loads, self.log.read_text().splitlines())
        return [line for line in lines if line.get("path") == "/v1/completions"]


class Outcome(NamedTuple):
    """What became of one request."""

    id: str
    began: float
    ended: float
    status: int | None  # None: no answer
    replica: str | None
    text: str | None  # None: the answer is not complete
    error: str

    @property
    def is_complete(self):
        return self.status == 200 and self.text is not None


class Load:
    """Clients that send one request after another until `stop`.

    name: what the ids of its requests begin with.
    """

    def __init__(self, port, name):
        self.port, self.name, self.outcomes = port, name, []
        self._stop = threading.Event()
        self._numbers = itertools.count()
        self._threads = [
            threading.Thread(target=self._run, args=(i % 2 == 0,))
            for i in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, stream):
        while not self._stop.is_set():
            id = f"{self.name}-{next(self._numbers)}"
            self.outcomes.append(self._send(id, stream))

    def _send(self, id, stream):
        began, status, replica, text, error = time.monotonic(), None, None, None, ""
        body = dict(
            model="tiny",
            prompt="Once upon a time",
            max_tokens=TOKENS,
            ignore_eos=True,
            temperature=0,
            stream=stream,
        )
        headers = {"Content-Type": "application/json", "X-Request-Id": id}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            status, replica = response.status, response.headers["X-Replica"]
            text = read_text(response, stream) if status == 200 else None
        except (OSError, http.client.HTTPException) as caught:
            error = repr(caught)
        finally:
            connection.close()
        ended = time.monotonic()
        return Outcome(id, began, ended, status, replica, text, error)


def read_text(response, stream):
    """The text of an answer, None if it is not complete."""
    data = response.read()
    if not stream:
        return json.loads(data)["choices"][0]["text"]
    *events, last, _ = data.decode().split("\n\n")
    if last != "data: [DONE]":
        return None
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(HAProxy, replica one, replica two), all ready."""
    folder = tmp_path_factory.mktemp("replicas")
    tiny.write_run(folder / "run")
    ports = balancers.free_ports(2)
    replicas = [
        Replica(name, port, folder / "run", folder)
        for name, port in zip(("one", "two"), ports)
    ]
    try:
        with balancers.balancing(folder, ports) as balancer:
            for replica in replicas:
                replica.wait(balancer)
            balancer.wait(one="UP", two="UP")
            yield balancer, *replicas
    finally:
        for replica in replicas:
            replica.process.kill()
            replica.process.wait()
            print(replica.output.read_text())


def check(outcomes, replicas):
    """Every complete answer is the same; no request was answered by two replicas."""
    complete = [outcome for outcome in outcomes if outcome.is_complete]
    assert len({outcome.text for outcome in complete}) == 1
    assert {outcome.replica for outcome in complete} == {"one", "two"}
    answers = collections.Counter(
        line["id"]
        for replica in replicas
        for line in replica.lines()
        if line["status"] == 200
    )
    assert max(answers.values()) == 1, "a request was answered twice"
    return complete


def test_a_rolling_restart_loses_nothing(parts):
    balancer, *replicas = parts
    load = Load(balancer.port, "restart")
    try:
        time.sleep(1)
        for replica in replicas:
            replica.process.send_signal(signal.SIGTERM)
            assert replica.process.wait(60) == 0
            balancer.wait(**{replica.name: "DOWN"})
            replica.start()
            replica.wait(balancer)
        time.sleep(1)
    finally:
        load.stop()
    complete = check(load.outcomes, replicas)
    lost = [outcome for outcome in load.outcomes if not outcome.is_complete]
    print(f"{len(complete)} requests answered, {len(lost)} lost")
    assert not lost
    logged = {line["id"] for replica in replicas for line in replica.lines()}
    assert {outcome.id for outcome in complete} <= logged


def test_a_killed_replica_costs_the_requests_that_it_worked_on(parts):
    balancer, one, two = parts
    retried = int(balancer.servers()["one"]["wredis"])
    load = Load(balancer.port, "kill")
    try:
        time.sleep(2)
        killed = time.monotonic()
        one.process.kill()
        one.process.wait()
        gone = time.monotonic()
        time.sleep(4)
        one.start()
        one.wait(balancer)
        time.sleep(1)
    finally:
        load.stop()
    complete = check(load.outcomes, [one, two])
    lost = [outcome for outcome in load.outcomes if not outcome.is_complete]
    print(f"{len(complete)} requests answered, {len(lost)} lost")
    assert len(lost) <= CLIENTS
    for outcome in lost:  # each was sent to it before it died, and ended by that
        assert outcome.began <= gone and outcome.ended >= killed, outcome
        assert outcome.status in (502, 200), outcome
    # Requests that HAProxy tried to send to the dead replica went to the other.
    retried = int(balancer.servers()["one"]["wredis"]) - retried
    print(f"{retried} sent to the other replica")
    assert retried
