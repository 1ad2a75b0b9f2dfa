"""HAProxy with the configuration of launch/, for tests."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from helpers import ROOT

CONFIGURATION = ROOT / "launch" / "haproxy.cfg"
FOLDERS = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"


def executable() -> str | None:
    """The path of an installed HAProxy."""
    return shutil.which("haproxy", path=FOLDERS)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]


class Balancer:
    """A running HAProxy: its port, and what it counts."""

    def __init__(self, port: int, numbers: int) -> None:
        self.port, self._numbers = port, numbers

    def servers(self) -> dict[str, dict[str, str]]:
        """{server: {field: value}} of HAProxy's statistics."""
        url = f"http://127.0.0.1:{self._numbers}/;csv"
        with urllib.request.urlopen(url, timeout=5) as response:
            header, *lines = response.read().decode().removeprefix("# ").splitlines()
        rows = [dict(zip(header.split(","), line.split(","))) for line in lines]
        return {
            row["svname"]: row
            for row in rows
            if row["pxname"] == "replicas" and row["svname"] != "BACKEND"
        }

    def wait(self, seconds: float = 30, **statuses: str) -> None:
        """Waits until servers have statuses, such as one="UP"."""
        end = time.monotonic() + seconds
        while True:
            servers = self.servers()
            now = {name: servers[name]["status"] for name in statuses}
            if now == statuses:
                return
            assert time.monotonic() < end, f"{now}, not {statuses}"
            time.sleep(0.05)


@contextlib.contextmanager
def balancing(folder: Path, replicas: Sequence[int]) -> Iterator[Balancer]:
    """Runs HAProxy in front of two ports, called one and two."""
    port, numbers = free_ports(2)
    changes = {
        r"bind :8000\n": f"bind 127.0.0.1:{port}\n",
        r"bind 127\.0\.0\.1:8404\n": f"bind 127.0.0.1:{numbers}\n",
        r"server one \S+\n": f"server one 127.0.0.1:{replicas[0]}\n",
        r"server two \S+\n": f"server two 127.0.0.1:{replicas[1]}\n",
    }
    text = CONFIGURATION.read_text()
    for pattern, replacement in changes.items():
        text, count = re.subn(pattern, replacement, text)
        assert count == 1, f"launch/haproxy.cfg has {count} times {pattern}"
    path = folder / "haproxy.cfg"
    path.write_text(text)
    with (folder / "haproxy.log").open("w") as log:
        process = subprocess.Popen(
            [executable(), "-db", "-f", path], stdout=log, stderr=log
        )
        try:
            balancer = Balancer(port, numbers)
            end = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError):
                    balancer.servers()
                    break
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            yield balancer
        finally:
            process.kill()
            process.wait()
