"""Decoding under load, temporal fusion beside the ways it replaces: `ladder-jax bench decode`.

One run, one model, one set of requests with one schedule of arrivals; every engine decodes them with the same compiled
forward pass, so that they differ in scheduling alone:

    sequential     one request at a time
    concurrent     every request for itself, taking turns (the baseline of Flover's figures: concurrent model instances)
    static         a batch of what waits, to the end of its longest request
    dynamic        the same, but a batch that is not full first waits a window for more
    per-token      continuous batching by the host: one jitted call, one synchronisation and one decision a token
    no-shuffle     ours, always at full width and length
    ours           temporal fusion: refill inside the chunk, shape fitted to what is live

and, as the limit, the bare step: forward pass and argmax at full width and length in a loop, no scheduling at all,
measured before and after every engine. Under saturated load "of bare" counts the tokens until no request waits.

Workloads: `saturated` (all at once, short prompts, so that scheduling is measured and not prefill), `constant` and
`poisson` (gaps between arrivals; Flover, arXiv 2305.13484: 20 to 5000 ms for a model whose step
takes 11.3 ms; here gaps are scaled by this model's step, unless --unscaled), `sharegpt` (log-normal lengths with
means 161 in and 338 out, from memory and not checked, scaled to fit). Output lengths are Uniform(least, most)
elsewhere.

Latencies count from the scheduled arrival. Tokens of a chunk reach the host together, so inter-token latency has a
median near 0 and the chunk's length in its tail; time per output token averages it out.
"""

import dataclasses
import functools
import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import decode, sampling, sharding
from ladder_jax import model as transformer
from ladder_jax.config import ConfigError, Decode, Mesh, Model
from ladder_jax.hardware import xla_options
from ladder_jax.serve.buckets import round_up
from ladder_jax.serve.counters import Counters
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.programs import slot_state
from ladder_jax.serve.scheduler import Limits, Load, Step, plan_step

SIZES = {
    "tiny": Model(
        vocab_size=512, dim=128, layers=4, heads=4, kv_heads=4, head_dim=32, ffn_dim=384
    ),
    "small": Model(
        vocab_size=4096,
        dim=512,
        layers=8,
        heads=8,
        kv_heads=4,
        head_dim=64,
        ffn_dim=1536,
    ),
    "m125": Model(
        vocab_size=32000,
        dim=768,
        layers=12,
        heads=12,
        kv_heads=12,
        head_dim=64,
        ffn_dim=2048,
    ),
    "1b": Model(
        vocab_size=128256,
        dim=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn_dim=8192,
    ),
    "8b": Model(
        vocab_size=128256,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
    ),
}
PAPER_STEP = 5.8 / 512  # seconds of one iteration of GPT-J 6B in Flover's figures
PERCENTILES = (50, 90, 99)
BARE_ROUNDS = 6  # measurements of the bare step before and after every engine; their median counts


@dataclass(frozen=True)
class Arguments:
    """Decoding under load: temporal fusion beside sequential, concurrent, static, dynamic and per-token batching."""

    size: str = "tiny"
    """tiny, small, m125, 1b or 8b: a model with random weights."""
    dtype: str = "float32"
    residual: str = "ladder"
    workload: str = "saturated"
    """saturated, constant, poisson, sharegpt, or several joined by commas."""
    gaps: tuple[float, ...] = (500.0,)
    """Milliseconds between arrivals, of the constant and poisson workloads (the paper: 20 to 5000)."""
    unscaled: bool = False
    """Take gaps as they are."""
    requests: int = 64
    prompt: int = 4
    """Tokens of a prompt (sharegpt: most of them)."""
    least: int = 128
    most: int = 256
    """Output tokens are Uniform(least, most)."""
    slots: int = 8
    chunk: int = 16
    tensor: int = 1
    engines: tuple[str, ...] = ()
    """Of those compared (default: all)."""
    windows: tuple[float, ...] = (500.0,)
    """Milliseconds that dynamic batching waits for more (scaled as gaps are)."""
    goodput_ttft: float = 20.0
    goodput_tpot: float = 3.0
    """A request is good whose first token comes within so many steps of one request alone, and the others, on average,
    at so many steps each."""
    rounds: int = 1
    """Times that every engine runs the workload, the bare step before and after each; the round whose share of the bare
    step is the median is shown."""
    seed: int = 0
    json: str | None = None
    """A file for the results."""
    plots: str | None = None
    """A folder for PNGs: every slot's occupancy over time, latency curves."""


@dataclass(frozen=True)
class Asked:
    """One request of a workload."""

    arrival: float  # seconds after the start
    prompt: tuple[int, ...]
    max_tokens: int


def workload(kind, gap, arguments, vocabulary, length):
    """The requests [Asked], by arrival. `gap`: seconds between arrivals, on average."""
    rng, n = np.random.default_rng(arguments.seed), arguments.requests
    if (
        kind == "sharegpt"
    ):  # log-normal with these means and long tails, cut to what fits
        scale = min(1.0, length / 1024)
        prompts = np.clip(
            rng.lognormal(np.log(161 * scale) - 0.5, 1.0, n), 1, length // 2
        ).astype(int)
        outputs = np.clip(
            rng.lognormal(np.log(338 * scale) - 0.32, 0.8, n), 1, length // 2
        ).astype(int)
    else:
        prompts = np.full(n, arguments.prompt)
        outputs = rng.integers(arguments.least, arguments.most + 1, n)
    gaps = {"constant": np.full(n, gap), "poisson": rng.exponential(gap, n)}.get(
        kind, np.zeros(n)
    )
    gaps[0] = 0
    return [
        Asked(float(at), tuple(rng.integers(0, vocabulary, p).tolist()), int(o))
        for at, p, o in zip(np.cumsum(gaps), prompts, outputs)
    ]


# ---------------------------------------------------------------- the engines that are compared


class StaticBatches:
    """A scheduler of static batching: the next batch starts when this one has ended.

    A batch that is not full first waits `window` seconds, counted from the submission
    of its oldest request; after it has started, it still takes requests until it is
    full. expected: requests that are still to come in this run.
    """

    def __init__(self, window: float) -> None:
        self.window, self.expected = window, 0
        self._room = 0  # requests that may still join the batch

    def __call__(self, load: Load, limits: Limits) -> Step:
        busy = bool(load.on_device)
        if not busy and not load.unread_chunks and load.candidates:
            waited = time.perf_counter() - min(w.submitted for w in load.candidates)
            is_full = load.queued >= min(limits.slots, self.expected)
            opens = is_full or waited >= self.window
            self._room = limits.slots if opens else 0
        candidates = load.candidates[: self._room]
        load = dataclasses.replace(
            load, candidates=candidates, queued=min(load.queued, self._room)
        )
        # The batch keeps the width that it began with.
        limits = dataclasses.replace(limits, patience=10**9 if busy else 0)
        step = plan_step(load, limits)
        self._room -= step.admit
        self.expected -= step.admit
        if step.steps and not self._room:
            step = step._replace(steps=limits.steps_per_call)
        return step


class Concurrent:
    """Every request has a state of its own, one slot wide; their chunks take turns on the device."""

    def __init__(self, engine):
        self.like, self.waiting, self.running = engine, deque(), deque()
        self.counters = Counters()

    def submit(self, prompt, max_tokens):
        # Its handle alone: the engine never takes a step with it.
        request = self.like.submit(prompt, max_tokens=max_tokens)
        self.like.stepper.queue.remove(request)
        length = round_up(self.like.capacity.lengths, len(prompt) + max_tokens)
        self.running.append(
            (request, decode.empty(self.like.spec, 1, 1, length), False)
        )
        return request

    def warm_up(self):
        self.like.warm_up()

    def step(self):
        if not self.running:
            return False
        engine = self.like
        request, state, started = self.running.popleft()
        prefills = []
        if not started:
            n = len(request.prompt)
            width = round_up(engine.capacity.lengths, n)
            one = lambda value, kind=np.int32: np.asarray([value], kind)
            tokens = np.zeros((1, width), np.int32)
            tokens[0, :n] = request.prompt
            staging, events = engine.programs.prefill(
                engine.programs.weights,
                state.staging,
                decode.Prompts(
                    tokens,
                    one(0),
                    one(n),
                    one(0),
                    one(True, bool),
                    tokens,
                    slot_state(
                        request.number,
                        request.submission,
                        admission_order=0,
                        max_stop_ids=engine.options.max_stop_ids,
                    ),
                ),
            )
            state = state._replace(staging=staging)
            prefills.append(jax.tree.map(lambda x: x[None], events))
        nobody = np.full(engine.programs.most_cancelled, decode.NO_REQUEST, np.int32)
        chunk = engine.options.steps_per_call
        state, events, _ = engine.programs.chunks[chunk](
            engine.programs.weights, state, nobody, np.int32(chunk)
        )
        self.counters.syncs += 1
        for made in jax.device_get([*prefills, events]):
            for k in np.flatnonzero(made.flag):
                request.tokens.append(int(made.token.flat[k]))
                request.times.append(time.perf_counter())
                self.counters.tokens += 1
                if made.flag.flat[k] != decode.TOKEN:
                    request.finish = "length"
        if not request.finish:
            self.running.append((request, state, True))
        return True


def make_engines(arguments, model, config, mesh, length, windows, prompt):
    """{name: a function that makes the engine}; `prompt`: tokens of the longest."""
    options = Decode(
        slots=arguments.slots,
        steps_per_call=arguments.chunk,
        max_length=length,
        queue_size=10**6,
        staging=arguments.slots,
        prefill_budget=64 if prompt <= 16 else 256,
    )
    placed = {}

    def make(scheduler=plan_step, pipelined=True, trace=False, **changes):
        engine = Engine(
            model,
            config,
            mesh,
            dataclasses.replace(options, **changes),
            scheduler=scheduler,
            trace=trace,
            pipelined=pipelined,
        )
        # All engines exist at the same time: they share one copy of the weights.
        programs = engine.programs
        programs.weights = placed.setdefault(engine.spec, programs.weights)
        return engine

    def batched(window):
        return make(StaticBatches(window))

    engines = {
        "sequential": lambda: make(slots=1, staging=1),
        "concurrent": lambda: Concurrent(make(slots=1, staging=1, steps_per_call=4)),
        "static": lambda: batched(0.0),
        **{f"dynamic {w * 1e3:.0f} ms": functools.partial(batched, w) for w in windows},
        "per-token": lambda: make(steps_per_call=1, pipelined=False, fit_shapes=True),
        "no-shuffle": lambda: make(fit_shapes=False, trace=True),
        "ours": lambda: make(trace=True),
    }
    wanted = arguments.engines or tuple(engines)
    for name in wanted:
        if not any(known.split()[0] == name.split()[0] for known in engines):
            raise ConfigError(
                f"engines={name!r} is not accepted: it must be among {', '.join(engines)}"
            )
    return {
        name: made
        for name, made in engines.items()
        if any(name.split()[0] == w.split()[0] for w in wanted)
    }


# ---------------------------------------------------------------- measuring


def bare_step(engine, width, length, iterations):
    """A function (rounds) -> seconds of one iteration, median, of forward pass and argmax alone, at half the length."""
    program, S = engine.spec, length
    state = decode.empty(program, width, 1, S)

    def local(weights, token_W, position_W, kv):
        def step(_, carry):
            token_W, position_W, kv = carry
            x, kv = transformer.hidden(
                weights, program.model_config, token_W[:, None], position_W[:, None], cache=kv
            )
            logits = sharding.gather_vocabulary(
                transformer.logits(weights, program.model_config, x)
            )[:, 0]
            return sampling.argmax(logits), (position_W + 1) % S, kv

        return lax.fori_loop(0, iterations, step, (token_W, position_W, kv))

    specs = P(), P(), decode.kv_specs(program)
    step = jax.jit(
        sharding.shard_map(
            local, program.mesh, (decode.weights_specs(program), *specs), specs
        ),
        donate_argnums=3,
        compiler_options=xla_options.options(program.mesh, "decode"),
    )
    carry = np.zeros(width, np.int32), np.full(width, S // 2, np.int32), state.slots.kv

    def measure(rounds):
        nonlocal carry
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            carry = jax.block_until_ready(step(engine.programs.weights, *carry))
            seconds.append((time.perf_counter() - start) / iterations)
        return float(np.median(seconds[1:]))

    return measure


def serve(engine, asked):
    """Submits every request at its arrival and steps the engine until all are done: (requests, seconds it took)."""
    scheduler = getattr(engine, "scheduler", None)
    if isinstance(scheduler, StaticBatches):
        scheduler.expected = len(asked)
    start, requests, coming = time.perf_counter(), [], deque(asked)
    open_requests = deque()
    while coming or open_requests:
        now = time.perf_counter() - start
        while coming and coming[0].arrival <= now:
            one = coming.popleft()
            request = engine.submit(list(one.prompt), max_tokens=one.max_tokens)
            request.submitted = start + one.arrival
            requests.append(request)
            open_requests.append(request)
        if not engine.step() and coming:
            time.sleep(
                max(0.0, min(coming[0].arrival - (time.perf_counter() - start), 0.01))
            )
        while open_requests and open_requests[0].finish:
            open_requests.popleft()
    return requests, time.perf_counter() - start


def percentiles(values):
    """{p50, p90, p99} in milliseconds, of seconds."""
    return {
        f"p{p}": float(np.percentile(values, p)) * 1e3 if len(values) else None
        for p in PERCENTILES
    }


def measure(requests, seconds, counters, asked, objective):
    """The metrics of one engine on one workload."""
    for request, one in zip(requests, asked):
        if len(request.tokens) != one.max_tokens:
            raise ArithmeticError(
                f"a request has {len(request.tokens)} tokens, not {one.max_tokens}"
            )
    ttft = [r.times[0] - r.submitted for r in requests]
    tpot = [(r.times[-1] - r.times[0]) / max(len(r.times) - 1, 1) for r in requests]
    itl = np.concatenate([np.diff(r.times) for r in requests])
    good = np.mean(
        [a <= objective[0] and b <= objective[1] for a, b in zip(ttft, tpot)]
    )
    tokens = sum(len(r.tokens) for r in requests)
    # while there is work for every slot: until the request that decodes last begins to (a first token is prefill's)
    until = max(r.times[min(1, len(r.times) - 1)] for r in requests)
    begun = min(r.submitted - one.arrival for r, one in zip(requests, asked))
    saturated = sum(time <= until for r in requests for time in r.times) / (
        until - begun
    )
    return dict(
        tokens_per_s=tokens / seconds,
        saturated_tokens_per_s=saturated,
        makespan_s=seconds,
        ttft_ms=percentiles(ttft),
        tpot_ms=percentiles(tpot),
        itl_ms=percentiles(itl),
        e2e_ms=percentiles([r.times[-1] - r.submitted for r in requests]),
        goodput=float(good),
        syncs_per_token=counters.syncs / tokens,
        occupancy=counters.occupancy if counters.slot_iterations else None,
    )


def saturated_occupancy(history):
    """The share of slot iterations that made a token, up to the iteration in which the last request was admitted."""
    rows = [row for _, chunk in history for row in chunk]
    seen, last = set(), 0
    for i, row in enumerate(rows):
        if new := set(row[row >= 0].tolist()) - seen:
            seen |= new
            last = i
    busy = sum(int((row >= 0).sum()) for row in rows[: last + 1])
    return busy / max(sum(row.size for row in rows[: last + 1]), 1)


def compare(kind, gap, arguments, model, config, mesh, length, alone, bare):
    """One workload: the results as JSON would have them, and what the plots need. `bare`: see `bare_step`."""
    scale = 1.0 if arguments.unscaled else alone / PAPER_STEP
    asked = workload(kind, gap * 1e-3 * scale, arguments, config.vocab_size, length)
    objective = arguments.goodput_ttft * alone, arguments.goodput_tpot * alone
    windows = [w * 1e-3 * scale for w in arguments.windows]
    longest = max(len(one.prompt) for one in asked)
    engines, turns = {}, {}
    for name, make in make_engines(
        arguments, model, config, mesh, length, windows, longest
    ).items():
        engines[name], turns[name] = make(), []
        engines[name].warm_up()
        serve(
            engines[name],
            [
                dataclasses.replace(
                    one,
                    arrival=0.0,
                    max_tokens=min(one.max_tokens, 3 * arguments.chunk),
                )
                for one in asked[: 2 * arguments.slots]
            ],
        )
    for _ in range(arguments.rounds):  # all in turns, as the machine's pace changes
        for name, engine in engines.items():
            engine.counters.reset()
            getattr(engine, "history", []).clear()
            before = bare(BARE_ROUNDS)
            requests, seconds = serve(engine, asked)
            step = (
                before + bare(BARE_ROUNDS)
            ) / 2  # the machine's pace while this engine was measured
            made = measure(requests, seconds, engine.counters, asked, objective)
            made["bare_step_tokens_per_s"] = arguments.slots / step
            rate = made[
                "saturated_tokens_per_s" if kind == "saturated" else "tokens_per_s"
            ]
            made["of_bare"] = rate / made["bare_step_tokens_per_s"]
            history = list(getattr(engine, "history", []))
            if history and kind == "saturated":
                made["occupancy_while_saturated"] = saturated_occupancy(history)
            turns[name].append((made, (requests, history)))
            print(
                f"  {name}: {made['tokens_per_s']:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    results, kept = {}, {}
    for name, rounds in turns.items():
        results[name], kept[name] = sorted(rounds, key=lambda turn: turn[0]["of_bare"])[
            len(rounds) // 2
        ]
        results[name]["of_bare_of_rounds"] = [made["of_bare"] for made, _ in rounds]
    return results, kept


def table(title, results):
    """Results as text."""
    lines = [
        title,
        f"{'engine':16}{'tokens/s':>9}{'of bare':>8}{'makespan':>9} {'TTFT ms p50/p99':>17}"
        f"{'TPOT ms p50/p99':>17}{'e2e ms p50/p99':>19}{'goodput':>8}{'occup.':>7}{'syncs/tok':>10}",
    ]
    pair = lambda r, name, form: f"{r[name]['p50']:{form}}/{r[name]['p99']:{form}}"
    for name, r in results.items():
        occupancy = r.get("occupancy_while_saturated") or r["occupancy"]
        lines.append(
            f"{name:16}{r['tokens_per_s']:9.0f}{r['of_bare']:8.1%}{r['makespan_s']:8.2f}s "
            f"{pair(r, 'ttft_ms', '.0f'):>17}{pair(r, 'tpot_ms', '.2f'):>17}{pair(r, 'e2e_ms', '.0f'):>19}"
            f"{r['goodput']:8.0%}{'' if occupancy is None else f'{occupancy:.1%}':>7}"
            f"{r['syncs_per_token']:10.4f}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures


def plot(folder, title, results, kept):
    """Writes PNGs: who holds every slot over time, and latency curves. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem, paths = title.replace(" ", "_").replace(",", ""), []
    for name in ("ours", "no-shuffle"):
        history = kept.get(name, (None, []))[1]
        if not history:
            continue
        W = max(chunk.shape[1] for _, chunk in history)
        rows = np.concatenate(
            [
                np.pad(chunk, [(0, 0), (0, W - chunk.shape[1])], constant_values=-2)
                for _, chunk in history
            ]
        )
        first = rows[rows >= 0].min()
        shown = np.where(
            rows == -2, np.nan, np.where(rows < 0, -1, (rows - first) % 19)
        )
        figure, axes = plt.subplots(
            figsize=(11, 1.2 + 0.22 * W), constrained_layout=True
        )
        colours = plt.get_cmap("tab20").copy()
        colours.set_under("white")
        colours.set_bad("0.85")
        axes.imshow(
            shown.T,
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            vmin=0,
            vmax=19,
        )
        axes.set(
            xlabel="iteration",
            ylabel="slot",
            title=f"{title}, {name}: a colour a request; white: idle, "
            "grey: not compiled in",
        )
        paths.append(folder / f"occupancy_{stem}_{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4), constrained_layout=True, sharey=True
    )
    for name, (requests, _) in kept.items():
        curves = (
            [r.times[0] - r.submitted for r in requests],
            [r.times[-1] - r.submitted for r in requests],
            [(r.times[-1] - r.times[0]) / max(len(r.times) - 1, 1) for r in requests],
        )
        for axis, values in zip(axes, curves):
            axis.plot(
                np.sort(values) * 1e3,
                (np.arange(len(values)) + 1) / len(values),
                label=name,
                linewidth=2.5 if name == "ours" else 1.2,
            )
    for axis, label in zip(
        axes, ("time to first token, ms", "end to end, ms", "time per output token, ms")
    ):
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    paths.append(folder / f"latency_{stem}.png")
    figure.savefig(paths[-1], dpi=110)
    plt.close(figure)
    return paths


# ---------------------------------------------------------------- the benchmark


def run(arguments):
    """The whole benchmark; prints tables, writes what `json` and `plots` name, returns the results."""
    kinds = arguments.workload.split(",")
    for name, value, known in (
        ("size", arguments.size, SIZES),
        *(
            ("workload", kind, ("saturated", "constant", "poisson", "sharegpt"))
            for kind in kinds
        ),
    ):
        if value not in known:
            raise ConfigError(
                f"{name}={value!r} is not accepted: it must be one of {', '.join(known)}"
            )
    for name in ("requests", "prompt", "least", "slots", "chunk", "tensor", "rounds"):
        if getattr(arguments, name) < 1:
            raise ConfigError(
                f"{name}={getattr(arguments, name)} is not accepted: it must be 1 or more"
            )
    if arguments.most < arguments.least:
        raise ConfigError(
            f"most={arguments.most} is not accepted: it must be at least least={arguments.least}"
        )
    length = -(-(arguments.prompt + arguments.most) // 64) * 64
    config = dataclasses.replace(
        SIZES[arguments.size],
        residual=arguments.residual,
        dtype=arguments.dtype,
        max_length=length,
    )
    mesh = sharding.make_mesh(
        Mesh(data=1, tensor=arguments.tensor), jax.devices()[: arguments.tensor]
    )
    sharding.check_fits(config, mesh)
    init = functools.partial(transformer.init, config)
    specs = sharding.parameter_specs(jax.eval_shape(init, jax.random.key(0)))
    model = jax.jit(init, out_shardings=sharding.named_shardings(mesh, specs))(
        jax.random.key(0)
    )
    probe = Engine(
        model,
        config,
        mesh,
        Decode(
            slots=arguments.slots, steps_per_call=arguments.chunk, max_length=length
        ),
    )
    alone = bare_step(probe, 1, length, arguments.chunk)(BARE_ROUNDS)
    bare = bare_step(probe, arguments.slots, length, arguments.chunk)
    full = bare(BARE_ROUNDS)
    rate = arguments.slots / full
    gain = rate * alone
    del probe
    print(
        f"{arguments.size}, {config.dtype}, {config.residual}, tensor {arguments.tensor}, {arguments.slots} slots, "
        f"chunks of {arguments.chunk}, {jax.devices()[0].device_kind}\nbare step: {alone * 1e3:.2f} ms at width 1, "
        f"{full * 1e3:.2f} ms at width {arguments.slots} = {rate:.0f} tokens/s, so batching can gain {gain:.1f}x"
    )
    if not arguments.unscaled:
        print(
            f"gaps and windows are scaled by {alone / PAPER_STEP:.3f}: this model's step over the paper's"
        )
    results = {}
    for kind in kinds:
        for gap in arguments.gaps if kind in ("constant", "poisson") else (0.0,):
            title = f"{kind} {gap:g} ms" if gap else kind
            made, kept = compare(
                kind, gap, arguments, model, config, mesh, length, alone, bare
            )
            results[title] = made
            print(table(f"\n{title}, {arguments.requests} requests", made))
            if arguments.plots:
                for path in plot(arguments.plots, title, made, kept):
                    print(f"wrote {path}")
    first = next(iter(results.values()))
    output = dict(
        arguments=dataclasses.asdict(arguments),
        device=jax.devices()[0].device_kind,
        batch_gain=gain,
        step_ms={"1": alone * 1e3, str(arguments.slots): full * 1e3},
        bare_step_tokens_per_s=rate,
        engines=first,
        workloads=results,
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(output, indent=1))
    return output
