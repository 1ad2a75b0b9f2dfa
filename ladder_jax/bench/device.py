"""Measures what a plan rests on, on a machine with accelerators, in under ten minutes:
products, HBM, all-reduces, decode steps. `ladder-jax plan --calibration` reads it.

Each time is of a loop inside one jitted call, so that the host's dispatch does not
count; it is the median of several calls.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import files, sharding
from ladder_jax.config import Config, ConfigError, Mesh, Model
from ladder_jax.hardware import aot, chips, xla_options
from ladder_jax.planner import calibration, plan, report, tables

NOT_AN_ACCELERATOR = (
    "a CPU is not an accelerator: these sizes are tiny, and the numbers say nothing "
    "about a GPU or a TPU"
)


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    products: tuple[tuple[int, int, int], ...]  # rows, depth, columns
    hbm_bytes: int
    messages: tuple[int, ...]  # bytes
    model: Model
    batches: tuple[int, ...]
    context: int
    seconds: float  # of each measurement, at least


SCALE = 1 << 10
ACCELERATOR = Sizes(
    products=(
        (1024, 4096, 4096),
        (4096, 4096, 4096),
        (8192, 8192, 8192),
        (1024, 8192, 7168),
    ),
    hbm_bytes=1 << 30,
    messages=tuple(SCALE * 4**n for n in range(2, 9)),  # 16 KiB to 64 MiB
    # Eight layers of 8B: 4 GB of weights on one device.
    model=Model(
        vocab_size=32768,
        dim=4096,
        layers=8,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        max_length=2048,
    ),
    batches=(1, 4, 16, 64),
    context=2048,
    seconds=0.2,
)
CPU = Sizes(
    products=((64, 64, 64), (128, 128, 128)),
    hbm_bytes=1 << 20,
    messages=(SCALE, 16 * SCALE),
    model=Model(
        vocab_size=128,
        dim=64,
        layers=2,
        heads=8,
        kv_heads=8,
        head_dim=8,
        ffn_dim=64,
        max_length=256,
    ),
    batches=(1, 2, 3, 4),
    context=32,
    seconds=0.0,
)


@dataclass(frozen=True)
class Arguments:
    """Measures what a plan of this machine rests on, and writes it to a JSON file for
    `ladder-jax plan --calibration`. It takes under ten minutes."""

    out: str = "device.json"
    """The file."""
    trace: str | None = None
    """Write JAX's profile of a decode step with ladder into this folder, too."""
    rounds: int = 5
    """Calls of each measurement; the median counts."""


def run(args: Arguments) -> dict[str, Any]:
    """Measures, prints a table, and writes the file.

    Raises ConfigError for arguments that are not accepted.
    """
    if args.rounds < 1:
        raise ConfigError(f"rounds={args.rounds} is not accepted: it must be above 0")
    if not Path(args.out).absolute().parent.is_dir():
        raise ConfigError(
            f"out={args.out!r} is not accepted: its folder does not exist"
        )
    started = time.perf_counter()
    device = jax.devices()[0]
    is_accelerator = device.platform != "cpu"
    sizes = ACCELERATOR if is_accelerator else CPU
    clock = partial(_seconds, rounds=args.rounds, least=sizes.seconds)
    measured: dict[str, Any] = dict(
        format=calibration.FORMAT,
        device=device.device_kind,
        platform=chips.platform(device),
        devices=jax.device_count(),
        is_accelerator=is_accelerator,
        jax=jax.__version__,
        label="measured",
        matmul=[_product(*shape, clock) for shape in sizes.products],
        hbm=_hbm(sizes.hbm_bytes, clock),
        all_reduce_devices=jax.device_count(),
        all_reduce=_all_reduces(sizes.messages, clock),
    )
    measured["decode"] = []
    # Written after every row, so that a stopped run leaves what it measured.
    for row in itertools.chain([None], _decode_steps(sizes, args)):
        measured["decode"] += [row] if row else []
        measured["seconds"] = round(time.perf_counter() - started, 1)
        files.write_text(args.out, json.dumps(measured, indent=1) + "\n")
    print(_text(measured), flush=True)
    return measured


def _seconds(
    function: Callable[[int], Any], rounds: int, least: float, times: int = 4
) -> float:
    """Seconds of one pass of a loop: the median of several calls.

    Args:
      function: runs so many passes of the loop on the device, and waits for the end.
      rounds: calls that count.
      least: seconds that a call takes at least; so many passes it has.
      times: passes of the first call.
    """
    while True:
        function(times)  # compiles
        start = time.perf_counter()
        function(times)
        spent = time.perf_counter() - start
        if spent >= least:
            break
        times = max(2 * times, int(times * 1.2 * least / max(spent, 1e-6)))
    spans = []
    for _ in range(rounds):
        start = time.perf_counter()
        function(times)
        spans.append(time.perf_counter() - start)
    return statistics.median(spans) / times


Clock = Callable[[Callable[[int], Any]], float]


def _product(m: int, k: int, n: int, clock: Clock) -> dict[str, Any]:
    """The rate of a product of bfloat16 on one device, TFLOP/s.

    The numbers are random: a GPU draws less power, and is up to 15% faster, with equal
    ones.
    """
    keys = jax.random.split(jax.random.key(0))
    a = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    b = jax.random.normal(keys[1], (k, n), jnp.bfloat16)

    @jax.jit
    def loop(times: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        def step(_: jax.Array, carry: Any) -> Any:
            a, total = carry
            out = a @ b
            # The next product needs a number of this one.
            return a.at[0, 0].set(out[0, 0] / k), total + out[0, 0]

        return lax.fori_loop(0, times, step, (a, jnp.zeros((), jnp.bfloat16)))[1]

    seconds = clock(lambda times: loop(times, a, b).block_until_ready())
    return dict(m=m, k=k, n=n, us=seconds * 1e6, tflops=2 * m * k * n / seconds / 1e12)


def _hbm(size: int, clock: Clock) -> dict[str, Any]:
    """The rate at which one device reads and writes an array, GB/s of both."""
    array = jnp.ones((size // 4,), jnp.float32)

    @jax.jit
    def loop(times: jax.Array, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, times, lambda i, x: x * 1.5 + i, x)

    seconds = clock(lambda times: loop(times, array).block_until_ready())
    return dict(bytes=size, us=seconds * 1e6, gb_per_s=2 * size / seconds / 1e9)


def _all_reduces(messages: tuple[int, ...], clock: Clock) -> list[dict[str, Any]]:
    """Times of psum among all devices; none where there is one device."""
    devices = jax.devices()
    if len(devices) == 1:
        return []
    mesh = jax.make_mesh(
        (len(devices),), ("all",), axis_types=(jax.sharding.AxisType.Auto,)
    )

    def local(times: jax.Array, x: jax.Array) -> jax.Array:
        share = jnp.bfloat16(1 / len(devices))
        varying = lambda x: lax.pcast(x, "all", to="varying")
        step = lambda i, x: varying(lax.psum(x, "all") * share)
        return lax.fori_loop(0, times[0], step, varying(x))

    loop = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("all")))
    rows = []
    for size in messages:
        x = jnp.ones((size // 2,), jnp.bfloat16)
        function = partial(_run_loop, loop, x)
        rows.append(dict(bytes=size, us=clock(function) * 1e6))
    return rows


def _run_loop(loop: Any, x: jax.Array, times: int) -> None:
    loop(jnp.full((1,), times), x).block_until_ready()


# ---------------------------------------------------------------- decode steps


def _decode_steps(sizes: Sizes, args: Arguments) -> Any:
    """A row for each schedule and batch: the measured step, and the planned one where
    XLA's compiled program of this machine can be played."""
    count = jax.device_count()
    tensor = max(n for n in (1, 2, 4, 8) if n <= count and count % n == 0)
    for schedule in ("standard", "ladder"):
        for batch in sizes.batches:
            is_last = (schedule, batch) == ("ladder", sizes.batches[-1])
            trace = args.trace if is_last else None
            yield _decode_step(sizes, schedule, batch, tensor, args.rounds, trace)


def _decode_step(
    sizes: Sizes, schedule: str, batch: int, tensor: int, rounds: int, trace: str | None
) -> dict[str, Any]:
    """One row; `trace`: the folder for JAX's profile of the step."""
    devices = jax.devices()[:tensor]
    model_config = replace(sizes.model, residual=schedule)
    config = Config(model=model_config, mesh=Mesh(tensor=tensor, reduction="psum"))
    mesh = sharding.make_mesh(config.mesh, devices)
    kind = chips.kind_of(devices[0]) or "unknown"
    target = aot.Target(f"{kind}:1x{tensor}", kind, (1, tensor))
    request = plan.Request("bench", config, target, "decode", batch, sizes.context)
    program = plan.make_program(request, mesh)
    options = xla_options.options(mesh, "decode")
    compiled = program.function.lower(*program.arguments).compile(options)
    weights, tokens, positions, cache = (_arrays(each) for each in program.arguments)
    positions += sizes.context - 1  # every row has a full cache
    row = dict(
        schedule=schedule,
        batch=batch,
        tensor=tensor,
        layers=sizes.model.layers,
        context=sizes.context,
        us=0.0,
        planned_us=planned_us(request, compiled, mesh),
    )
    spans = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(STEPS):
            logits, cache = compiled(weights, tokens, positions, cache)
        logits.block_until_ready()
        spans.append((time.perf_counter() - start) / STEPS)
    row["us"] = statistics.median(spans[1:]) * 1e6
    if trace:
        row["trace"] = _profile(trace, compiled, (weights, tokens, positions, cache))
    return row


STEPS = 10


def _arrays(tree: Any) -> Any:
    """Zeros of the shapes and shardings of abstract arrays."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), tree)


def planned_us(request: plan.Request, compiled: Any, mesh: Any) -> float | None:
    """The planned time of the compiled step, microseconds. None for a chip without a
    cost model."""
    if not chips.CHIPS.get(request.target.kind, chips.Chip(("",), 0)).modelled:
        return None
    stack = plan.short_stack(request._replace(most=request.config.model.layers))
    played = report.make_timeline(
        plan.Compiled(request, mesh, stack, compiled.as_text(), 0.0, 0.0, 0.0)
    )
    return played.step * 1e6


def _profile(folder: str, compiled: Any, arguments: tuple[Any, ...]) -> str:
    """Writes JAX's profile of a step. Returns the folder, or why there is none."""
    weights, tokens, positions, cache = arguments
    try:
        with jax.profiler.trace(folder):
            compiled(weights, tokens, positions, cache)[0].block_until_ready()
    except Exception as error:  # each platform's profiler raises its own
        return f"none: {str(error).splitlines()[0] if str(error) else type(error)}"
    return folder


# ---------------------------------------------------------------- the table


def _text(measured: dict[str, Any]) -> str:
    """What was measured, as text."""
    rows = [
        (f"product {row['m']}x{row['k']}x{row['n']}", f"{row['tflops']:.3f} TFLOP/s")
        for row in measured["matmul"]
    ]
    rows.append(("HBM, read and write", f"{measured['hbm']['gb_per_s']:,.1f} GB/s"))
    rows += [
        (
            f"all-reduce of {row['bytes']:,} bytes, {measured['devices']} devices",
            f"{row['us']:,.1f} us",
        )
        for row in measured["all_reduce"]
    ]
    for row in measured["decode"]:
        what = f"decode step, {row['schedule']}, batch {row['batch']}"
        planned = f", planned {row['planned_us']:,.1f}" if row["planned_us"] else ""
        rows.append((what, f"{row['us']:,.1f} us{planned}"))
    columns = [
        tables.Column(
            f"measured on {measured['device']}", lambda row: row[0], left=True
        ),
        tables.Column("", lambda row: row[1], left=True),
    ]
    note = [] if measured["is_accelerator"] else [NOT_AN_ACCELERATOR]
    return "\n".join([tables.text_table(columns, rows), *note])
