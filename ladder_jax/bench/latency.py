"""Computes the figures of a policy on a workload: rates, latencies, occupancy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ladder_jax.bench.workloads import Arrival
from ladder_jax.planner.tables import Column, text_table
from ladder_jax.serve.counters import Counters

if TYPE_CHECKING:  # it imports JAX, and the load generator has no use for that
    from ladder_jax.serve.request import Request

PERCENTILES = (50, 90, 99)
# For every chunk: seconds, and the request [K, W] that each of W slots decoded in each
# of K iterations, or a negative number where the slot emitted no token.
History = Sequence[tuple[float, np.ndarray]]


class Objective(NamedTuple):
    """The longest latencies, in seconds, with which a request counts for goodput."""

    ttft: float  # until its first token
    tpot: float  # for each other token, on average


class Latencies(NamedTuple):
    """The latencies of requests in seconds. `ttft` and `e2e` count from the scheduled
    arrival."""

    ttft: list[float]  # until the first token
    tpot: list[float]  # from the first to the last token, for each but the first
    itl: list[float]  # between two tokens, of all requests
    e2e: list[float]  # until the last token


def latencies_of(requests: Sequence["Request"]) -> Latencies:
    """The latencies of finished requests."""
    gaps = [np.diff(request.times) for request in requests]
    tpot = [
        (request.times[-1] - request.times[0]) / max(len(request.times) - 1, 1)
        for request in requests
    ]
    return Latencies(
        ttft=[request.times[0] - request.submitted for request in requests],
        tpot=tpot,
        itl=np.concatenate(gaps).tolist(),
        e2e=[request.times[-1] - request.submitted for request in requests],
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """{"p50": ..., "p90": ..., "p99": ...} in milliseconds; None without values."""
    return {
        f"p{p}": float(np.percentile(seconds, p)) * 1e3 if len(seconds) else None
        for p in PERCENTILES
    }


def measure(
    requests: Sequence["Request"],
    arrivals: Sequence[Arrival],
    seconds: float,
    counters: Counters,
    objective: Objective,
) -> dict[str, Any]:
    """The figures of a run.

    Args:
      requests: finished, in the order of `arrivals`.
      arrivals: the workload.
      seconds: of the whole run.
      counters: of the engine, for this run.
      objective: for goodput.
    Raises ArithmeticError where a request has another number of tokens than its
    arrival says.
    """
    for request, arrival in zip(requests, arrivals, strict=True):
        if len(request.tokens) != arrival.max_tokens:
            raise ArithmeticError(
                f"a request has {len(request.tokens)} tokens, not {arrival.max_tokens}"
            )
    latencies = latencies_of(requests)
    good = [
        ttft <= objective.ttft and tpot <= objective.tpot
        for ttft, tpot in zip(latencies.ttft, latencies.tpot)
    ]
    tokens = sum(len(request.tokens) for request in requests)
    start = min(
        request.submitted - arrival.seconds
        for request, arrival in zip(requests, arrivals)
    )
    return dict(
        tokens_per_s=tokens / seconds,
        saturated_tokens_per_s=saturated_rate(requests, start),
        makespan_s=seconds,
        ttft_ms=percentiles(latencies.ttft),
        tpot_ms=percentiles(latencies.tpot),
        itl_ms=percentiles(latencies.itl),
        e2e_ms=percentiles(latencies.e2e),
        goodput=float(np.mean(good)),
        syncs_per_token=counters.syncs / tokens,
        occupancy=counters.occupancy if counters.slot_iterations else None,
        tokens_per_iteration=counters.accepted_length if counters.busy else None,
        accepted=counters.accepted / counters.drafted if counters.drafted else None,
    )


def saturated_rate(requests: Sequence["Request"], start: float) -> float:
    """Tokens a second while every slot has work: from `start` until the last request
    starts to decode, which its second token shows (prefill computes the first)."""
    end = max(request.times[min(1, len(request.times) - 1)] for request in requests)
    tokens = sum(time <= end for request in requests for time in request.times)
    return tokens / (end - start)


def saturated_occupancy(history: History) -> float:
    """The share of slot iterations that emitted a token, until the iteration in which
    the last request was admitted."""
    iterations = [row for _, chunk in history for row in chunk]
    seen: set[int] = set()
    last = 0
    for number, row in enumerate(iterations):
        new = set(row[row >= 0].tolist()) - seen
        if new:
            seen |= new
            last = number
    saturated = iterations[: last + 1]
    slot_iterations = sum(row.size for row in saturated)
    tokens = sum(int((row >= 0).sum()) for row in saturated)
    return tokens / max(slot_iterations, 1)


# ---------------------------------------------------------------- the table

HEAD = """\
occupancy: the share of slot iterations that emitted a token, from the first arrival
until the last token; saturated: the same until the last request is
admitted ("-": not traced, or not a saturated workload); tokens/iteration: of a slot
that emits some; accepted: the share of drafted tokens"""


def result_table(title: str, results: dict[str, dict[str, Any]]) -> str:
    """The results as text: {policy: its figures}, see `measure`."""

    def pair(key: str, form: str) -> Any:
        def cell(item: tuple[str, dict[str, Any]]) -> str:
            values = item[1][key]
            return f"{values['p50']:{form}}/{values['p99']:{form}}"

        return cell

    def value(key: str, form: str) -> Any:
        def cell(item: tuple[str, dict[str, Any]]) -> str:
            figure = item[1].get(key)
            return "-" if figure is None else format(figure, form)

        return cell

    columns = [
        Column("policy", lambda item: item[0], left=True),
        Column("tokens/s", value("tokens_per_s", ".0f")),
        Column("of bare", value("of_bare", ".1%")),
        Column("of matmul", value("of_matmul", ".1%")),
        Column("makespan s", value("makespan_s", ".2f")),
        Column("TTFT ms p50/p99", pair("ttft_ms", ".0f")),
        Column("TPOT ms p50/p99", pair("tpot_ms", ".2f")),
        Column("ITL ms p50/p99", pair("itl_ms", ".1f")),
        Column("e2e ms p50/p99", pair("e2e_ms", ".0f")),
        Column("goodput", value("goodput", ".0%")),
        Column("occupancy", value("occupancy", ".1%")),
        Column("saturated", value("occupancy_while_saturated", ".1%")),
        Column("syncs/token", value("syncs_per_token", ".4f")),
        Column("tokens/iteration", value("tokens_per_iteration", ".2f")),
        Column("accepted", value("accepted", ".0%")),
    ]
    return "\n".join([title, text_table(columns, results.items())])
