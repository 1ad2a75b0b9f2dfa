"""Compares temporal fusion with other ways of batching, under load:
`ladder-jax bench decode`.

One run has one model. Every policy decodes the same requests (workloads.py), which
arrive at the same times (`--load`), with the same compiled forward pass, so that
policies differ in scheduling alone:

    sequential     decodes one request at a time
    concurrent     gives every request a decode state of its own; the states take turns
                   (the baseline of Flover's figures: concurrent model instances)
    static         starts a batch with the requests that wait, and the next batch when
                   the longest request of this one has ended. A batch of fewer requests
                   than slots still takes requests that arrive while it runs, until it
                   has had as many as there are slots
    dynamic        as static, but a batch that is not full first waits for a window of
                   time
    per-token      continuous batching by the host: one jitted call, one synchronization
                   and one scheduling decision for every token
    no-shuffle     temporal fusion, always at full width and length
    rows           temporal fusion; each slot has memory for the longest request, and
                   attention reads as much of every slot as the longest live request has
    ours           temporal fusion: the device admits requests inside the jitted loop,
                   and the compiled width follows the load. Requests have pages where
                   these are faster (decode.kv_layout=auto)
    speculate      the same, and an iteration may emit several tokens of a request: it
                   drafts `--drafts` of them from the request's own text

The model has random weights. At temperature 0 its outputs soon repeat themselves, which
is the best case of drafts; at `--temperature 1` they never do, which is the worst.

A load is "saturated", where all requests wait from the start, or a share of the
capacity: requests then arrive at random (a Poisson process) at that share of the rate
of "per-token" in its saturated run, until no request waits.

Where prompts share a beginning (the workload "shared"), the policies of temporal fusion
(no-shuffle, rows, ours, speculate) have a prefix cache, which is empty when a run
starts: see `--prefix-cache`.

Three workloads with three policies under saturated load took 2.6 minutes on two cores,
one of which was XLA's compiling; a load that is a share takes longer than a saturated
one.

The upper bound is the bare step: forward pass and argmax at full width and length in a
loop, without scheduling and without prefill. The benchmark measures it before and after
every run. "of bare" is a policy's rate over the bare step's; under saturated load, the
policy's rate until no request waits. "of matmul" is 2 FLOPs a token and parameter over
the CPU's own rate of matrix products (machine.py).

Flover gives gaps between arrivals for a model with a slower step. Unless `--unscaled`,
the benchmark multiplies them by this model's step over that model's step.

Tokens of a chunk reach the host together, so that most inter-token latencies (ITL) are
near 0 and a few are as long as a chunk. Time per output token is their mean. The
engines shorten their chunks to `--burst-ms`; those of static and dynamic batching do so
only while the batch can still grow.
"""

import dataclasses
import functools
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import (
    decode,
    decode_state,
    decode_weights,
    files,
    model,
    pages,
    sampling,
    sharding,
)
from ladder_jax.bench import machine, plots
from ladder_jax.bench.decode_loads import BASELINE, Load, read_loads
from ladder_jax.bench.latency import (
    HEAD,
    Cache,
    History,
    Objective,
    latencies_of,
    measure,
    occupancy_until_last_admission,
    peak_bytes,
    read_over_alive,
    result_table,
)
from ladder_jax.bench.policies import StaticBatches, make_policies
from ladder_jax.bench.sizes import DECODE_SIZES, multiplied_parameters
from ladder_jax.bench.workloads import (
    REALISTIC,
    WORKLOADS,
    Arrival,
    arriving,
    make_workload,
)
from ladder_jax.config import Decode, Mesh, Model, require
from ladder_jax.hardware import xla_options
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import Request

# Seconds of one iteration of GPT-J 6B in Flover's figures.
PAPER_STEP = 5.8 / 512
# How often the bare step is measured before and after every policy. The median counts.
BARE_ROUNDS = 6
# Tokens of the longest prompt and output, without `--prompt` and `--most`: of the
# workload uniform, and of the others.
SHORT, LONG = (4, 256), (512, 512)
FUSION = ("no-shuffle", "rows", "ours", "speculate")  # the policies of temporal fusion


@dataclass(frozen=True)
class Arguments:
    """Compares temporal fusion with other ways of batching, under load."""

    size: str = "tiny"
    """tiny, small, m125, 1b or 8b: a model with random weights."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    weights_dtype: Literal["auto", "int8"] = "auto"
    """int8: all policies decode with int8 weights, and the bare step is also measured
    with weights in --dtype, in turn."""
    residual: str = "ladder"
    """The residual schedule."""
    workload: str = ",".join(REALISTIC)
    """Lengths of prompts and outputs: sharegpt, long-short, short-long, shared,
    uniform, or several joined by commas."""
    load: tuple[str, ...] = ("saturated", "0.8")
    """When requests arrive: saturated; shares of the capacity of per-token, such as
    0.8; constant, poisson: with --gaps."""
    gaps: tuple[float, ...] = (500.0,)
    """Milliseconds between arrivals (constant, poisson; the paper: 20 to 5000)."""
    unscaled: bool = False
    """Do not scale gaps and windows by this model's step."""
    requests: int = 32
    """Requests of a workload."""
    prompt: int | None = None
    """Tokens of the longest prompt. sharegpt scales its lengths to --prompt + --most.
    None: 4 with uniform, else 512."""
    least: int = 128
    """The fewest output tokens of a request (uniform)."""
    most: int | None = None
    """The most output tokens. None: 256 with uniform, else 512."""
    slots: int = 16
    """Requests that decode together."""
    chunk: int = 16
    """The most decode iterations of one jitted call."""
    burst_ms: float = 50.0
    """Milliseconds that the iterations of one call may take. 0: no limit."""
    temperature: float = 0.0
    """Of all requests. 0: the likeliest token."""
    drafts: int = 4
    """The most tokens that the policy speculate drafts."""
    tensor: int = 1
    """Devices to shard the model over."""
    policies: tuple[str, ...] = ("static", "dynamic", "per-token", "ours")
    """The batching policies to compare: also sequential, concurrent, no-shuffle, rows,
    speculate."""
    prefix_cache: Literal["fusion", "all", "none"] = "fusion"
    """Which policies have a prefix cache for the workload shared: those of temporal
    fusion, all (but concurrent), or none."""
    windows: tuple[float, ...] = (500.0,)
    """Milliseconds that dynamic batching waits for requests (scaled as gaps are)."""
    goodput_ttft: float = 20.0
    """Goodput counts requests up to this time to first token, in decode steps of one
    request alone."""
    goodput_tpot: float = 3.0
    """Goodput counts requests up to this mean time per output token, in the same
    steps."""
    rounds: int = 1
    """How often every policy runs a workload and load. The table shows the run with the
    median share of the bare step."""
    seed: int = 0
    """Seeds the random numbers of the workload."""
    json: str | None = None
    """Write the results to this file."""
    plots: str | None = None
    """Write PNGs to this folder: every slot's occupancy over time, latency curves."""

    @property
    def kinds(self) -> list[str]:
        """The workloads."""
        return self.workload.split(",")

    def longest(self, kind: str) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest output of a workload."""
        prompt, most = SHORT if kind == "uniform" else LONG
        return self.prompt or prompt, self.most or most

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all workloads."""
        return max(self.longest(kind)[0] for kind in self.kinds)


# ---------------------------------------------------------------- measuring


def bare_step(
    engine: Engine, width: int, length: int, iterations: int
) -> Callable[[int], float]:
    """Compiles the bare step: forward pass and argmax, at positions from length / 2 on.

    Returns a function that measures it so many times, and returns the median seconds of
    an iteration.
    """
    spec = engine.spec
    entries = decode_state.table_size(spec, length)
    state = decode_state.empty(spec, width, 1, length, width * entries)
    table_WM = jnp.arange(width * entries, dtype=jnp.int32).reshape(width, entries)

    def local(weights: Any, token_W: jax.Array, position_W: jax.Array, kv: Any) -> Any:
        def step(_: jax.Array, carry: Any) -> Any:
            token_W, position_W, kv = carry
            reads = None
            if spec.page_size:
                reads_W = jnp.ones(width, bool)
                reads = pages.pairs(
                    table_WM, position_W, reads_W, spec.page_size, table_WM.size
                )
            x_W1D, kv = model.hidden(
                weights,
                spec.model_config,
                token_W[:, None],
                position_W[:, None],
                cache=kv,
                pages_read=reads,
            )
            logits_W1V = sharding.gather_vocabulary(
                model.logits(weights, spec.model_config, x_W1D)
            )
            token_W = sampling.argmax(logits_W1V[:, 0])
            return token_W, (position_W + 1) % length, kv

        return lax.fori_loop(0, iterations, step, (token_W, position_W, kv))

    specs = P(), P(), decode.kv_specs(spec)
    step = jax.jit(
        sharding.shard_map(
            local, spec.mesh, (decode_weights.weights_specs(spec), *specs), specs
        ),
        donate_argnums=3,
        compiler_options=xla_options.options(spec.mesh, "decode"),
    )
    tokens = np.zeros(width, np.int32)
    positions = np.full(width, length // 2, np.int32)
    kv = state.slots.kv if state.pool is None else state.pool.kv
    carry: Any = tokens, positions, kv

    def measure_step(rounds: int) -> float:
        nonlocal carry
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            carry = jax.block_until_ready(step(engine.programs.weights, *carry))
            seconds.append((time.perf_counter() - start) / iterations)
        return float(np.median(seconds[1:]))

    return measure_step


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
        if not engine.step() and future_arrivals:
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


def make_engines(bench: Bench) -> dict[str, dict[str, Any]]:
    """Builds and compiles the engines of all workloads: {workload: {policy: engine}}.

    Workloads have the same engines, unless prompts share a beginning.
    """
    arguments = bench.arguments
    policies = make_policies(
        arguments.policies,
        Decode(
            slots=arguments.slots,
            steps_per_call=arguments.chunk,
            burst_ms=arguments.burst_ms,
            max_length=bench.length,
            queue_size=10**6,
            staging=arguments.slots,
            prompt_logprobs=False,
            prefill_budget=64 if arguments.longest_prompt <= 16 else 256,
            weights_dtype=arguments.weights_dtype,
        ),
        bench.parameters,
        bench.model_config,
        bench.mesh,
        [window * 1e-3 * bench.scale for window in arguments.windows],
        arguments.drafts,
    )

    # The blocks of all prompts on the device, and as many again.
    prefix_tokens = 4 * arguments.slots * arguments.longest_prompt
    prefixes = dict(prefix_memory=str(prefix_tokens * bench.token_bytes))

    @functools.cache
    def engine(name: str, has_prefixes: bool) -> Any:
        made = policies[name](**prefixes if has_prefixes else {})
        made.warm_up()
        return made

    return {
        kind: {
            name: engine(name, kind == "shared" and has_prefix_cache(arguments, name))
            for name in policies
        }
        for kind in arguments.kinds
    }


def has_prefix_cache(arguments: Arguments, policy: str) -> bool:
    """Whether a policy has a prefix cache where prompts share a beginning."""
    if arguments.prefix_cache == "fusion":
        return policy in FUSION
    return arguments.prefix_cache == "all" and policy != "concurrent"


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
            capacity = figures["saturated_tokens_per_s"] / float(mean_tokens)
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
        pairs=pages.PAIRS,
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


# ---------------------------------------------------------------- the benchmark


def run(arguments: Arguments) -> dict[str, Any]:
    """Runs the benchmark. Prints tables, writes what `json` and `plots` name, and
    returns the results. Raises ConfigError for arguments that are not accepted."""
    _check(arguments)
    loads = read_loads(arguments.load, arguments.gaps, arguments.policies)
    bench = set_up(arguments)
    single_step_ms = bench.single_step * 1e3
    full_step = bench.measure_bare_step(BARE_ROUNDS)
    rate = arguments.slots / full_step
    gain = rate * bench.single_step
    device = jax.devices()[0].device_kind
    print(
        f"{arguments.size}, {arguments.dtype}, {arguments.residual}, "
        f"tensor {arguments.tensor}, {arguments.slots} slots, "
        f"chunks of {arguments.chunk}, {bench.cpu or device}\n"
        f"bare step: {single_step_ms:.2f} ms at width 1, {full_step * 1e3:.2f} ms at "
        f"width {arguments.slots} = {rate:.0f} tokens/s, "
        f"so batching can gain {gain:.1f}x"
    )
    if bench.int8_gain:
        gains = ", ".join(f"{x:.2f}x at width {w}" for w, x in bench.int8_gain.items())
        print(
            f"int8 weights: the bare step is {gains} as fast as with {arguments.dtype}"
        )
    if not arguments.unscaled:
        print(
            f"gaps and windows are scaled by {bench.scale:.3f}: this model's step over "
            "the paper's"
        )
    if "shared" in arguments.kinds:
        having = [p for p in arguments.policies if has_prefix_cache(arguments, p)]
        print(f"shared prompts: a prefix cache for {', '.join(having) or 'no policy'}")
    engines = make_engines(bench)
    turns = {
        kind: compare(bench, engines[kind], kind, loads) for kind in arguments.kinds
    }
    rows = [
        dict(workload=kind, load=load, policy=policy) | turn.figures
        for kind, of_kind in turns.items()
        for load, of_load in of_kind.items()
        for policy, turn in of_load.items()
    ]
    print(f"{HEAD}\n\n{arguments.requests} requests a run\n{result_table(rows)}")
    for kind, of_kind in turns.items():
        for load, of_load in of_kind.items():
            if arguments.plots:
                for path in _plot(arguments.plots, f"{kind} {load}", of_load):
                    print(f"wrote {path}")
    output = dict(
        arguments=dataclasses.asdict(arguments),
        device=device,
        machine=bench.cpu._asdict() if bench.cpu else None,
        batch_gain=gain,
        int8_gain=bench.int8_gain,
        step_ms={"1": single_step_ms, str(arguments.slots): full_step * 1e3},
        bare_step_tokens_per_s=rate,
        workloads={
            kind: {
                load: {policy: turn.figures for policy, turn in of_load.items()}
                for load, of_load in of_kind.items()
            }
            for kind, of_kind in turns.items()
        },
    )
    if arguments.json:
        files.write_text(arguments.json, json.dumps(output, indent=1))
    return output


def _check(arguments: Arguments) -> None:
    sizes, workloads = ", ".join(DECODE_SIZES), ", ".join(WORKLOADS)
    dtypes = ", ".join(machine.DTYPES)
    require(arguments.size in DECODE_SIZES, "size", arguments.size, f"one of {sizes}")
    require(
        arguments.dtype in machine.DTYPES, "dtype", arguments.dtype, f"one of {dtypes}"
    )
    for kind in arguments.kinds:
        require(kind in WORKLOADS, "workload", kind, f"one of {workloads}")
    positive = "requests", "prompt", "least", "most", "slots", "chunk", "tensor"
    for name in (*positive, "rounds"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, name, value, "1 or more")
    if "uniform" in arguments.kinds:
        most, least = arguments.longest("uniform")[1], arguments.least
        require(most >= least, "most", most, f"at least least={least}")


def set_up(arguments: Arguments) -> Bench:
    """Initializes the model, and measures the bare step at width 1."""
    most = max(sum(arguments.longest(kind)) for kind in arguments.kinds)
    length = -(-most // 64) * 64
    changes: Any = dict(
        residual=arguments.residual, dtype=arguments.dtype, max_length=length
    )
    model_config = dataclasses.replace(DECODE_SIZES[arguments.size], **changes)
    mesh = sharding.make_mesh(
        Mesh(data=1, tensor=arguments.tensor), jax.devices()[: arguments.tensor]
    )
    sharding.check_fits(model_config, mesh)
    specs = sharding.parameter_specs(model.abstract(model_config))
    init = jax.jit(
        functools.partial(model.init, model_config),
        out_shardings=sharding.named_shardings(mesh, specs),
    )
    parameters = init(jax.random.key(0))
    options = Decode(
        slots=arguments.slots,
        steps_per_call=arguments.chunk,
        max_length=length,
        weights_dtype=arguments.weights_dtype,
    )
    probe = Engine(parameters, model_config, mesh, options)
    int8_gain = None
    if arguments.weights_dtype == "int8":
        full = dataclasses.replace(options, weights_dtype="auto")
        other = Engine(parameters, model_config, mesh, full)
        int8_gain = compare_weights(arguments, other, probe, length)
        del other
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return Bench(
        arguments,
        parameters,
        model_config,
        mesh,
        length,
        probe.capacity.token_bytes,
        single_step=bare_step(probe, 1, length, arguments.chunk)(BARE_ROUNDS),
        measure_bare_step=bare_step(probe, arguments.slots, length, arguments.chunk),
        cpu=machine.measure() if on_cpu else None,
        int8_gain=int8_gain,
    )


def compare_weights(
    arguments: Arguments, full: Engine, int8: Engine, length: int
) -> dict[str, float]:
    """Measures the bare step of two engines in turn, at width 1 and at full width.

    Returns {width: the time with weights in --dtype over that with int8 weights}.
    """
    gain = {}
    for width in sorted({1, arguments.slots}):
        steps = [
            bare_step(engine, width, length, arguments.chunk) for engine in (full, int8)
        ]
        rounds = [[step(1) for step in steps] for _ in range(BARE_ROUNDS)]
        seconds = np.median(rounds, axis=0)
        gain[str(width)] = float(seconds[0] / seconds[1])
    return gain


def _plot(folder: str, title: str, turns: dict[str, Turn]) -> list[Path]:
    traced = {name: turn.history for name, turn in turns.items() if turn.history}
    latencies = {name: latencies_of(turn.requests) for name, turn in turns.items()}
    return [
        *(
            plots.draw_occupancy(folder, title, name, history)
            for name, history in traced.items()
        ),
        plots.draw_latencies(folder, title, latencies),
    ]
