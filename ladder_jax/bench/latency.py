"""Computes the figures of a policy on a workload: rates, latencies, occupancy."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ladder_jax.bench.workloads import Arrival
from ladder_jax.planner.tables import Column, text_table
from ladder_jax.serve import reads
from ladder_jax.serve.counters import Counters, TracedChunk

if TYPE_CHECKING:  # it imports JAX, and the load generator has no use for that
    from ladder_jax.serve.request import Request

PERCENTILES = (50, 90, 99)
History = Sequence[TracedChunk]


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


def capacity_of(saturated_tokens_per_s: float, run: float, tokens: float) -> float:
    """Requests a second that a server or an engine completes, from a saturated run.

    While requests wait it completes more than in the whole run. Where none waits, the
    time until the last has its first tokens says nothing.

    Args:
      saturated_tokens_per_s: output tokens a second while requests waited.
      run: requests a second of the whole run.
      tokens: output tokens of a request, on average.
    """
    return max(saturated_tokens_per_s / tokens, run)


def occupancy_until_last_admission(history: History) -> float:
    """The share of slot iterations that emitted a token, until the iteration in which
    the last request was admitted."""
    iterations = [row for chunk in history for row in chunk.requests]
    seen: set[int] = set()
    last = 0
    for number, row in enumerate(iterations):
        new = set(row[row >= 0].tolist()) - seen
        if new:
            seen |= new
            last = number
    until_then = iterations[: last + 1]
    slot_iterations = sum(row.size for row in until_then)
    tokens = sum(int((row >= 0).sum()) for row in until_then)
    return tokens / max(slot_iterations, 1)


# ---------------------------------------------------------------- keys and values


class Cache(NamedTuple):
    """How an engine holds keys and values."""

    token_bytes: int  # of one token on one device
    page_size: int  # tokens of a page; 0: each row has memory of its own
    pairs: int  # see reads.in_pages
    staging_size: int  # rows beside those of the slots
    prefix_bytes: int  # of stored prefixes; with pages they have some of the pages


def read_over_alive(
    history: History, prompts: Mapping[int, int], cache: Cache
) -> float:
    """Bytes of keys and values that decode steps read, over those of live tokens.

    Prefill does not count. Both are of the same tokens' size, so it counts tokens.

    Args:
      history: of an engine that has preempted no request.
      prompts: {request number: tokens of its prompt}.
      cache: how the engine holds them.
    """
    tokens = dict(prompts)
    read = alive = 0
    for chunk in history:
        for row in chunk.requests:
            live = row[row >= 0].tolist()
            for number in live:  # the step writes the token before it reads
                tokens[number] += 1
            lengths = [tokens[number] for number in live]
            alive += sum(lengths)
            if cache.page_size:
                read += reads.in_pages(lengths, cache.page_size, cache.pairs)
            else:
                read += reads.in_rows(row.size, chunk.length)
    return read / max(alive, 1)


def peak_bytes(history: History, cache: Cache) -> int:
    """The most bytes of keys and values on a device while a chunk ran.

    Rows: what is allocated. Pages: those of requests and stored prefixes; it counts the
    pages that a request may need until its chunk ends.
    """
    if cache.page_size:
        return max(c.pages for c in history) * cache.page_size * cache.token_bytes
    tokens = max(
        reads.in_rows(c.requests.shape[1] + cache.staging_size, c.length)
        for c in history
    )
    return tokens * cache.token_bytes + cache.prefix_bytes


# ---------------------------------------------------------------- the table

HEAD = """\
occupancy: the share of slot iterations that emitted a token, from the first arrival
until the last token; until last: the same until the last request is admitted
KV MiB: the most keys and values held: what rows allocate, or pages in use
read/alive: bytes of keys and values that decode steps read, over those of live tokens
("-": not traced); tokens/iteration: of a slot that emits some
accepted: the share of drafted tokens"""
Row = Mapping[str, Any]


def result_table(rows: Iterable[Row]) -> str:
    """The results as text: a line for each run.

    Args:
      rows: the figures of `measure`, with those of keys and values if the engine
        traces, and the names "workload", "load" and "policy".
    """

    def pair(key: str, form: str) -> Any:
        def cell(row: Row) -> str:
            values = row[key]
            return f"{values['p50']:{form}}/{values['p99']:{form}}"

        return cell

    def value(key: str, form: str) -> Any:
        def cell(row: Row) -> str:
            figure = row.get(key)
            return "-" if figure is None else format(figure, form)

        return cell

    columns = [
        Column("workload", lambda row: row["workload"], left=True),
        Column("load", lambda row: row["load"], left=True),
        Column("policy", lambda row: row["policy"], left=True),
        Column("tokens/s", value("tokens_per_s", ".0f")),
        Column("TTFT ms p50/p99", pair("ttft_ms", ".0f")),
        Column("TPOT ms p50/p99", pair("tpot_ms", ".2f")),
        Column("ITL ms p50/p99", pair("itl_ms", ".1f")),
        Column("occupancy", value("occupancy", ".1%")),
        Column("until last", value("occupancy_until_last_admission", ".1%")),
        Column("KV MiB", value("kv_mib", ".1f")),
        Column("read/alive", value("kv_read_over_alive", ".2f")),
        Column("of bare", value("of_bare", ".1%")),
        Column("of matmul", value("of_matmul", ".1%")),
        Column("goodput", value("goodput", ".0%")),
        Column("syncs/token", value("syncs_per_token", ".4f")),
        Column("tokens/iteration", value("tokens_per_iteration", ".2f")),
        Column("accepted", value("accepted", ".0%")),
    ]
    return text_table(columns, rows)
