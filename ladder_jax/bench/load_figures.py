"""The figures of a load that a server has served, in the field's words.

Latencies count from the time at which a request should have been sent, so that a client
or a server that falls behind cannot hide it. Only completed requests count, but in
`errors` and in goodput's share.

    TTFT   until the first event with output
    TPOT   from the first to the last event, over the output tokens but the first
    ITL    between two events with output, of all requests
    E2E    until the last event with output
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ladder_jax.bench.latency import Latencies, Objective, percentiles
from ladder_jax.bench.load_client import Outcome
from ladder_jax.bench.load_requests import Question, question_of
from ladder_jax.bench.load_run import Run
from ladder_jax.planner.tables import Column

# A client that sends this late, or is busy for this share of its time, measures itself.
LATE, BUSY = 0.02, 0.9  # seconds at the 99th percentile, and a share
OTHERS_BUSY = 0.05


def latencies_of(outcomes: Sequence[Outcome]) -> Latencies:
    """The latencies of completed requests."""
    done = [one for one in outcomes if not one.error and one.times]
    gaps = [np.diff(one.times) for one in done]
    return Latencies(
        ttft=[one.times[0] - one.arrival for one in done],
        tpot=[_tpot(one) for one in done if one.tokens > 1],
        itl=np.concatenate([[], *gaps]).tolist(),
        e2e=[one.times[-1] - one.arrival for one in done],
    )


def _tpot(outcome: Outcome) -> float:
    """Seconds for each output token but the first, on average."""
    return (outcome.times[-1] - outcome.times[0]) / max(outcome.tokens - 1, 1)


def is_good(outcome: Outcome, objective: Objective) -> bool:
    """Whether a request completed within both limits."""
    if outcome.error or not outcome.times:
        return False
    ttft = outcome.times[0] - outcome.arrival
    return ttft <= objective.ttft and _tpot(outcome) <= objective.tpot


def saturated_rate(run: Run) -> float:
    """Output tokens a second, until the last request has its first token: until then
    requests wait, if there are more of them than the server takes at once."""
    done = [one for one in run.outcomes if not one.error and one.times]
    end = max((one.times[0] for one in done), default=0.0)
    if not end:
        return 0.0
    tokens = sum(
        sum(seconds <= end for seconds in one.times) * one.tokens / len(one.times)
        for one in done
    )
    return tokens / end


def figures(
    runs: Sequence[Run],
    objective: Objective,
    *,
    all_tokens: bool = True,
    references: Mapping[Question, str] | None = None,
) -> dict[str, Any]:
    """The figures of a load.

    Args:
      runs: the load's rounds; their requests count together.
      objective: for goodput.
      all_tokens: whether every output must have max_tokens tokens.
      references: the text of every request's output, to compare with.
    """
    outcomes = [one for run in runs for one in run.outcomes]
    done = [one for one in outcomes if not one.error]
    errors = Counter(one.error for one in outcomes if one.error)
    seconds = sum(run.seconds for run in runs)
    latencies = latencies_of(outcomes)
    tokens, prompt_tokens = (
        sum(getattr(one, name) for one in done) for name in ("tokens", "prompt_tokens")
    )
    good = sum(is_good(one, objective) for one in outcomes)
    tpot = percentiles(latencies.tpot)
    values: dict[str, Any] = dict(
        requests=len(outcomes),
        completed=len(done),
        errors=dict(sorted(errors.items())),
        seconds=seconds,
        requests_per_s=len(done) / seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=tokens,
        output_tokens_per_s=tokens / seconds,
        output_tokens_per_s_of_rounds=[_rate(run) for run in runs],
        total_tokens_per_s=(tokens + prompt_tokens) / seconds,
        saturated_tokens_per_s=float(np.median([saturated_rate(run) for run in runs])),
        user_tokens_per_s=1e3 / tpot["p50"] if tpot["p50"] else None,
        ttft_ms=percentiles(latencies.ttft),
        tpot_ms=tpot,
        itl_ms=percentiles(latencies.itl),
        e2e_ms=percentiles(latencies.e2e),
        goodput=good / max(len(outcomes), 1),
        goodput_requests_per_s=good / seconds,
        tokens_per_event=tokens / max(sum(len(one.times) for one in done), 1),
        client=_client(runs),
    )
    if all_tokens:
        values["wrong_length"] = sum(
            one.tokens != one.request.max_tokens for one in done
        )
    if references is not None:
        values["wrong_text"] = sum(
            one.text != references[question_of(one.request)] for one in done
        )
    return values


def _rate(run: Run) -> float:
    tokens = sum(one.tokens for one in run.outcomes if not one.error)
    return tokens / run.seconds


def _client(runs: Sequence[Run]) -> dict[str, Any]:
    """How well the client kept its own times."""
    lags = [one.sent - one.arrival for run in runs for one in run.outcomes]
    delays = [delay for run in runs for delay in run.delays]
    lag, delay = percentiles(lags), percentiles(delays)
    busy = max(run.busy for run in runs)
    late = max(lag["p99"] or 0.0, delay["p99"] or 0.0) > LATE * 1e3
    return dict(lag_ms=lag, delay_ms=delay, busy=busy, fell_behind=late or busy > BUSY)


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """What a reader of these figures must know."""
    client, texts = figures["client"], []
    if client["fell_behind"]:
        lag, delay = client["lag_ms"]["p99"], client["delay_ms"]["p99"]
        texts.append(
            f"the client fell behind (p99: requests {lag:.0f} ms late, its event loop "
            f"{delay:.0f} ms late; busy {client['busy']:.0%} of the time): these "
            "latencies are the client's, too"
        )
    for name, what in ("wrong_length", "tokens"), ("wrong_text", "text"):
        if figures.get(name):
            texts.append(
                f"{figures[name]} of {figures['completed']} outputs do not have the "
                f"{what} that they should have"
            )
    if figures.get("others_busy", 0.0) > OTHERS_BUSY:
        texts.append(
            f"servers that were not measured took {figures['others_busy']:.0%} of a "
            "processor meanwhile"
        )
    if figures["tokens_per_event"] > 1.5:
        texts.append(
            f"an event has {figures['tokens_per_event']:.1f} tokens on average: ITL is "
            "the time between events"
        )
    return texts


# ---------------------------------------------------------------- the table


def columns() -> list[Column]:
    """The columns of the table; a row is a load's figures with `load` and `server`."""

    def pair(key: str, form: str, names: tuple[str, ...] = ("p50", "p99")) -> Any:
        def cell(row: dict[str, Any]) -> str:
            values = [row[key][name] for name in names]
            return "/".join("-" if x is None else format(x, form) for x in values)

        return cell

    return [
        Column("load", lambda row: row["load"], left=True),
        Column("server", lambda row: row["server"], left=True),
        Column("done", lambda row: f"{row['completed']}/{row['requests']}"),
        Column("requests/s", lambda row: f"{row['requests_per_s']:.2f}"),
        Column("tokens/s", lambda row: f"{row['output_tokens_per_s']:.0f}"),
        Column("saturated", lambda row: f"{row['saturated_tokens_per_s']:.0f}"),
        Column("TTFT ms p50/p99", pair("ttft_ms", ".0f")),
        Column("TPOT ms p50/p99", pair("tpot_ms", ".2f")),
        Column("ITL ms p50/p99", pair("itl_ms", ".1f")),
        Column("E2E ms p50/p99", pair("e2e_ms", ".0f")),
        Column("goodput", lambda row: f"{row['goodput']:.0%}"),
        Column("errors", _errors, left=True),
    ]


def _errors(row: dict[str, Any]) -> str:
    kinds = [f"{kind}: {count}" for kind, count in row["errors"].items()]
    return ", ".join(kinds) or "-"
