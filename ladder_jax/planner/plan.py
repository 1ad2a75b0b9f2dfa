"""What a program will do on chips that are not here: compiled ahead of time, read back, and played on a clock.

The programs are the project's own: a decode step, a prefill, a training step. Layers repeat, so a short stack is
compiled and its inner layers stand for those left out.
"""

import dataclasses
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ladder_jax import config as configuration
from ladder_jax import model, schedule, sharding, train
from ladder_jax.config import ConfigError
from ladder_jax.hardware import aot, chips, cost
from ladder_jax.kv_cache import KV
from ladder_jax.optimizer import make_optimizer
from ladder_jax.planner import hlo, timeline
from ladder_jax.residual import choose
from ladder_jax.residual.layers import narrowing, repeats
from ladder_jax.residual.reductions import LANES

# ---------------------------------------------------------------- a short stack in place of a deep one


class Stack(NamedTuple):
    """A model of few layers that stands for one of many."""

    notation: str  # its residual schedule
    counts: tuple[
        float, ...
    ]  # how many of the deep model's layers each of its layers stands for
    trips: tuple[
        tuple[str, int], ...
    ]  # scan (its scope) -> its trips in the deep model


def shorten(notation, layers, keep, ends=1):
    """The `Stack` with at most `keep` repetitions of every pattern of layers that the schedule repeats. The first and
    the last of them (`ends`: the last few) stand for themselves alone."""
    deep = schedule.parse(notation, layers)
    kept, counts, trips = [], [], []
    for start, stop, period in repeats(deep.layers):
        repetitions = (stop - start) // period
        few = min(repetitions, keep)
        inner = (
            (repetitions - 1 - ends) / (few - 1 - ends)
            if few > 1 + ends
            else repetitions / few
        )
        trips.append(
            (f"layers{len(kept)}to{len(kept) + few * period - 1}", repetitions)
        )
        for repetition in range(few):
            kept.extend(deep.layers[start : start + period])
            counts += [
                inner if few <= 1 + ends or 0 < repetition < few - ends else 1.0
            ] * period
    for short in (
        notation,
        "delays:" + ",".join(str(block.delay) for blocks in kept for block in blocks),
    ):
        try:
            if schedule.parse(short, len(kept)).layers == tuple(kept):
                return Stack(short, tuple(counts), tuple(trips))
        except ValueError:
            pass
    raise ConfigError(f"schedule={notation!r} has no shorter stack of the same kind")


# ---------------------------------------------------------------- the programs


def forward(config, mesh, batch, tokens, context, reduction):
    """The program of `tokens` new tokens in `batch` rows with a cache of `context`, and its arguments.

    Parameters are in the compute dtype, since nothing but training needs more, and an array for every layer.
    """
    dtype = jnp.dtype(config.dtype)
    shapes = model.abstract(config)
    parameters = jax.eval_shape(
        model.unstack,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes),
    )
    rows = jax.ShapeDtypeStruct(
        (batch, config.kv_heads, context, config.head_dim), dtype
    )
    cache, cache_specs = (
        [KV(rows, rows)] * config.layers,
        [KV(*(P(*sharding.CACHE[1:]),) * 2)] * config.layers,
    )
    specs = sharding.parameter_specs(parameters)

    def local(parameters, tokens_BT, positions_BT, cache):
        last_B1 = jnp.full((tokens_BT.shape[0], 1), tokens - 1) if tokens > 1 else None
        x_B1D, cache = model.hidden(
            parameters,
            config,
            tokens_BT,
            positions_BT,
            cache=cache,
            read_BR=last_B1,
            reduction=reduction,
        )
        return model.logits(parameters, config, x_B1D), cache

    ids = sharding.abstract(
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32), mesh, sharding.TOKENS
    )
    # In the engine's loop the cache keeps the layout that XLA likes: JAX's own where heads fill a TPU's lanes.
    kept = (
        jax.tree.map(
            lambda spec: Format(Layout.AUTO, NamedSharding(mesh, spec)),
            cache_specs,
            is_leaf=lambda x: isinstance(x, P),
        )
        if tokens == 1 and config.head_dim % LANES
        else None
    )
    program = jax.jit(
        sharding.shard_map(
            local,
            mesh,
            (specs, sharding.TOKENS, sharding.TOKENS, cache_specs),
            (sharding.LOGITS, cache_specs),
        ),
        donate_argnums=3,
        in_shardings=(None, None, None, kept),
        out_shardings=(None, kept),
    )
    return program, (
        sharding.abstract(parameters, mesh, specs),
        ids,
        ids,
        sharding.abstract(cache, mesh, cache_specs),
    )


def training(config, mesh):
    """The training step and its arguments."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    shape = config.train.global_batch, config.train.seq_len
    kinds = dict.fromkeys(train.BATCH_FIELDS, jnp.int32) | {"weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    # cuDNN says while a program is traced what it can do, and it is not here: XLA's own attention stands for it
    kernel = "xla" if chips.platform(mesh) != "tpu" else None
    return train.make_step(config, mesh, optimizer, kernel), (
        train.abstract_state(config, mesh, optimizer),
        sharding.abstract(batch, mesh, dict.fromkeys(batch, sharding.TOKENS)),
    )


class Request(NamedTuple):
    """What to plan."""

    recipe: str
    config: configuration.Config
    target: aot.Target
    workload: str
    batch: int  # rows (decode, prefill), sequences (train), over all devices
    context: int  # tokens: of the cache (decode), of the prompts (prefill), of a sequence (train)
    keep: int = 4  # layers compiled, of each kind


class Compiled(NamedTuple):
    """A program for a target."""

    request: Request
    mesh: jax.sharding.Mesh
    stack: Stack
    text: str
    weights: float  # bytes on a device, of the whole model: parameters and, in training, the optimizer's state
    kv: float  # of the cache
    temporary: float  # of everything else, while the program runs


def place(config, devices, workload):
    """The recipe's mesh (config.Mesh) on a target's devices, or, where it has another size, its tensor axis: the
    remaining devices shard the parameters of a training step, and hold copies that decode other rows."""
    if config.data * config.fsdp * config.tensor != len(devices) and -1 not in (
        config.data,
        config.fsdp,
    ):
        rest = dict(data=1, fsdp=-1) if workload == "train" else dict(data=-1, fsdp=1)
        config = dataclasses.replace(config, **rest)
    return sharding.make_mesh(config, devices)


def program(request, mesh, layers=None, notation=None):
    """The program that `request` asks for and its arguments; with another number of layers, of another schedule."""
    config = request.config
    made = dataclasses.replace(
        config.model,
        layers=layers or config.model.layers,
        residual=notation or config.model.residual,
    )
    config = dataclasses.replace(config, model=made)
    if request.workload == "train":
        return training(
            dataclasses.replace(
                config,
                train=dataclasses.replace(
                    config.train,
                    global_batch=request.batch,
                    seq_len=request.context,
                    grad_accum_steps=1,
                ),
            ),
            mesh,
        )
    return forward(
        made,
        mesh,
        request.batch,
        1 if request.workload == "decode" else request.context,
        request.context,
        choose.reduction_for(config.mesh.reduction, made, mesh),
    )


def build(request):
    """Compiles the program that `request` asks for. Raises ConfigError where it does not fit together."""
    config, target = request.config, request.target
    mesh = place(config.mesh, target.devices(), request.workload)
    sharding.check_fits(config.model, mesh, request.batch)
    ends = 1
    if request.workload == "prefill":  # its last layers compute less
        plan = schedule.parse(config.model.residual, config.model.layers)
        ends = config.model.layers - narrowing(plan)[0] // len(plan.layers[0])
    stack = shorten(
        config.model.residual, config.model.layers, request.keep + ends - 1, ends
    )
    short, arguments = program(request, mesh, len(stack.counts), stack.notation)
    try:
        compiled = short.lower(*arguments).compile(
            compiler_options=target.options(request.workload)
        )
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" in str(
            error
        ):  # libtpu is newer than jaxlib, which is to parse what it has made
            raise ConfigError(
                f"the program for {target.name} cannot be read back: {str(error).splitlines()[0][-150:]}"
            ) from None
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"batch={request.batch}, context={request.context}: even {len(stack.counts)} layers do not "
            f"fit into {target.name}: {str(error).splitlines()[0][:200]}"
        ) from None
    weights, *others = program(request, mesh)[1]
    return Compiled(
        request,
        mesh,
        stack,
        text,
        share(weights),
        0 if request.workload == "train" else share(others[-1]),
        compiled.memory_analysis().temp_size_in_bytes
        + growth(hlo.parse(text), stack, arguments),
    )


def share(tree):
    """Bytes of a tree of shaped, sharded arrays on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def growth(module, stack, arguments):
    """Bytes of temporaries that the deep model has more than the short: what a scan keeps of every layer."""
    given = sorted(x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(arguments))
    more = 0.0
    for body in module.computations.values():
        for loop in (
            instruction
            for instruction in body.values()
            if instruction.opcode == "while"
        ):
            deep, trips, left = trips_of(stack, loop), loop.trips or 1, list(given)
            kept = 0
            for array in loop.outputs:
                if array.dims in left:
                    left.remove(array.dims)
                elif array.dims[:1] == (trips,) and array.space == 0:
                    kept += array.bytes
            more = max(more, kept * (deep / trips - 1))
    return more


def trips_of(stack, loop):
    """How often a scan of layers runs in the deep model; any other loop, as often as XLA knows."""
    return next(
        (deep for scope, deep in stack.trips if scope in loop.scope), loop.trips or 1
    )


# ---------------------------------------------------------------- reading it back


def read(compiled, all_reduce=None):
    """The `timeline.Timeline` of a compiled program; `all_reduce`: see cost.Network."""
    module = hlo.parse(compiled.text)
    stack, chip = compiled.stack, compiled.request.target.chip
    network = choose.network_of(list(compiled.mesh.devices.flat), all_reduce)

    def seconds(instruction, body):
        if instruction.opcode in timeline.FREE:
            return 0.0
        moved = cost.traffic(module, instruction, body) / chip.hbm_bandwidth
        if chip.clock_hz:
            return instruction.cycles / chip.clock_hz if instruction.cycles else moved
        return chip.kernel_launch_s + max(
            cost.flops(module, instruction, body) / chip.peak_flops,
            moved / chip.hbm_efficiency,
        )

    current = 1.0

    def count(
        scope,
    ):  # what XLA makes without a layer's scope belongs to the layer in whose midst it stands
        nonlocal current
        _, layer, part = block_of(scope)
        if layer or part:
            current = (
                1.0
                if "to" in layer or not layer
                else stack.counts[int(layer.removeprefix("layer"))]
            )
        return current

    return timeline.play(
        module,
        seconds,
        lambda size: size / chip.hbm_bandwidth,
        network.collective,
        count,
        lambda loop: trips_of(stack, loop),
    )


def copies(module, least=1 << 20):
    """The instructions of a step that make at least so many bytes out of parameters alone: copies of weights."""
    body, given, found = module.computations[module.entry], set(), []
    for instruction in body.values():
        ready = all(name in given for name in instruction.operands)
        if instruction.opcode in ("parameter", "constant"):
            given.add(instruction.name)
        elif instruction.opcode in ("bitcast", "get-tuple-element") and ready:
            given.add(instruction.name)
        elif ready and instruction.operands and instruction.opcode not in timeline.FREE:
            if (
                sum(array.bytes for array in instruction.outputs if array.space == 0)
                >= least
            ):
                found.append(instruction)
    return found


def axis(groups, mesh):
    """The mesh axes ("tensor", "data,fsdp", ...) that a collective's devices differ in."""
    varying = set()
    for group in groups:
        for name, places in zip(
            mesh.shape, np.unravel_index(group, tuple(mesh.shape.values()))
        ):
            varying |= {name} if len(set(places.tolist())) > 1 else set()
    return ",".join(name for name in mesh.shape if name in varying) or "none"


def block_of(scope):
    """(pass, layer, block) that an instruction belongs to, by its scope: ("forward", "layer3", "mlp"), or what runs
    outside of the stack: ("forward", "", "last")."""
    layer = re.search(
        r"\b(layers?)\[?(\d+)(to\d+)?", scope
    )  # a fusion may be named by a weight: layers[3].mlp.up
    part = re.findall(
        r"(?<=[/(.])(attention\+mlp|attention|mlp|embedding|last)(?=[/).])", scope
    )
    name = (layer[0] if layer[3] else "layer" + layer[2]) if layer else ""
    return (
        "backward" if "transpose(" in scope else "forward",
        name,
        part[0] if part else "",
    )


def unavoidable(compiled, played):
    """Seconds of tensor-axis communication that no order of the program's instructions hides.

    A reduction may run behind the compute of the block in whose scope it stands, if that block has a delay: at least
    max(0, communication - compute) is seen. Where it has none, and outside of the layers, it is seen in full. Where XLA
    names a layer and no block, all of the layer's compute counts.
    """
    layers = schedule.parse(compiled.stack.notation, len(compiled.stack.counts)).layers
    taken, compute = {}, {}
    for c in played.collectives:
        if "tensor" in axis(c.groups, compiled.mesh):
            key = block_of(c.scope)
            taken[key] = taken.get(key, 0.0) + c.alone * c.count
    for span in played.spans:
        key = block_of(span.scope)
        compute[key] = compute.get(key, 0.0) + (span.end - span.start) * span.count
    total = 0.0
    for (direction, layer, part), seconds in taken.items():
        blocks = layers[int(re.search(r"\d+", layer)[0])] if layer else ()
        delayed = any(
            block.delay for block in blocks if part in ("", "+".join(block.parts))
        )
        beside = sum(
            spent
            for key, spent in compute.items()
            if key[:2] == (direction, layer) and part in ("", key[2])
        )
        total += max(0.0, seconds - (beside if delayed else 0.0))
    return total


def report(compiled, played):
    """The plan as plain values, ready for JSON.

    A collective counts `count` times: as often as it runs in a step; in the totals, what is sent at the same time over
    different links counts once. A step is compute, what is exposed of communication, and, on a GPU, what hidden
    communication takes from the kernels beside it.
    """
    request, chip = compiled.request, compiled.request.target.chip
    us = 1e6
    rows = []
    for c in played.collectives:
        if len(c.groups[0]) > 1:
            _, layer, part = block = block_of(c.scope)
            rows.append(
                dict(
                    name=c.name,
                    kind=c.kind,
                    axis=axis(c.groups, compiled.mesh),
                    bytes=c.bytes,
                    asynchronous=c.asynchronous,
                    communication_us=c.seconds * us,
                    window_compute_us=c.window * us,
                    hidden_us=c.hidden * us,
                    exposed_us=c.exposed * us,
                    last_of_stack=not layer and part == "last",
                    count=round(c.count, 3),
                    merged=c.arrays,
                    block=" ".join(filter(None, block)),
                )
            )
    sent = sum(c.alone * c.count for c in played.collectives if len(c.groups[0]) > 1)
    hidden = max(sent - played.stalled, 0.0)
    slowed = chip.interference * hidden * us
    needed = compiled.weights + compiled.kv + compiled.temporary
    return dict(
        target=request.target.name,
        recipe=request.recipe,
        workload=request.workload,
        batch=request.batch,
        context=request.context,
        schedule=request.config.model.residual,
        reduction=reduction_of(compiled),
        layers=request.config.model.layers,
        collectives=rows,
        totals=dict(
            step_us=(played.compute + played.stalled) * us + slowed,
            compute_us=played.compute * us,
            communication_us=sent * us,
            hidden_us=hidden * us,
            exposed_us=played.stalled * us,
            unavoidable_us=unavoidable(compiled, played) * us,
            prefetch_us=played.prefetch * us,
            interference_us=slowed,
            roofline_us=roofline(compiled) * us,
        ),
        memory=dict(
            weights_bytes=compiled.weights,
            kv_bytes=compiled.kv,
            temporary_bytes=int(compiled.temporary),
            capacity_bytes=int(chip.hbm_bytes),
            fits=needed <= chip.hbm_bytes,
        ),
    )


def roofline(compiled):
    """Seconds that a step takes at least on a device: its FLOPs at peak or its weights and cache once through HBM."""
    request, chip = compiled.request, compiled.request.target.chip
    config = request.config.model
    train_, decode = request.workload == "train", request.workload == "decode"
    width, pair = config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    tokens = request.batch * (1 if decode else request.context)
    seen = request.context if decode else request.context / 2
    asked = tokens if train_ else request.batch  # whose logits are wanted
    work = dict(
        attention=4 * width * (config.dim + seen), mlp=6 * config.dim * config.ffn_dim
    )  # beside K and V
    plan = schedule.parse(config.residual, config.layers)
    flops = (
        tokens * config.layers * 2 * config.dim * pair
        + asked * 2 * config.dim * config.vocab_size
    )
    flops += sum(
        (tokens if number < narrowing(plan)[0] else asked)
        * sum(work[part] for part in block.parts)
        for number, block in enumerate(
            block for blocks in plan.layers for block in blocks
        )
    )
    return max(
        (3 if train_ else 1) * flops / compiled.mesh.size / chip.peak_flops,
        (compiled.weights + (compiled.kv if decode else 0)) / chip.hbm_bandwidth,
    )


def reduction_of(compiled):
    """The name of the reduction of a block's partial; of what "auto" has chosen, where it was asked to."""
    request, mesh = compiled.request, compiled.mesh
    reduction = choose.reduction_for(
        request.config.mesh.reduction, request.config.model, mesh
    )
    rows = max(request.batch // (mesh.shape["data"] * mesh.shape["fsdp"]), 1)
    tokens = 1 if request.workload == "decode" else request.context
    dtype = jnp.dtype(request.config.model.dtype)
    message = jax.ShapeDtypeStruct((rows, tokens, request.config.model.dim), dtype)
    return reduction(message) if callable(reduction) else reduction


def table(made):
    """The plan as text."""
    lines = [
        f"{made['workload']} of {made['layers']} layers, {made['schedule']}, {made['reduction']}, "
        f"batch {made['batch']}, context {made['context']}, on {made['target']}",
        f"{'collective':34} {'kind':19} {'axis':7} {'bytes':>9} {'x':>5} {'async':5} {'us':>8} {'window':>8} "
        f"{'hidden':>8} {'exposed':>8}  where",
    ]
    for row in made["collectives"]:
        lines.append(
            f"{row['name'][-34:]:34} {row['kind']:19} {row['axis']:7} {row['bytes']:9} {row['count']:5g} "
            f"{'yes' if row['asynchronous'] else 'no':5} {row['communication_us']:8.1f} "
            f"{row['window_compute_us']:8.1f} {row['hidden_us']:8.1f} {row['exposed_us']:8.1f}  {row['block']}"
            + (f", {row['merged']} merged" if row["merged"] > 1 else "")
        )
    lines.append(
        ", ".join(
            f"{name.removesuffix('_us')} {value:,.1f}"
            for name, value in made["totals"].items()
        )
        + " (us a step)"
    )
    memory = made["memory"]
    lines.append(
        ", ".join(
            f"{name.removesuffix('_bytes')} {value / 1e9:.2f}"
            for name, value in memory.items()
            if name != "fits"
        )
        + " (GB a device): "
        + ("fits" if memory["fits"] else "does not fit")
    )
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def request(config, chosen):
    """The `Request` of a recipe's config and the command's arguments (cli.PlanArguments)."""
    room = config.model.max_length
    context = min(2048, room) if chosen.context is None else chosen.context
    if not 1 <= context <= room:
        raise ConfigError(
            f"context={context} is not accepted: it must be from 1 to model.max_length={room}"
        )
    if chosen.batch < 1:
        raise ConfigError(f"batch={chosen.batch} is not accepted: it must be 1 or more")
    mesh = (
        configuration.Mesh(data=-1, tensor=chosen.tensor)
        if chosen.tensor is not None
        else config.mesh
    )
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(mesh, reduction=chosen.reduction)
    )
    if chosen.schedule is not None:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, residual=chosen.schedule)
        )
    return Request(
        chosen.recipe,
        config,
        aot.parse(chosen.target),
        chosen.workload,
        chosen.batch,
        context,
    )


def run(config, chosen):
    """What the command prints; writes the files that it is asked for."""
    asked = request(config, chosen)
    if chosen.compare:
        from ladder_jax.planner import compare

        return compare.run(asked, chosen)
    compiled = build(asked)
    if chosen.hlo:
        with open(chosen.hlo, "w") as file:
            file.write(compiled.text)
    played = read(compiled)
    if chosen.plot:
        from ladder_jax.planner import lanes

        lanes.draw(chosen.plot, [(asked.config.model.residual, played, block_of)])
    made = report(compiled, played)
    return json.dumps(made) if chosen.json else table(made)
