"""Sends every load to every target in turns, and computes the rows of the table."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ladder_jax.bench.latency import Latencies, Objective, capacity_of
from ladder_jax.bench.load_figures import figures, latencies_of
from ladder_jax.bench.load_requests import (
    Load,
    Question,
    Shape,
    questions,
    schedule,
)
from ladder_jax.bench.load_run import Run
from ladder_jax.bench.serve_arguments import Arguments
from ladder_jax.bench.serve_processes import memory_bytes, processor_seconds
from ladder_jax.bench.serve_targets import ENGINE, Target
from ladder_jax.bench.sizes import DECODE_SIZES
from ladder_jax.bench.workloads import Arrival
from ladder_jax.config import ConfigError

# The questions of warm-ups come from streams that no round has.
WARM_UP = 10**6


class Row(NamedTuple):
    """One load of one target."""

    values: dict[str, Any]  # figures, with load and server
    latencies: Latencies


class Turn(NamedTuple):
    """A load that a target has served once."""

    run: Run
    busy: float  # processor seconds a second of the target
    others_busy: float  # of all other processes that were started here


def shape_of(arguments: Arguments) -> Shape:
    """What the requests look like."""
    vocabulary = arguments.vocabulary
    if vocabulary is None:
        size = arguments.size
        vocabulary = DECODE_SIZES[size].vocab_size if size is not None else 256
    return Shape(
        arguments.lengths,
        arguments.prompt_tokens,
        arguments.output_tokens,
        arguments.length,
        arguments.prompts,
        vocabulary,
        arguments.file,
        arguments.distinct,
        arguments.seed,
    )


def in_order(loads: Sequence[Load]) -> list[Load]:
    """The loads, with `saturated` first where one is a share of the capacity."""
    if not any(load.share for load in loads):
        return list(loads)
    saturated = [load for load in loads if _is_saturated(load)]
    others = [load for load in loads if not _is_saturated(load)]
    return [*(saturated or [Load("saturated")]), *others]


def _is_saturated(load: Load) -> bool:
    return not load.users and load.share is None and load.rate == math.inf


def sweep(
    arguments: Arguments, loads: Sequence[Load], targets: Sequence[Target]
) -> list[Row]:
    """Measures all targets under all loads: a row for each load and target."""
    shape = shape_of(arguments)
    for target in targets:
        warm_up(arguments, shape, target)
    references = {
        target.name: reference_texts(shape, target)
        for target in targets
        if arguments.check
    }
    rows: list[Row] = []
    capacity = 0.0
    for load in in_order(loads):
        if load.share is not None:
            if capacity == math.inf:
                raise ConfigError(
                    f"loads={load.name!r} is not accepted: no server completed a "
                    "request of the load saturated, which measures the capacity"
                )
            load = dataclasses.replace(load, rate=load.share * capacity)
        turns = measure(arguments, shape, load, targets)
        for target in targets:
            of_target = turns[target.name]
            rows.append(_row(arguments, load, target, of_target, references))
        if _is_saturated(load):
            capacity = min(map(_capacity, rows[-len(targets) :]))
    return rows


def warm_up(arguments: Arguments, shape: Shape, target: Target) -> None:
    """Sends requests that do not count. Raises ConfigError if none completes."""
    if not arguments.warmup:
        return
    asked = questions(shape, arguments.warmup, WARM_UP)
    run = target.serve([Arrival(0.0, *question) for question in asked], 0)
    if all(one.error for one in run.outcomes):
        kinds = sorted({one.error for one in run.outcomes})
        raise ConfigError(f"{target.name} completed no request: {', '.join(kinds)}")


def reference_texts(shape: Shape, target: Target) -> dict[Question, str]:
    """The outputs of all different requests, each generated alone.

    Raises ConfigError if a request does not complete.
    """
    assert shape.distinct is not None
    asked = questions(shape, shape.distinct)
    run = target.serve([Arrival(0.0, *question) for question in asked], 1)
    for one in run.outcomes:
        if one.error:
            raise ConfigError(f"{target.name} did not complete a request: {one.error}")
    return {
        question: one.text for question, one in zip(asked, run.outcomes, strict=True)
    }


def measure(
    arguments: Arguments, shape: Shape, load: Load, targets: Sequence[Target]
) -> dict[str, list[Turn]]:
    """All rounds of one load: {target: its turns}. The first target of a round changes
    from round to round."""
    count = arguments.requests
    if arguments.seconds is not None and load.rate < math.inf:
        count = max(1, round(arguments.seconds * load.rate))
    turns: dict[str, list[Turn]] = {target.name: [] for target in targets}
    for number in range(arguments.rounds):
        arrivals = schedule(
            questions(shape, count, number),
            load,
            arguments.arrivals,
            arguments.burstiness,
            arguments.seed + number,
        )
        first = number % len(targets)
        for target in [*targets[first:], *targets[:first]]:
            turn = _turn(target, targets, arrivals, load.users)
            turns[target.name].append(turn)
            tokens = sum(one.tokens for one in turn.run.outcomes if not one.error)
            rate = tokens / turn.run.seconds
            text = f"  {load.name}, {target.name}: {rate:.0f} tokens/s"
            print(text, file=sys.stderr, flush=True)
    return turns


def _turn(
    target: Target, targets: Sequence[Target], arrivals: Sequence[Arrival], users: int
) -> Turn:
    before = {one.name: _processor(one) for one in targets}
    run = target.serve(arrivals, users)
    busy = {
        one.name: (_processor(one) - before[one.name]) / run.seconds for one in targets
    }
    own = busy.pop(target.name)
    return Turn(run, own, sum(busy.values()))


def _processor(target: Target) -> float:
    """Processor seconds so far; 0 where nothing tells."""
    if target.process is None:
        return 0.0
    return processor_seconds(target.process) or 0.0


def _row(
    arguments: Arguments,
    load: Load,
    target: Target,
    turns: Sequence[Turn],
    references: dict[str, dict[Question, str]],
) -> Row:
    runs = [turn.run for turn in turns]
    objective = Objective(arguments.goodput_ttft / 1e3, arguments.goodput_tpot / 1e3)
    process = target.process
    values = dict(
        load=load.name,
        server=target.name,
        rate=load.rate if load.rate < math.inf and not load.users else None,
        busy=max(turn.busy for turn in turns),
        others_busy=max(turn.others_busy for turn in turns),
        memory_bytes=memory_bytes(process) if process is not None else None,
    )
    values |= figures(
        runs,
        objective,
        all_tokens=arguments.ignore_eos,
        references=references.get(target.name),
    )
    outcomes = [one for run in runs for one in run.outcomes]
    return Row(values, latencies_of(outcomes))


def _capacity(row: Row) -> float:
    """Requests a second that a target completes; not of the engine without HTTP."""
    values = row.values
    if values["server"] == ENGINE or not values["output_tokens"]:
        return math.inf
    tokens = values["output_tokens"] / values["completed"]
    rates = values["saturated_tokens_per_s"], values["requests_per_s"]
    return capacity_of(*rates, tokens)
