"""Writes timelines as a trace that ui.perfetto.dev and chrome://tracing show.

The format is Chrome's trace events, JSON. A process is a plan; its tracks are what a
device computes, and what it sends (a track more for each transfer at the same time).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ladder_jax import files
from ladder_jax.planner.scopes import place_of
from ladder_jax.planner.timeline import Timeline

US = 1e6  # microseconds in a second
COMPUTE = 0  # the track; those from 1 on are the network's


def write(path: str | Path, timelines: Sequence[tuple[str, Timeline]]) -> None:
    """Writes the trace of (title, timeline) pairs to a JSON file."""
    listed = []
    for process, (title, timeline) in enumerate(timelines):
        listed += events(timeline, process, title)
    trace = {"traceEvents": listed, "displayTimeUnit": "ns"}
    files.write_text(path, json.dumps(trace))


def events(timeline: Timeline, process: int, title: str) -> list[dict[str, Any]]:
    """A timeline's trace events. Times are those of the short stack that was compiled:
    `executions` says how many of each there are in a full step."""
    listed = [_computed(event, process) for event in timeline.events]
    listed = [one for one in listed if one["dur"] > 0]
    busy: list[float] = []  # until when each track of the network sends
    for one in sorted(timeline.collectives, key=lambda each: each.start):
        track = next((i for i, end in enumerate(busy) if end <= one.start), len(busy))
        busy[track : track + 1] = [one.end]
        details = dict(
            kind=one.kind,
            bytes=one.bytes,
            asynchronous=one.asynchronous,
            exposed_us=one.exposed * US,
            executions=one.count,
            block=str(place_of(one.scope)),
        )
        listed.append(_slice(one.name, one.start, one.end, process, 1 + track, details))
    names = ["compute", *(f"network {track}" for track in range(len(busy)))]
    return [
        _name("process_name", process, 0, title),
        *(_name("thread_name", process, i, name) for i, name in enumerate(names)),
        *listed,
    ]


def _computed(event: Any, process: int) -> dict[str, Any]:
    """What the device does, or waits for."""
    operation = event.operation
    details = dict(
        instruction=operation.name,
        scope=operation.scope,
        executions=operation.count,
        interference_us=event.interference * US,
        exposed_us=event.exposed * US,
    )
    name = str(place_of(operation.scope)) or operation.name
    if event.kind != "compute":
        name = f"waits for {operation.name}"
    return _slice(name, event.start, event.end, process, COMPUTE, details)


def _slice(
    name: str, start: float, end: float, process: int, track: int, details: dict
) -> dict[str, Any]:
    return dict(
        name=name,
        ph="X",
        ts=start * US,
        dur=(end - start) * US,
        pid=process,
        tid=track,
        args=details,
    )


def _name(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return dict(name=kind, ph="M", pid=process, tid=track, args=dict(name=name))
