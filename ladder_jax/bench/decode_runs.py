"""Runs the policies of `ladder-jax bench decode` on requests that arrive over time."""

import dataclasses
import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ladder_jax import model, pages
from ladder_jax.bench import machine
from ladder_jax.bench.bare_step import BARE_ROUNDS
from ladder_jax.bench.decode_arguments import Arguments
from ladder_jax.bench.decode_loads import BASELINE, Load
from ladder_jax.bench.latency import (
    Cache,
    History,
    Objective,
    capacity_of,
    measure,
    occupancy_until_last_admission,
    peak_bytes,
    read_over_alive,
)
from ladder_jax.bench.policies import StaticBatches
from ladder_jax.bench.sizes import multiplied_parameters
from ladder_jax.bench.workloads import Arrival, arriving, make_workload
from ladder_jax.config import Model
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import Request

# Seconds of one iteration of GPT-J 6B in Flover's figures.
PAPER_STEP = 5.8 / 512


def serve(
    engine: Any, arrivals: Sequence[Arrival], users: int = 0, **options: Any
) -> tuple[list[Request], float]:
    """Submits every request at its arrival, and steps the engine until all are done.

    Args:
      engine: an Engine, or what has its `submit` and `step`.
      arrivals: the requests, in the order of arrival.
      users: submit the next request when fewer than these are unfinished, whatever its
        arrival says. 0: as the arrivals say.
      options: of Engine.submit.
    Returns the requests, and the seconds from start to end.
    """
    scheduler = getattr(engine, "scheduler", None)
    if isinstance(scheduler, StaticBatches):
        scheduler.expected = len(arrivals)
    step = engine.step
    if isinstance(engine, Engine):  # as its thread does, when requests come over time
        step = functools.partial(engine.step, wait=True)
    start, future_arrivals = time.perf_counter(), deque(arrivals)
    requests: list[Request] = []
    unfinished: list[Request] = []

    def is_due() -> bool:
        if users:
            return len(unfinished) < users
        return future_arrivals[0].seconds <= time.perf_counter() - start

    while future_arrivals or unfinished:
        while future_arrivals and is_due():
            arrival = future_arrivals.popleft()
            request = engine.submit(
                arrival.prompt, max_tokens=arrival.max_tokens, **options
            )
            if not users:
                request.submitted = start + arrival.seconds
            requests.append(request)
            unfinished.append(request)
        if not step() and future_arrivals:
            until_next = future_arrivals[0].seconds - (time.perf_counter() - start)
            time.sleep(max(0.0, min(until_next, 0.01)))
        unfinished = [request for request in unfinished if not request.finish]
    return requests, time.perf_counter() - start


class Turn(NamedTuple):
    """One run of a policy on a workload."""

    figures: dict[str, Any]  # see latency.measure
    requests: list[Request]
    history: History  # empty where the engine does not trace


class Bench(NamedTuple):
    """The model, the devices and the limits that all workloads of a run share."""

    arguments: Arguments
    parameters: model.Transformer
    model_config: Model
    mesh: jax.sharding.Mesh
    length: int  # tokens of a row of the decode state
    token_bytes: int  # of the keys and values of a token on one device
    single_step: float  # seconds of the bare step at width 1
    measure_bare_step: Callable[[int], float]  # see bare_step; at full width
    cpu: machine.Machine | None  # None on an accelerator
    int8_gain: dict[str, float] | None  # by width; see compare_weights

    @property
    def scale(self) -> float:
        """The factor for gaps and windows."""
        return 1.0 if self.arguments.unscaled else self.single_step / PAPER_STEP


def compare(
    bench: Bench, engines: dict[str, Any], kind: str, loads: Sequence[Load]
) -> dict[str, dict[str, Turn]]:
    """Runs all policies on one workload.

    Args:
      bench: the model and its devices.
      engines: of the policies.
      kind: of WORKLOADS.
      loads: a saturated one first, if there is a share of the capacity.
    Returns {load: {policy: its median turn}}.
    """
    arguments = bench.arguments
    prompt, most = arguments.longest(kind)
    requests = make_workload(
        kind,
        requests=arguments.requests,
        prompt=prompt,
        outputs=(arguments.least, most),
        length=bench.length,
        vocabulary=bench.model_config.vocab_size,
        seed=arguments.seed,
    )
    for engine in engines.values():
        serve(engine, _short(requests, arguments))
    turns: dict[str, dict[str, Turn]] = {}
    capacity = 0.0  # requests a second
    for load in loads:
        gap = 1 / (load.share * capacity) if load.share else load.gap * bench.scale
        arrivals = requests
        if not load.is_saturated:
            arrivals = arriving(requests, load.arrivals, gap, arguments.seed)
        print(f"{kind}, {load.name}:", file=sys.stderr, flush=True)
        turns[load.name] = run_load(bench, engines, arrivals, load.is_saturated)
        if load.is_saturated and BASELINE in engines:
            mean_tokens = np.mean([request.max_tokens for request in requests])
            figures = turns[load.name][BASELINE].figures
            run = len(requests) / figures["makespan_s"]
            saturated = figures["saturated_tokens_per_s"]
            capacity = capacity_of(saturated, run, float(mean_tokens))
    return turns


def run_load(
    bench: Bench, engines: dict[str, Any], arrivals: list[Arrival], saturated: bool
) -> dict[str, Turn]:
    """Runs all policies on these requests. Returns {policy: its median turn}."""
    turns: dict[str, list[Turn]] = {name: [] for name in engines}
    # The policies take turns, since the speed of the machine changes with time.
    for _ in range(bench.arguments.rounds):
        for name, engine in engines.items():
            turn = run_policy(bench, engine, arrivals, saturated)
            turns[name].append(turn)
            rate = turn.figures["tokens_per_s"]
            print(f"  {name}: {rate:.0f} tokens/s", file=sys.stderr, flush=True)
    medians = {}
    for name, rounds in turns.items():
        ordered = sorted(rounds, key=lambda turn: turn.figures["of_bare"])
        medians[name] = ordered[len(ordered) // 2]
        medians[name].figures["of_bare_of_rounds"] = [
            turn.figures["of_bare"] for turn in rounds
        ]
    return medians


def _short(arrivals: list[Arrival], arguments: Arguments) -> list[Arrival]:
    """The first requests of a workload, shortened. They make every engine compile."""
    return [
        dataclasses.replace(
            arrival,
            seconds=0.0,
            max_tokens=min(arrival.max_tokens, 3 * arguments.chunk),
        )
        for arrival in arrivals[: 2 * arguments.slots]
    ]


def run_policy(
    bench: Bench, engine: Any, arrivals: list[Arrival], saturated: bool
) -> Turn:
    """Runs these requests once, between two measurements of the bare step.

    saturated: whether all of them arrive at once.
    """
    arguments = bench.arguments
    _forget(engine)
    before = bench.measure_bare_step(BARE_ROUNDS)
    requests, seconds = serve(engine, arrivals, temperature=arguments.temperature)
    after = bench.measure_bare_step(BARE_ROUNDS)
    step = (before + after) / 2
    objective = Objective(
        ttft=arguments.goodput_ttft * bench.single_step,
        tpot=arguments.goodput_tpot * bench.single_step,
    )
    figures = measure(requests, arrivals, seconds, engine.counters, objective)
    rate = figures["saturated_tokens_per_s" if saturated else "tokens_per_s"]
    figures["bare_step_tokens_per_s"] = arguments.slots / step
    figures["of_bare"] = rate / figures["bare_step_tokens_per_s"]
    if bench.cpu is not None:
        flops = 2 * multiplied_parameters(bench.model_config) * rate
        figures["of_matmul"] = bench.cpu.share(arguments.dtype, flops)
    history = list(getattr(engine, "history", []))
    if history:
        figures |= _traced_figures(engine, requests)
    return Turn(figures, requests, history)


def _forget(engine: Any) -> None:
    """Empties an engine's counters, trace and prefix cache."""
    engine.counters.reset()
    if isinstance(engine, Engine):
        engine.history.clear()
        while engine.prefixes.blocks():
            engine.prefixes.evict()


def _traced_figures(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """The figures of a run that need the engine's trace."""
    capacity, history = engine.capacity, engine.history
    cache = Cache(
        token_bytes=capacity.token_bytes,
        page_size=capacity.page_size,
        pairs=pages.FEW,
        staging_size=capacity.staging_size,
        prefix_bytes=engine.prefixes.used_bytes,
    )
    prompts = {request.number: len(request.prompt) for request in requests}
    ratio = None  # where an iteration may give a request several tokens, or take some
    if not (engine.counters.preempted or engine.counters.drafted):
        ratio = read_over_alive(history, prompts, cache)
    return dict(
        occupancy_until_last_admission=occupancy_until_last_admission(history),
        kv_layout="pages" if capacity.page_size else "rows",
        kv_mib=peak_bytes(history, cache) / 2**20,
        kv_read_over_alive=ratio,
        prefix_tokens=engine.counters.prefix_tokens,
    )
