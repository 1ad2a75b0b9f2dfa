"""The servers that `ladder-jax bench serve` measures: started here, or running already.

A server that is started here runs in a process of its own, and so shares neither its
interpreter lock nor its thread pools with the client.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ladder_jax.config import ConfigError, require

STOP_SECONDS = 30.0  # until a server that was asked to stop is killed
# Where servers say whether they take requests: ours and others; then what all have.
READY_PATHS = ("/ready", "/health", "/v1/models")
OTHER_PATH = (401, 403, 404, 405)  # the server has no such path, or guards all others


@dataclass
class Server:
    """A server that answers, or is to answer, at `url` (without /v1)."""

    name: str
    url: str
    command: list[str] = field(default_factory=list)  # empty: it runs already
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def model(self) -> str:
        """The first model's name. Raises ConfigError if the server does not tell."""
        try:
            return str(json.loads(get(f"{self.url}/v1/models"))["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{self.name}: {self.url}/v1/models names no model: {error}"
            ) from None


def key_headers() -> dict[str, str]:
    """The header for the API key in OPENAI_API_KEY; empty without one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def get(url: str, timeout: float = 10.0) -> bytes:
    """The body of a GET; raises OSError where there is none."""
    request = urllib.request.Request(url, headers=key_headers())
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return response.read()


def is_ready(url: str) -> bool:
    """Whether the server at `url` takes requests."""
    for path in READY_PATHS:
        try:
            get(url + path)
            return True
        except urllib.error.HTTPError as error:
            if error.code not in OTHER_PATH:
                return False
        except OSError:
            return False
    return False


def accepts_connections(url: str) -> bool:
    """Whether the server's port is open."""
    host, _, port = url.removeprefix("http://").partition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def named(entries: tuple[str, ...], option: str, what: str) -> dict[str, str]:
    """NAME=VALUE entries as a dict. Raises ConfigError about `option`."""
    values = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        require(name and equals and value, option, entry, f"NAME={what}")
        require(name not in values, option, entry, "a name that is not taken yet")
        values[name] = value
    return values


def base_url(url: str) -> str:
    """A server's URL without a slash and /v1 at its end."""
    accepted = "a URL such as http://127.0.0.1:8000"
    require(url.startswith(("http://", "https://")), "urls", url, accepted)
    return url.rstrip("/").removesuffix("/v1")


def command_words(text: str, values: Mapping[str, object]) -> list[str]:
    """A command as words, with the `values` of its placeholders such as {port}.

    Raises ConfigError about an unknown placeholder.
    """
    try:
        return shlex.split(text.format(**values))
    except (LookupError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise ConfigError(
            f"commands={text!r} is not accepted: it may have the placeholders {known} "
            f"({error})"
        ) from None


@contextlib.contextmanager
def started(server: Server, log: Path) -> Iterator[Server]:
    """Runs a server's command inside, with its output in the file `log`."""
    with log.open("wb") as stream:
        server.log, server.process = log, _start(server, stream)
    try:
        yield server
    finally:
        stop(server.process)


def _start(server: Server, stream: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            server.command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that `stop` reaches the processes it starts
        )
    except OSError as error:
        raise ConfigError(f"{server.name} cannot be started: {error}") from None


def stop(process: subprocess.Popen[Any]) -> None:
    """Ends a server: SIGTERM, and SIGKILL to what is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_ready(server: Server, seconds: float) -> None:
    """Waits until a server takes requests.

    Raises ConfigError, with the end of its log, if it ends or takes longer.
    """
    deadline = time.monotonic() + seconds
    while not is_ready(server.url):
        process = server.process
        if process is not None and process.poll() is not None:
            raise ConfigError(
                f"{server.name} ended with status {process.returncode} before it was "
                f"ready: {_last_lines(server)}"
            )
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{server.name} is not ready after {seconds:g} s: {_last_lines(server)}"
            )
        time.sleep(0.1)


def _last_lines(server: Server, count: int = 5) -> str:
    if server.log is None:
        return server.url
    lines = server.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-count:]) or "it printed nothing"


def memory_bytes(process: subprocess.Popen[Any]) -> int | None:
    """The resident memory of a process and its children; None where Linux's /proc is
    not there to tell."""
    total = 0
    for pid in _family(process.pid):
        try:
            pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
        except OSError:
            continue
        total += int(pages) * os.sysconf("SC_PAGE_SIZE")
    return total or None


def processor_seconds(process: subprocess.Popen[Any]) -> float | None:
    """The processor time of a process and its children so far; None as above."""
    total, ticks = 0, os.sysconf("SC_CLK_TCK")
    for pid in _family(process.pid):
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / ticks if total else None


def _family(pid: int) -> list[int]:
    """A process and all processes below it."""
    family, members = [pid], [pid]
    while members:
        parent = members.pop()
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found = [int(word) for word in path.read_text().split()]
                family += found
                members += found
    return family
