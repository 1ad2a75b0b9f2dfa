"""Processes wait for each other, say for whom, and give up in time."""

import contextlib
import socket
import threading
import time

import helpers
import pytest

from ladder_jax.config import ConfigError
from ladder_jax.hardware import roll_call


@pytest.fixture
def soon(monkeypatch):
    """Lines about missing processes come after tenths of a second."""
    monkeypatch.setattr(roll_call, "FIRST", 0.3)
    monkeypatch.setattr(roll_call, "EVERY", 0.5)


class Processes:
    """Processes that are threads. `said`, `ended`: by number."""

    def __init__(self, count, timeout=20):
        self.count, self.timeout = count, timeout
        self.coordinator = helpers.free_address()
        self.said, self.ended, self.threads = {}, {}, []

    def start(self, number, processes=None, versions=("jax 1",)):
        said = self.said.setdefault(number, [])

        def run():
            try:
                processes_ = processes or self.count
                args = self.coordinator, processes_, number, self.timeout, said.append
                roll_call.wait(*args, versions)
                self.ended[number] = "all there"
            except (ConfigError, roll_call.Missing) as error:
                self.ended[number] = f"{type(error).__name__}: {error}"

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def join(self):
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.ended


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_all_go_on_once_the_last_has_started(soon, order):
    run = Processes(3)
    for number in order[:-1]:
        run.start(number)
    time.sleep(1)
    assert not run.ended
    run.start(order[-1])
    assert run.join() == {number: "all there" for number in range(3)}
    late = order[-1]
    if late:
        # Each process that was there names the one that was not.
        for number in order[:-1]:
            first = run.said[number][0]
            assert first == "waiting for processes 2 of 3 (0 s; gives up after 20 s)"
    else:
        assert f"waiting for process 0 at {run.coordinator} (" in run.said[2][0]
    # The port is free again: JAX's coordinator opens it.
    port = int(run.coordinator.rpartition(":")[2])
    socket.create_server(("", port)).close()


def test_the_deadline_names_who_is_missing(soon):
    run = Processes(3, timeout=1.2)
    run.start(0)
    run.start(2)
    start = time.monotonic()
    ended = run.join()
    assert time.monotonic() - start < 15
    text = "processes 1 of 3 did not start within 1 s"
    assert ended == {0: f"Missing: {text}", 2: f"Missing: {text}"}
    assert len(run.said[0]) == 3  # after 0.3, 0.5 and 1 s

    alone = Processes(2, timeout=0.5)
    alone.start(1)
    text = f"process 0 at {alone.coordinator} did not start within 0 s"
    assert alone.join() == {1: f"Missing: {text}"}


def test_processes_that_do_not_fit_together_say_why():
    run = Processes(2)
    run.start(0)
    run.start(1, versions=("jax 2",))
    ended = run.join()
    text = "process 1 has jax 2, and process 0 has jax 1: all must have the same "
    assert ended[0] == ended[1] == f"ConfigError: {text}versions"

    run = Processes(3)
    run.start(0)
    run.start(1, processes=2)
    assert run.join()[0] == (
        "ConfigError: process 1 was started with processes=2, and process 0 with "
        "processes=3: both must be the same"
    )
    with pytest.raises(ConfigError, match="process=5 .* from 0 to 2"):
        roll_call.wait("localhost:1234", 3, 5, 1, print)
    for wrong in ("localhost", "localhost:", ":80", "localhost:http", "host:99999"):
        with pytest.raises(ConfigError, match="it must be HOST:PORT"):
            roll_call.wait(wrong, 2, 0, 1, print)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port} of coor"):
            roll_call.wait(f"localhost:{port}", 2, 0, 1, print)


def test_strangers_and_restarted_processes_are_no_problem():
    run = Processes(3)
    run.start(0)
    port = int(run.coordinator.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x"}\n', b""):
            while True:
                with contextlib.suppress(OSError):
                    other = socket.create_connection(("localhost", port))
                    break
            other.sendall(text)
            other.shutdown(socket.SHUT_WR)
            stack.enter_context(other)
        # A process that says its number, and dies.
        dead = socket.create_connection(("localhost", port))
        dead.sendall(b'{"process": 1, "processes": 3, "versions": ["jax 1"]}\n')
        dead.close()
        run.start(2)
        time.sleep(0.7)
        assert not run.ended  # process 1 has left again
        run.start(1)
        assert run.join() == {number: "all there" for number in range(3)}


def test_another_program_at_the_coordinators_address_is_named():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            client, _ = server.accept()
            client.recv(100)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConfigError, match="does not wait for processes: its run"):
            roll_call.wait(f"localhost:{port}", 2, 1, 5, print)
