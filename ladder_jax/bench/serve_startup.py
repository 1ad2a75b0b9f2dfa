"""Measures how long servers take to start, without and with compiled programs."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ladder_jax.bench.serve_arguments import Arguments
from ladder_jax.bench.serve_processes import (
    Server,
    accepts_connections,
    started,
    wait_until_ready,
)
from ladder_jax.bench.serve_targets import to_start
from ladder_jax.config import ConfigError
from ladder_jax.planner.tables import Column, text_table


def measure_startup(arguments: Arguments, folder: Path) -> list[dict[str, Any]]:
    """Starts every server cold and warm, in turns, prints a table and returns its rows.

    Cold: the folder for compiled programs is empty. Warm: it has what the start before
    wrote. The operating system may have the weights in memory in both.
    """
    cache = folder / "cache"
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    names = [server.name for server in to_start(arguments, folder)]
    if not names:
        raise ConfigError("startup: no server is to be started: --urls run already")
    for _ in range(arguments.startup):
        for name in names:
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir()
            for kind in ("cold", "warm"):
                # Each start gets a port of its own.
                (server,) = [
                    one for one in to_start(arguments, folder) if one.name == name
                ]
                opened, ready = start_times(server, folder, arguments.start_timeout)
                row = rows.setdefault(
                    (name, kind),
                    dict(server=name, start=kind, port_s=[], ready_s=[], cache_bytes=0),
                )
                row["port_s"].append(opened)
                row["ready_s"].append(ready)
                row["cache_bytes"] = size_of(cache)
                text = f"  {name}, {kind}: ready after {ready:.1f} s"
                print(text, file=sys.stderr, flush=True)
    print(text_table(COLUMNS, rows.values()))
    return list(rows.values())


def start_times(server: Server, folder: Path, timeout: float) -> tuple[float, float]:
    """Seconds until a server's port is open, and until it takes requests."""
    begin = time.monotonic()
    with started(server, folder / f"{server.name}.log"):
        while not accepts_connections(server.url):
            wait = timeout - (time.monotonic() - begin)
            if wait <= 0 or _has_ended(server):
                wait_until_ready(server, 0.0)  # raises, with the server's log
            time.sleep(0.02)
        opened = time.monotonic() - begin
        wait_until_ready(server, timeout - opened)
        return opened, time.monotonic() - begin


def _has_ended(server: Server) -> bool:
    return server.process is not None and server.process.poll() is not None


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _range(key: str) -> Any:
    def cell(row: dict[str, Any]) -> str:
        values = row[key]
        return f"{min(values):.1f}-{max(values):.1f}"

    return cell


COLUMNS = [
    Column("server", lambda row: row["server"], left=True),
    Column("start", lambda row: row["start"], left=True),
    Column("port open s", _range("port_s")),
    Column("ready s", _range("ready_s")),
    Column("cache MB", lambda row: f"{row['cache_bytes'] / 1e6:.0f}"),
]
