"""Reports which communication overlaps with compute, and the cost of the rest."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ladder_jax import schedule, sharding
from ladder_jax.config import Model
from ladder_jax.hardware import cost
from ladder_jax.model import abstract
from ladder_jax.planner import fused, hlo, operations, timeline, use
from ladder_jax.planner.plan import Compiled, Request, pages_of
from ladder_jax.planner.scopes import Place, place_of
from ladder_jax.planner.stack import LayerCounter
from ladder_jax.planner.timeline import Collective, Timeline
from ladder_jax.residual import choose
from ladder_jax.residual.layers import narrow_blocks
from ladder_jax.residual.reductions import name_for

US = 1e6  # microseconds in a second


def make_timeline(compiled: Compiled, all_reduce: float | None = None) -> Timeline:
    """Simulates a step of a compiled program.

    Args:
      compiled: the program.
      all_reduce: see cost.Network.
    """
    module = hlo.parse(compiled.text)
    target, stack = compiled.request.target, compiled.stack
    chip = target.chip
    network = choose.network_of(list(compiled.mesh.devices.flat), all_reduce, chip)
    assert network is not None, "every aot.Target has a chip of chips.CHIPS"

    def seconds(instruction: hlo.Instruction, body: hlo.Body) -> float:
        if instruction.opcode in operations.FREE:
            return 0.0
        if chip.clock_hz and instruction.cycles:
            return instruction.cycles / chip.clock_hz
        moved_s, computed_s, _ = bounds(instruction, body)
        return chip.kernel_launch_s + max(moved_s, computed_s)

    def bounds(
        instruction: hlo.Instruction, body: hlo.Body
    ) -> tuple[float, float, float]:
        """(seconds of its bytes, of its products, of them with idle cores)."""
        moved = cost.traffic(module, instruction, body)
        moved_s = moved / (chip.hbm_efficiency * chip.hbm_bandwidth)
        if chip.is_tpu:
            return moved_s, 0.0, 0.0
        times = [
            cost.product_seconds(chip, one)
            for one in cost.products(module, instruction, body)
        ]
        return moved_s, sum(s for s, _ in times), sum(idle for _, idle in times)

    def interference(
        instruction: hlo.Instruction, body: hlo.Body
    ) -> operations.Interference:
        if chip.is_tpu:
            return operations.Interference()
        moved_s, computed_s, idle_s = bounds(instruction, body)
        if moved_s > computed_s:
            return operations.Interference(chip.interference)
        # A wave of tiles more, on average half of one.
        return operations.Interference(chip.product_interference, idle_s)

    costs = operations.Costs(
        seconds,
        lambda size: size / chip.hbm_bandwidth,
        network.collective,
        LayerCounter(stack),
        lambda loop: stack.trips_of(loop, module),
        interference,
        growth_of(compiled),
    )
    return timeline.play(module, costs)


def growth_of(compiled: Compiled) -> Callable[[hlo.Instruction], float]:
    """An instruction -> by how much its arrays grow with the model's depth.

    The short model's optimizer and its sums of gradients have stacks of few layers.
    Other instructions, and those of the engine's programs, whose layers are a list,
    give 1.
    """
    deep = compiled.request.config.model
    short = len(compiled.stack.counts)
    if compiled.request.workload != "train":
        return lambda instruction: 1.0
    shapes = abstract(dataclasses.replace(deep, layers=short, residual="standard"))
    placed = sharding.abstract(shapes, compiled.mesh).layers
    stacks = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(placed)}

    def growth(instruction: hlo.Instruction) -> float:
        has_stack = any(array.dims in stacks for array in instruction.outputs)
        return deep.layers / short if has_stack else 1.0

    return growth


def make_report(compiled: Compiled, played: Timeline) -> dict[str, Any]:
    """The plan as plain values, ready for JSON.

    In the totals, simultaneous transfers over different links count once. A step is
    compute, exposed communication and, on a GPU, the time by which hidden communication
    slows down the kernels that run beside it.
    """
    request = compiled.request
    totals, memory = _totals(compiled, played), _memory(compiled)
    return dict(
        target=request.target.name,
        recipe=request.recipe,
        workload=request.workload,
        batch=request.batch,
        context=request.context,
        schedule=request.config.model.residual,
        reduction=reduction_of(compiled),
        layers=request.config.model.layers,
        collectives=[
            _collective_row(collective, compiled.mesh)
            for collective in exchanges(played)
        ],
        totals=totals,
        memory=memory,
        use=use.use_of(compiled, totals["step_us"] / US, step_flops(request), memory),
        sources={
            field: source._asdict() for field, source in request.target.sources.items()
        },
        **({"cache": _cache(compiled)} if request.workload == "decode" else {}),
    )


def _cache(compiled: Compiled) -> dict[str, Any]:
    """What a decode step reads of its cache, over all devices."""
    request, kernel = compiled.request, ""
    read = request.batch * request.context
    if request.kv_layout == "pages":
        kernel, size, count = pages_of(request, request.config.model, compiled.mesh)
        read = size * count * compiled.mesh.shape["data"] * compiled.mesh.shape["fsdp"]
    return dict(
        layout=request.kv_layout,
        kernel=kernel,
        tokens_read=read,
        tokens_alive=request.alive,
    )


def exchanges(played: Timeline) -> list[Collective]:
    """The collectives in which more than one device takes part."""
    return [one for one in played.collectives if len(one.groups[0]) > 1]


def _collective_row(collective: Collective, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    place = place_of(collective.scope)
    return dict(
        name=collective.name,
        kind=collective.kind,
        axis=mesh_axes(collective.groups, mesh),
        bytes=collective.bytes,
        asynchronous=collective.asynchronous,
        communication_us=collective.seconds * US,
        window_compute_us=collective.window * US,
        hidden_us=collective.hidden * US,
        exposed_us=collective.exposed * US,
        last_of_stack=not place.layer and place.block == "last",
        count=round(collective.count, 3),  # executions in a step
        merged=collective.operation.arrays,
        block=str(place),
    )


def _totals(compiled: Compiled, played: Timeline) -> dict[str, float]:
    sent = sum(one.unoverlapped * one.count for one in exchanges(played))
    fused_s = fused_attention_s(compiled.request, compiled.mesh.size)
    hidden = max(sent - played.exposed, 0.0)
    seconds = dict(
        step=played.step + fused_s,
        compute=played.compute + fused_s,
        communication=sent,
        hidden=hidden,
        exposed=played.exposed,
        unavoidable=unavoidable(compiled, played),
        prefetch=played.prefetch,
        interference=played.interference,
        roofline=roofline(compiled),
    )
    return {f"{name}_us": value * US for name, value in seconds.items()}


def fused_attention_s(request: Request, devices: int) -> float:
    """Seconds of a step in a fused attention kernel, which the timeline lacks."""
    if not request.fused:
        return 0.0
    model_config, tokens = request.config.model, request.batch * request.context
    flops = step_flops(request) / 3
    flops -= forward_flops(model_config, "train", tokens, 1)  # attention to itself
    recomputes = request.config.train.remat != "none"
    peak = request.target.chip.peak_flops
    return fused.seconds(flops / devices, recomputes, peak)


def _memory(compiled: Compiled) -> dict[str, Any]:
    capacity = compiled.request.target.chip.hbm_bytes
    needed = compiled.weights + compiled.kv + compiled.temporary
    return dict(
        weights_bytes=compiled.weights,
        kv_bytes=compiled.kv,
        temporary_bytes=int(compiled.temporary),
        capacity_bytes=int(capacity),
        fits=needed <= capacity,
        overlaps=compiled.overlaps,
    )


def reduction_of(compiled: Compiled) -> str:
    """The name of the reduction of a block's partial. For "auto", the name of the
    reduction that `choose` picks."""
    request, mesh = compiled.request, compiled.mesh
    model_config = request.config.model
    reduction = choose.reduction_for(
        request.config.mesh.reduction, model_config, mesh, request.kv_layout
    )
    rows = max(request.at_once // (mesh.shape["data"] * mesh.shape["fsdp"]), 1)
    tokens = 1 if request.workload == "decode" else request.context
    shape = rows, tokens, model_config.dim
    message = jax.ShapeDtypeStruct(shape, jnp.dtype(model_config.dtype))
    return name_for(reduction, message)


def mesh_axes(groups: hlo.Groups, mesh: jax.sharding.Mesh) -> str:
    """The mesh axes ("tensor", "data,fsdp", ...) along which a collective's devices
    differ; "none" for a group of one."""
    varying = set()
    for group in groups:
        coordinates = np.unravel_index(group, tuple(mesh.shape.values()))
        for name, along in zip(mesh.shape, coordinates):
            if len(set(along.tolist())) > 1:
                varying.add(name)
    return ",".join(name for name in mesh.shape if name in varying) or "none"


# ---------------------------------------------------------------- bounds


def unavoidable(compiled: Compiled, played: Timeline) -> float:
    """Seconds of tensor-axis communication that no order of the instructions hides.

    If a block has a delay, or dtp's partials in flight, the reduction in its scope can
    run while the block computes: at least max(0, communication - compute) stays
    exposed. Otherwise, and outside of the layers, all communication stays exposed.
    Where XLA names a layer and no block, all of the layer's compute counts.
    """
    stack = compiled.stack
    layers = schedule.parse(stack.notation, len(stack.counts)).layers
    sent: dict[Place, float] = {}
    computed: dict[Place, float] = {}
    for one in played.collectives:
        if "tensor" in mesh_axes(one.groups, compiled.mesh):
            place = place_of(one.scope)
            sent[place] = sent.get(place, 0.0) + one.unoverlapped * one.count
    for span in played.spans:
        place = place_of(span.scope)
        seconds = (span.end - span.start) * span.executions
        computed[place] = computed.get(place, 0.0) + seconds
    total = 0.0
    for place, seconds in sent.items():
        beside = 0.0
        if _overlaps(place, layers):
            beside = sum(
                spent
                for other, spent in computed.items()
                if other[:2] == place[:2] and place.block in ("", other.block)
            )
        total += max(0.0, seconds - beside)
    return total


def _overlaps(place: Place, layers: tuple[tuple[schedule.Block, ...], ...]) -> bool:
    """Whether a reduction can run beside a block that `place` names."""
    if place.number is None:
        return False
    return any(
        block.overlaps
        for block in layers[place.number]
        if place.block in ("", "+".join(block.parts))
    )


def roofline(compiled: Compiled) -> float:
    """A lower bound on a step's seconds: the larger of the time for its FLOPs at the
    chip's peak, and the time for HBM to read the weights and the cache once."""
    request, chip = compiled.request, compiled.request.target.chip
    decoding = request.workload == "decode"
    bytes_read = compiled.weights + (compiled.kv if decoding else 0)
    return max(
        step_flops(request) / compiled.mesh.size / chip.peak_flops,
        bytes_read / chip.hbm_bandwidth,
    )


def step_flops(request: Request) -> float:
    """FLOPs of the matrix products in a step, over all devices."""
    forward = forward_flops(
        request.config.model, request.workload, request.batch, request.context
    )
    return 3 * forward if request.workload == "train" else forward


def forward_flops(
    model_config: Model, workload: str, batch: int, context: int
) -> float:
    """FLOPs of the matrix products in a forward pass, over all devices."""
    decoding = workload == "decode"
    tokens = batch * (1 if decoding else context)
    read = tokens if workload == "train" else batch  # positions whose logits are needed
    query = model_config.heads * model_config.head_dim
    keys_and_values = 2 * model_config.kv_heads * model_config.head_dim
    by_part = dict(
        attention=4 * query * model_config.dim,  # without keys and values
        mlp=6 * model_config.dim * model_config.ffn_dim,
    )
    parsed = model_config.residual_schedule()
    blocks = [block for layer in parsed.layers for block in layer]
    first_narrow = narrow_blocks(parsed)[0]
    flops: float = tokens * model_config.layers * 2 * model_config.dim * keys_and_values
    flops += read * 2 * model_config.dim * model_config.vocab_size
    for number, block in enumerate(blocks):
        rows = tokens if number < first_narrow else read
        flops += rows * sum(by_part[part] for part in block.parts)
        if "attention" in block.parts:
            window = model_config.sliding_window if block.window else None
            flops += rows * 4 * query * _seen(context, window, decoding)
    return flops


def _seen(context: int, window: int | None, decoding: bool) -> float:
    """The positions that a query attends to: in decode those of the last token, else
    the mean over all tokens."""
    most = context if window is None else min(context, window)
    return most if decoding else most - most**2 / (2 * context)


# ---------------------------------------------------------------- copies of weights


def copies_of_weights(
    module: hlo.Module, least: int = 1 << 20
) -> list[hlo.Instruction]:
    """The instructions that write `least` bytes to HBM from parameters alone."""
    derived: set[str] = set()  # names of parameters, constants and views of them
    copies = []
    for instruction in module.computations[module.entry].values():
        from_parameters = all(name in derived for name in instruction.operands)
        if instruction.opcode in ("parameter", "constant"):
            derived.add(instruction.name)
        elif not from_parameters:
            continue
        elif instruction.opcode in ("bitcast", "get-tuple-element"):
            derived.add(instruction.name)
        elif instruction.operands and instruction.opcode not in operations.FREE:
            in_hbm = [array for array in instruction.outputs if array.space == 0]
            if sum(array.bytes for array in in_hbm) >= least:
                copies.append(instruction)
    return copies
