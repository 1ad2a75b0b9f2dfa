"""Waits until all processes of a run have started, and says which have not.

`jax.distributed.initialize` waits too, but silently, and it aborts the process when its
time is over. So process 0 first listens on the coordinator's port itself. Every other
process connects and says its number. Once all have, process 0 closes the port, and
JAX's coordinator opens it.

Each message is one line of JSON. Process to process 0: {"process", "processes",
"versions"}. Process 0 to the others: {"missing": [...]}, {"error": text} (a mistake),
{"late": text} (the time is over) or {"go": 1}.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ladder_jax.config import ConfigError, require

Say = Callable[[str], None]
# Seconds between two lines about missing processes, after a first one.
EVERY = 10.0
FIRST = 2.0
LONGEST_LINE = 4096  # bytes
# Seconds for a process that has connected to say its number.
PATIENCE = 2.0
RETRY = 75  # the exit status that asks a scheduler to try again (EX_TEMPFAIL)


class Missing(RuntimeError):
    """Other processes of the run did not come: another start may help (status 75)."""


class Waiting:
    """Says every few seconds for what this process waits, and until when."""

    def __init__(self, timeout: float, say: Say) -> None:
        self.timeout, self.say = timeout, say
        self._start = time.monotonic()
        self._next = FIRST

    @property
    def seconds(self) -> float:
        """How long it has waited."""
        return time.monotonic() - self._start

    def on(self, what: str) -> bool:
        """Says it when a line is due. Returns whether it did."""
        if self.seconds < self._next:
            return False
        limit = f"gives up after {self.timeout:.0f} s"
        self.say(f"waiting for {what} ({self._next:.0f} s; {limit})")
        self._next = EVERY * (self.seconds // EVERY + 1)
        return True

    def check(self, what: str) -> None:
        """Raises Missing when the time is over."""
        if self.seconds >= self.timeout:
            raise Missing(f"{what} did not start within {self.timeout:.0f} s")


def wait(
    coordinator: str,
    processes: int,
    process: int,
    timeout: float,
    say: Say,
    versions: Sequence[str] = (),
) -> None:
    """Returns once all processes have called it.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are. process: the number of this one.
      timeout: seconds.
      say: writes one line.
      versions: of the software, the same in all processes.
    Raises ConfigError if the processes do not fit together, or if the port is not free;
    Missing, one line, that names the processes that did not start.
    """
    host, port = address(coordinator)
    require(0 <= process < processes, "process", process, f"from 0 to {processes - 1}")
    if processes == 1:
        return
    waiting = Waiting(timeout, say)
    hello = dict(process=process, processes=processes, versions=list(versions))
    if process == 0:
        _lead(port, hello, waiting)
    else:
        _follow(host, port, hello, waiting)


def address(coordinator: str) -> tuple[str, int]:
    """HOST:PORT as (host, port). Raises ConfigError."""
    host, _, port = coordinator.rpartition(":")
    is_port = port.isdigit() and 0 < int(port) < 2**16
    require(
        host and is_port, "coordinator", coordinator, "HOST:PORT, such as 10.0.0.1:1234"
    )
    return host.removeprefix("[").removesuffix("]"), int(port)


def names(numbers: Sequence[int], processes: int) -> str:
    """[1, 3], 4 -> processes 1, 3 of 4."""
    return f"processes {', '.join(map(str, numbers))} of {processes}"


# ---------------------------------------------------------------- process 0


def _lead(port: int, hello: dict[str, Any], waiting: Waiting) -> None:
    processes = hello["processes"]
    present: dict[int, socket.socket] = {}
    with _listen(port) as server, contextlib.ExitStack() as stack:
        while True:
            if (joined := _accept(server)) is not None:
                other, said = joined
                stack.enter_context(other)
                if problem := _misfit(hello, said):
                    _tell([other, *present.values()], {"error": problem})
                    other.close()
                    raise ConfigError(problem)
                if before := present.pop(said["process"], None):  # it was restarted
                    before.close()
                present[said["process"]] = other
            for number in [n for n, other in present.items() if _has_left(other)]:
                present.pop(number).close()
            missing = [n for n in range(1, processes) if n not in present]
            if not missing:
                return _tell(present.values(), {"go": 1})
            what = names(missing, processes)
            if waiting.on(what):
                _tell(present.values(), {"missing": missing})
            try:
                waiting.check(what)
            except Missing as error:
                _tell(present.values(), {"late": str(error)})
                raise


def _listen(port: int) -> socket.socket:
    """Listens on a port of all addresses, of IPv6 too where there is IPv6."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on port {port} of coordinator: "
            f"{error.strerror or error}; choose another port"
        ) from None
    server.settimeout(0.2)
    return server


def _accept(server: socket.socket) -> tuple[socket.socket, dict[str, Any]] | None:
    """The next process that connects and what it says; None if there is none now."""
    try:
        other, _ = server.accept()
    except TimeoutError:
        return None
    other.settimeout(PATIENCE)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        for said in _lines(other):
            if isinstance(said["process"], int) and isinstance(said["versions"], list):
                other.setblocking(False)
                return other, said
            break
    other.close()  # another program
    return None


def _misfit(own: dict[str, Any], said: dict[str, Any]) -> str | None:
    """Why a process cannot be one of this run, or None."""
    number, processes = said["process"], own["processes"]
    if said.get("processes") != processes:
        return (
            f"process {number} was started with processes={said.get('processes')}, and "
            f"process 0 with processes={processes}: both must be the same"
        )
    if not 0 < number < processes:
        return (
            f"two processes were started as process {number} of {processes}: each must "
            f"have its own number, from 0 to {processes - 1}"
        )
    if said["versions"] != own["versions"]:
        return (
            f"process {number} has {' '.join(said['versions'])}, and process 0 has "
            f"{' '.join(own['versions'])}: all must have the same versions"
        )
    return None


def _has_left(other: socket.socket) -> bool:
    """Whether a process that was there has closed its connection."""
    try:
        return not other.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _tell(others: Any, message: dict[str, Any]) -> None:
    for other in list(others):
        with contextlib.suppress(OSError):
            other.sendall(json.dumps(message).encode() + b"\n")


# ---------------------------------------------------------------- the others


def _follow(host: str, port: int, hello: dict[str, Any], waiting: Waiting) -> None:
    leader = f"process 0 at {host}:{port}"
    while not _try_to_follow(host, port, hello, waiting):
        waiting.on(leader)
        waiting.check(leader)
        time.sleep(0.2)


def _try_to_follow(
    host: str, port: int, hello: dict[str, Any], waiting: Waiting
) -> bool:
    """Connects to process 0 and waits there. False: it is not there, or it has left."""
    try:
        leader = socket.create_connection((host, port), timeout=PATIENCE)
    except OSError:
        return False
    with leader, contextlib.suppress(OSError):
        _tell([leader], hello)
        # Process 0 ends the wait; the margin is for its last line.
        leader.settimeout(max(waiting.timeout - waiting.seconds, 0) + PATIENCE)
        try:
            for said in _lines(leader):
                if "go" in said:
                    return True
                if "error" in said:
                    raise ConfigError(said["error"])
                if "late" in said:
                    raise Missing(said["late"])
                waiting.on(names(said["missing"], hello["processes"]))
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"coordinator={host}:{port} does not wait for processes: its run has "
                "started already, or another program listens there"
            ) from None
    return False


def _lines(other: socket.socket) -> Iterator[dict[str, Any]]:
    """The messages of the other side. Raises ValueError if they are none."""
    with other.makefile("rb") as file:
        while line := file.readline(LONGEST_LINE):
            yield json.loads(line)
