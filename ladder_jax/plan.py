"""What a program will do on chips that are not here: compiled ahead of time, read back, and played on a clock.

The programs are the project's own: a decode step, a prefill, a training step. Layers repeat, so a short stack is
compiled and its inner layers stand for those left out.
"""
import dataclasses
import functools
import json
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ladder_jax import config as configuration
from ladder_jax import cost, hlo, model, reductions, schedule, sharding, targets, timeline, train
from ladder_jax.config import ConfigError
from ladder_jax.residual import repeats

WORKLOADS = ("decode", "prefill", "train")


# ---------------------------------------------------------------- a short stack in place of a deep one

class Stack(NamedTuple):
    """A model of few layers that stands for one of many."""
    notation: str                 # its residual schedule
    counts: tuple[float, ...]     # how many of the deep model's layers each of its layers stands for
    trips: tuple[tuple[str, int], ...]     # scan (its scope) -> its trips in the deep model


def shorten(notation, layers, keep):
    """The `Stack` with at most `keep` repetitions of every pattern of layers that the schedule repeats."""
    deep = schedule.parse(notation, layers)
    kept, counts, trips = [], [], []
    for start, stop, period in repeats(deep.layers):
        repetitions = (stop - start) // period
        few = min(repetitions, keep)
        inner = (repetitions - 2) / (few - 2) if few > 2 else repetitions / few
        trips.append((f"layers{len(kept)}to{len(kept) + few * period - 1}", repetitions))
        for repetition in range(few):
            kept.extend(deep.layers[start:start + period])
            counts += [inner if few <= 2 or 0 < repetition < few - 1 else 1.0] * period
    for short in (notation, "delays:" + ",".join(str(block.delay) for blocks in kept for block in blocks)):
        try:
            if schedule.parse(short, len(kept)).layers == tuple(kept):
                return Stack(short, tuple(counts), tuple(trips))
        except ValueError:
            pass
    raise ConfigError(f"schedule={notation!r} has no shorter stack of the same kind")


# ---------------------------------------------------------------- the programs

def abstract(mesh, tree, specs):
    """Shapes with shardings: arguments of a program that is only compiled."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                        sharding.named(mesh, specs))


def forward(config, mesh, batch, tokens, context, reduction, unstacked):
    """The program of `tokens` new tokens in `batch` rows with a cache of `context`, and its arguments."""
    dtype = jnp.dtype(config.dtype)
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    kept = jax.ShapeDtypeStruct((config.layers, batch, context, config.kv_heads, config.head_dim), dtype)
    cache, cache_specs = (kept,) * 2, (sharding.CACHE,) * 2
    if unstacked:
        parameters = model.unstack(parameters)
        cache = [(jax.ShapeDtypeStruct(kept.shape[1:], dtype),) * 2] * config.layers
        cache_specs = [(P(*sharding.CACHE[1:]),) * 2] * config.layers
    specs = sharding.parameter_specs(parameters)

    def local(parameters, tokens_BT, positions_BT, cache):
        x_BTD, cache = model.hidden(parameters, config, tokens_BT, positions_BT, cache=cache, reduction=reduction)
        return model.logits(parameters, config, x_BTD[:, -1:]), cache

    ids = abstract(mesh, jax.ShapeDtypeStruct((batch, tokens), jnp.int32), sharding.TOKENS)
    program = jax.jit(sharding.shard_map(local, mesh, (specs, sharding.TOKENS, sharding.TOKENS, cache_specs),
                                         (sharding.LOGITS, cache_specs)), donate_argnums=3)
    return program, (abstract(mesh, parameters, specs), ids, ids, abstract(mesh, cache, cache_specs))


def training(config, mesh):
    """The training step and its arguments."""
    optimizer = train.make_optimizer(config.optimizer, config.train.steps)
    shape = config.train.batch, config.train.length
    kinds = dict.fromkeys(train.BATCH, jnp.int32) | {"weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    return train.make_step(config, mesh, optimizer), (
        train.abstract_state(config, mesh, optimizer), abstract(mesh, batch, dict.fromkeys(batch, sharding.TOKENS)))


class Request(NamedTuple):
    """What to plan."""
    config: configuration.Config
    target: targets.Target
    workload: str
    batch: int          # rows (decode, prefill), sequences (train), over all devices
    context: int        # tokens: of the cache (decode), of the prompts (prefill), of a sequence (train)
    keep: int = 4       # layers compiled, of each kind


class Compiled(NamedTuple):
    """A program for a target."""
    request: Request
    mesh: jax.sharding.Mesh
    stack: Stack
    text: str
    memory: object      # XLA's memory analysis


def place(config, devices, workload):
    """The recipe's mesh (config.Mesh) on a target's devices, or, where it has another size, its tensor axis: the
    remaining devices shard the parameters of a training step, and hold copies that decode other rows."""
    if config.data * config.fsdp * config.tensor != len(devices) and -1 not in (config.data, config.fsdp):
        rest = dict(data=1, fsdp=-1) if workload == "train" else dict(data=-1, fsdp=1)
        config = dataclasses.replace(config, **rest)
    return sharding.make_mesh(config, devices)


def build(request):
    """Compiles the program that `request` asks for. Raises ConfigError where it does not fit together."""
    config, target = request.config, request.target
    mesh = place(config.mesh, target.devices(), request.workload)
    sharding.check(config.model, mesh, request.batch)
    stack = shorten(config.model.residual, config.model.layers, request.keep)
    short = dataclasses.replace(config, model=dataclasses.replace(
        config.model, layers=len(stack.counts), residual=stack.notation),
        train=dataclasses.replace(config.train, batch=request.batch, length=request.context, accumulate=1))
    if request.workload == "train":
        program, arguments = training(short, mesh)
    else:
        decode = request.workload == "decode"
        program, arguments = forward(short.model, mesh, request.batch, 1 if decode else request.context,
                                     request.context, config.mesh.reduction, unstacked=decode)
    compiled = program.lower(*arguments).compile(compiler_options=dict(target.options))
    return Compiled(request, mesh, stack, compiled.as_text(), compiled.memory_analysis())


# ---------------------------------------------------------------- reading it back

def read(compiled):
    """The `timeline.Timeline` of a compiled program."""
    module = hlo.parse(compiled.text)
    request, stack = compiled.request, compiled.stack
    chip = request.target.chip
    devices = list(compiled.mesh.devices.flat)
    tpu = request.target.platform == "tpu"
    network = cost.Network(request.target, [tuple(d.coords) for d in devices] if tpu else None)

    def seconds(instruction, body):
        if instruction.opcode in timeline.FREE:
            return 0.0
        moved = cost.traffic(module, instruction, body) / chip.hbm_bandwidth
        if tpu:
            return instruction.cycles / chip.clock if instruction.cycles else moved
        return cost.LAUNCH + max(cost.flops(module, instruction, body) / chip.flops, moved)

    def count(scope):
        found = re.search(r"\blayer(\d+)\b", scope)
        return stack.counts[int(found[1])] if found else 1.0

    def trips(loop, known):
        return next((deep for scope, deep in stack.trips if scope in loop.scope), known)

    return timeline.play(module, seconds, lambda size: size / chip.hbm_bandwidth, network.collective, count, trips)


def axis(groups, mesh):
    """The mesh axes ("tensor", "data,fsdp", ...) that a collective's devices differ in."""
    sizes = tuple(mesh.shape.values())
    varying = set()
    for group in groups:
        places = [jnp.unravel_index(device, sizes) for device in group]
        varying |= {name for d, name in enumerate(mesh.shape) if len({int(place[d]) for place in places}) > 1}
    return ",".join(name for name in mesh.shape if name in varying) or "none"


def report(compiled, played):
    """The plan as plain values, ready for JSON."""
    request = compiled.request
    us = 1e6
    rows, cached = [], {}
    for c in played.collectives:
        key = str(c.groups)
        cached[key] = cached.get(key) or axis(c.groups, compiled.mesh)
        rows.append(dict(name=c.name, kind=c.kind, axis=cached[key], scope=c.scope, bytes=c.bytes, arrays=c.arrays,
                         count=round(c.count, 3), asynchronous=c.asynchronous,
                         communication_us=c.seconds * us, window_compute_us=c.window * us,
                         hidden_us=c.hidden * us, exposed_us=c.exposed * us))
    total = lambda name: sum(row[name] * row["count"] for row in rows)
    return dict(
        target=request.target.name, workload=request.workload, batch=request.batch, context=request.context,
        schedule=request.config.model.residual, reduction=request.config.mesh.reduction,
        layers=request.config.model.layers, collectives=rows,
        totals=dict(step_us=(played.compute + played.stalled) * us, compute_us=played.compute * us,
                    prefetch_us=played.prefetch * us, communication_us=total("communication_us"),
                    hidden_us=total("hidden_us"), exposed_us=played.stalled * us))


def table(made):
    """The plan as text."""
    lines = [f"{made['workload']} of {made['layers']} layers, {made['schedule']}, {made['reduction']}, "
             f"batch {made['batch']}, context {made['context']}, on {made['target']}",
             f"{'collective':34} {'kind':19} {'axis':7} {'bytes':>9} {'x':>5} {'async':5} {'comm us':>8} "
             f"{'window':>8} {'hidden':>8} {'exposed':>8}  where"]
    for row in made["collectives"]:
        where = "/".join(part for part in row["scope"].split("/")[1:-1] if part != "shard_map")
        lines.append(f"{row['name'][-34:]:34} {row['kind']:19} {row['axis']:7} {row['bytes']:9} {row['count']:5g} "
                     f"{'yes' if row['asynchronous'] else 'no':5} {row['communication_us']:8.1f} "
                     f"{row['window_compute_us']:8.1f} {row['hidden_us']:8.1f} {row['exposed_us']:8.1f}  {where}"
                     + (f"  merged of {row['arrays']}" if row["arrays"] > 1 else ""))
    totals = made["totals"]
    lines.append("  ".join(f"{name.removesuffix('_us')} {value:,.1f}" for name, value in totals.items()) + "  (us)")
    return "\n".join(lines)


def main(arguments):
    """`python -m ladder_jax.plan RECIPE ...`, see ladder-jax plan --help."""
    import argparse

    from ladder_jax.cli import recipe
    parser = argparse.ArgumentParser("ladder-jax plan")
    parser.add_argument("recipe")
    parser.add_argument("--target", required=True)
    parser.add_argument("--workload", default="decode", choices=WORKLOADS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--schedule")
    parser.add_argument("--reduction", default="psum", choices=reductions.REDUCTIONS)
    parser.add_argument("--tensor", type=int)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hlo")
    chosen = parser.parse_args(arguments)
    config = recipe(chosen.recipe)
    if chosen.schedule:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, residual=chosen.schedule))
    if chosen.tensor:
        config = dataclasses.replace(config, mesh=configuration.Mesh(data=1, fsdp=1, tensor=chosen.tensor))
    compiled = build(Request(config, targets.parse(chosen.target), chosen.workload, chosen.batch, chosen.context,
                             chosen.reduction, chosen.keep))
    if chosen.hlo:
        with open(chosen.hlo, "w") as file:
            file.write(compiled.text)
    made = report(compiled, read(compiled))
    print(json.dumps(made) if chosen.json else table(made))


if __name__ == "__main__":
    targets.quiet()
    main(sys.argv[1:])
