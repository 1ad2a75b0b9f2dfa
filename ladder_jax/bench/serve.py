"""Measures servers of the OpenAI API under load: `ladder-jax bench serve`.

    ladder-jax bench serve --urls http://127.0.0.1:8000 --loads 1 2 4 saturated
    ladder-jax bench serve --checkpoint runs/short --engine --loads users:1 users:16
    ladder-jax bench serve --size small --loads saturated 50% 90% \\
        --commands 'vllm=vllm serve {weights} --port {port} --dtype {dtype}'

Servers that run already are named by URL, others are started here. Several servers get
the same requests in turns, load by load, so that the speed of the machine, which
changes with time, is the same for all.

A load (`--loads`) is one of

    2.5         so many requests a second, at times from --arrivals, whether or not the
                requests before have ended
    90%         this share of the capacity of the slowest server. The load `saturated`
                measures the capacity first
    saturated   all requests at once
    users:16    so many users; each sends its next request when its last one has ended

The client never repeats a request. It keeps the bytes of the answers with their times,
and parses them when the load has ended. It measures how late it sent each request and
how late its event loop woke up, and says so where that spoils the figures.
load_figures.py defines the figures.
"""

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ladder_jax import files
from ladder_jax.bench import machine, plots
from ladder_jax.bench.load_figures import columns, warnings
from ladder_jax.bench.load_requests import Load
from ladder_jax.bench.serve_arguments import Arguments, check
from ladder_jax.bench.serve_startup import measure_startup
from ladder_jax.bench.serve_sweep import Row, sweep
from ladder_jax.bench.serve_targets import (
    CHECKPOINT,
    ENGINE,
    OURS,
    engine_target,
    http_target,
    servers,
)
from ladder_jax.config import ConfigError
from ladder_jax.planner.tables import text_table

__all__ = ["Arguments", "run"]


def run(arguments: Arguments) -> dict[str, Any]:
    """Runs the benchmark. Prints a table, writes what `json` and `plots` name, and
    returns the results. Raises ConfigError for arguments that are not accepted."""
    loads = check(arguments)
    _require_client()
    device = machine.measure()
    print(device, flush=True)
    results: dict[str, Any] = dict(
        arguments=dataclasses.asdict(arguments), machine=device._asdict()
    )
    with tempfile.TemporaryDirectory() as folder:
        if arguments.startup:
            results["startup"] = measure_startup(arguments, Path(folder))
        else:
            rows = _measure(arguments, loads, Path(folder))
            results["rows"] = [row.values for row in rows]
            report(arguments, rows)
    if arguments.json:
        files.write_text(arguments.json, json.dumps(results, indent=1))
    return results


def _require_client() -> None:
    """Raises ConfigError where the HTTP client is not installed."""
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError("bench serve needs aiohttp: pip install 'ladder_jax[load]'")


def _measure(arguments: Arguments, loads: Sequence[Load], folder: Path) -> list[Row]:
    """Starts all targets, and sends them all loads."""
    with servers(arguments, folder) as found:
        targets = [http_target(arguments, server) for server in found]
        if not arguments.engine:
            return sweep(arguments, loads, targets)
        checkpoint = arguments.checkpoint or str(folder / CHECKPOINT)
        with engine_target(arguments, checkpoint) as engine:
            return sweep(arguments, loads, [*targets, engine])


def report(arguments: Arguments, rows: Sequence[Row]) -> None:
    """Prints the table, what its reader must know, and the paths of plots."""
    print(text_table(columns(), [row.values for row in rows]))
    for row in rows:
        for text in warnings(row.values):
            print(f"{row.values['load']}, {row.values['server']}: {text}")
    for text in http_costs([row.values for row in rows]):
        print(text)
    if arguments.plots:
        for path in _plot(arguments.plots, rows):
            print(f"wrote {path}")


def http_costs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What HTTP costs: each load of our server beside that of its engine."""
    texts = []
    of_engine = {row["load"]: row for row in rows if row["server"] == ENGINE}
    for row in rows:
        engine = of_engine.get(row["load"])
        if row["server"] != OURS or engine is None or not row["completed"]:
            continue
        share = row["output_tokens_per_s"] / engine["output_tokens_per_s"]
        text = f"{row['load']}: over HTTP {share:.1%} of the engine's tokens/s"
        for key in ("ttft_ms", "tpot_ms"):
            if row[key]["p50"] is not None and engine[key]["p50"] is not None:
                more = row[key]["p50"] - engine[key]["p50"]
                name = key.partition("_")[0].upper()
                text += f", {name} p50 {more:+.2f} ms"
        texts.append(text)
    return texts


def _plot(folder: str, rows: Sequence[Row]) -> list[Path]:
    """Latency curves of each load, and Pareto curves of all loads."""
    loads = dict.fromkeys(row.values["load"] for row in rows)
    points: dict[str, list[plots.Point]] = {}
    for row in rows:
        values = row.values
        if values["user_tokens_per_s"] is not None:
            rates = values["user_tokens_per_s"], values["output_tokens_per_s"]
            point = plots.Point(values["load"], *rates)
            points.setdefault(values["server"], []).append(point)
    paths = [
        plots.draw_latencies(
            folder,
            load,
            {
                row.values["server"]: row.latencies
                for row in rows
                if row.values["load"] == load and row.latencies.ttft
            },
        )
        for load in loads
    ]
    return [*paths, plots.draw_pareto(folder, "serve", points)]
