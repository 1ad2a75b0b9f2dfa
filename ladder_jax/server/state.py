"""What /state says: the slots, the queue and the latencies."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from ladder_jax.server.metrics import Times
from ladder_jax.server.serving import Serving

RECENT = 60.0  # seconds: older requests do not count in the latencies


def state(serving: Serving) -> dict[str, Any]:
    """Returns the state of a server, for people and pages; it has no text of clients.

    The latencies are in seconds, {"p50", "p99"} of the last minute's requests.
    """
    lifecycle, engine = serving.lifecycle, serving.engine
    values: dict[str, Any] = dict(
        status=lifecycle.status,
        detail=lifecycle.detail,
        model=serving.options.model_name,
        time=time.time(),
    )
    if engine is None:
        return values
    snapshot = engine.snapshot()
    values |= dataclasses.asdict(snapshot)
    values["slots"] = [slot and slot._asdict() for slot in snapshot.slots]
    values["occupancy"] = snapshot.counters.occupancy
    now = time.perf_counter()
    recent = [t for t in list(serving.metrics.recent) if now - t.finished < RECENT]
    values["latencies"] = {
        name: _percentiles(recent, get)
        for name, get in {
            "queue": lambda t: t.queue,
            "first_token": lambda t: t.first_token,
            "per_token": lambda t: t.per_token,
            "end_to_end": lambda t: t.end_to_end,
        }.items()
    }
    return values


def _percentiles(
    times: list[Times], get: Callable[[Times], float | None]
) -> dict[str, float] | None:
    values = sorted(value for t in times if (value := get(t)) is not None)
    if not values:
        return None

    def at(share: float) -> float:
        return round(values[min(int(share * len(values)), len(values) - 1)], 6)

    return dict(p50=at(0.5), p99=at(0.99))
