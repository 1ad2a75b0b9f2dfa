"""Chooses the cheapest reduction for a machine, a mesh and a message.

The costs are those of hardware/cost.py; no compiler of the machine is needed. JAX
traces a reduction's rounds to find what it sends, so that no second description of the
reduction has to be kept up to date.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import schedule
from ladder_jax.config import ConfigError, Model
from ladder_jax.hardware import chips, cost
from ladder_jax.residual import tuned
from ladder_jax.residual.reductions import PRODUCTS, REDUCTIONS, Like, Policy
from ladder_jax.sharding import TENSOR

# Seconds that a TPU computes for each message beyond the first: it slices the message
# out of the array and writes the received one into it. The number is the difference in
# compute between direct and recursive doubling in the schedules of 70B decode at batch
# 64 (docs/overlap.md).
MESSAGE_S = 2e-6
# The cost of a second of communication that a TPU's compute hides; a second of compute
# costs 1.
HIDDEN_WEIGHT = 0.5
# A JAX primitive -> XLA's opcode, for which cost.py has a formula.
COLLECTIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "ppermute": "collective-permute",
}
# Primitives that have a mesh axis as a parameter and send nothing.
SILENT = {"axis_index", "pvary"}


class Send(NamedTuple):
    """One collective of a round."""

    kind: str  # XLA's opcode
    # (source, target) shards of a collective-permute; None for other collectives.
    pairs: tuple[tuple[int, int], ...] | None
    size: int  # bytes of the whole message on one device


@functools.cache
def rounds(name: str, n: int, size: int) -> list[list[Send]]:
    """The collectives of each round of reduction `name`, for `size` bytes on n shards.

    Raises ValueError where cost.py has no formula for a collective of the reduction. A
    collective without a cost would make "auto" choose the reduction always.
    """

    def program(value: jax.Array) -> Any:
        start, steps, _ = REDUCTIONS[name](value)
        state = start(value)
        for step in steps:
            # One "name" equation for each array of the state marks a round's start.
            state = jax.tree.map(lambda x: checkpoint_name(x, "round"), state)
            state = step.merge(state, step.send(state))
        return state

    value = jax.ShapeDtypeStruct((max(size // 2, 1),), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(program, axis_env=[(TENSOR, n)])(value).jaxpr
    by_round: list[list[Send]] = []
    previous_is_mark = False
    for equation in jaxpr.eqns:
        is_mark = equation.primitive.name == "name"
        if is_mark and not previous_is_mark:
            by_round.append([])
        previous_is_mark = is_mark
        sends = [_send(name, collective) for collective in _collectives(equation)]
        if sends and not by_round:
            raise ValueError(f"reduction {name!r} sends before its first round")
        if sends:
            by_round[-1] += sends
    return by_round


def _collectives(equation: Any) -> Iterator[Any]:
    """The collectives of a jaxpr's equation: itself, and those of jaxprs inside it.

    A collective is an equation with a mesh axis among its parameters.
    """
    primitive = equation.primitive.name
    axes = [equation.params.get(key) for key in ("axes", "axis_name")]
    if TENSOR in jax.tree.leaves(axes) and primitive not in SILENT:
        yield equation
    for inner_equation in _inner_equations(equation):
        for collective in _collectives(inner_equation):
            if primitive in ("scan", "while", "cond"):
                raise ValueError(
                    f"a reduction has {collective.primitive.name} inside "
                    f"{primitive}, which the cost model cannot count"
                )
            yield collective


def _inner_equations(equation: Any) -> Iterator[Any]:
    """The equations of the jaxprs among an equation's parameters."""
    parameters = list(equation.params.values())
    is_jaxpr = lambda x: hasattr(x, "eqns")
    for leaf in jax.tree.leaves(parameters, is_leaf=is_jaxpr):
        if is_jaxpr(leaf):
            yield from leaf.eqns


def _send(name: str, equation: Any) -> Send:
    """The `Send` of a collective's equation; `name` is the reduction's, for errors."""
    primitive = equation.primitive.name
    if primitive not in COLLECTIVES:
        raise ValueError(
            f"reduction {name!r} uses {primitive}, for which the cost model has no "
            f"formula: it knows {', '.join(COLLECTIVES)}"
        )
    arrays = equation.outvars if primitive == "all_gather" else equation.invars
    array = arrays[0].aval
    size = array.size * array.dtype.itemsize
    return Send(COLLECTIVES[primitive], equation.params.get("perm"), size)


def seconds(
    name: str, network: cost.Network, groups: Sequence[Sequence[int]], size: int
) -> list[float]:
    """Seconds that each round takes; all groups of devices reduce at the same time."""
    round_s = []
    for sends in rounds(name, len(groups[0]), size):
        link_free_s: dict[Any, float] = {}  # link -> when it is free again
        end_s = 0.0
        for kind, pairs, message_bytes in sends:
            devices: Sequence[Sequence[int]] = groups
            if pairs is not None:
                devices = [(group[a], group[b]) for group in groups for a, b in pairs]
            transfer = network.collective(kind, devices, message_bytes)
            free_s = [link_free_s.get(link, 0.0) for link in transfer.links]
            start_s = max([0.0, *free_s])
            busy_until_s = start_s + transfer.bandwidth_s
            link_free_s |= dict.fromkeys(transfer.links, busy_until_s)
            end_s = max(end_s, start_s + transfer.seconds)
        round_s.append(end_s)
    return round_s


def choose_reduction(
    network: cost.Network,
    groups: Sequence[Sequence[int]],
    size: int,
    hides: bool,
    blocks: Sequence[float] | None = None,
) -> str:
    """The name of the reduction that costs least for a message of `size` bytes.

    The cost of a reduction is the seconds that the device waits for it (exposed), plus
    the seconds that the device computes for it. `all` is the time of all rounds,
    `hidden` that of the first PRODUCTS rounds: a block has compute for so many.

    =================================  ==============  ================================
    machine, and what bounds the       candidates      exposed
    compute beside the reduction
    =================================  ==============  ================================
    TPU, no compute                    all             all
    GPU, no compute                    psum, one-shot  all
    GPU, either                        psum, one-shot  all - (1 - interference) hidden
    TPU, reads of weights (decode)     asynchronous    all - (1 - HIDDEN_WEIGHT) hidden
    TPU, products (prefill, training)  asynchronous    all - min(hidden, block)
                                       synchronous     all
    =================================  ==============  ================================

    In the last two rows the cost is the sum over `blocks`.

    Args:
      network: the machine.
      groups: the logical devices of each tensor-parallel group.
      size: bytes.
      hides: whether a block computes while the reduction runs (the residual schedule
        has delays).
      blocks: seconds that each block of a layer computes, where its products bound its
        time (`block_seconds`); None where the reads of its weights do.
    """
    chip = network.chip
    # XLA:GPU runs a kernel for every exchange, and each kernel takes nearly as long as
    # an all-reduce. So only reductions of one kernel can be the fastest there.
    names = list(REDUCTIONS) if chip.is_tpu else ["psum", "one-shot"]
    n = len(groups[0])
    if chip.is_tpu and hides and not blocks:
        names = [name for name in names if _is_asynchronous(chip, name, n, size)]

    def cost_of(name: str) -> float:
        round_s = seconds(name, network, groups, size)
        extra_s = _extra_compute(chip, sum(rounds(name, n, size), []))
        if not hides:
            exposed = [sum(round_s)]
        elif not chip.is_tpu:
            exposed = [exposed_on_gpu(round_s, chip.interference)]
        elif not blocks:
            exposed = [exposed_on_tpu_decode(round_s)]
        elif _is_asynchronous(chip, name, n, size):
            exposed = [exposed_on_tpu_long_message(round_s, block) for block in blocks]
        else:
            exposed = [sum(round_s)] * len(blocks)
        return sum(exposed_s + extra_s for exposed_s in exposed)

    return min(names, key=cost_of)


def exposed_on_gpu(round_s: Sequence[float], interference: float) -> float:
    """Seconds that a GPU waits, plus what hidden rounds cost the kernels beside them.

    NCCL takes SMs and HBM bandwidth from these kernels (`Chip.interference`).
    """
    return sum(round_s) - (1 - interference) * sum(round_s[:PRODUCTS])


def exposed_on_tpu_decode(round_s: Sequence[float]) -> float:
    """Seconds that a TPU waits where the reads of weights bound a block's time.

    Hidden rounds count HIDDEN_WEIGHT of their time.
    """
    return sum(round_s) - (1 - HIDDEN_WEIGHT) * sum(round_s[:PRODUCTS])


def exposed_on_tpu_long_message(round_s: Sequence[float], block_s: float) -> float:
    """Seconds that a TPU waits where a block computes for `block_s` seconds.

    The message is long then too, and may take longer than the block.
    """
    return sum(round_s) - min(sum(round_s[:PRODUCTS]), block_s)


def _is_asynchronous(chip: chips.Chip, name: str, n: int, size: int) -> bool:
    """Whether XLA:TPU runs the reduction beside compute.

    It does so for collective-permutes, and for an all-reduce of a long message.
    """
    kinds = {send.kind for sends in rounds(name, n, size) for send in sends}
    if "all-reduce" in kinds and size < chip.async_all_reduce_min_bytes:
        return False
    return not kinds & {"all-gather", "reduce-scatter"}


def _extra_compute(chip: chips.Chip, sends: Sequence[Send]) -> float:
    """Seconds that a device computes for a reduction: copies of messages, and sums."""
    copies_s = MESSAGE_S * (len(sends) - 1) if chip.is_tpu else 0.0
    gathered_bytes = sum(send.size for send in sends if send.kind == "all-gather")
    # The device reads all gathered bytes to sum them.
    return copies_s + gathered_bytes / chip.hbm_bandwidth


def block_seconds(
    model_config: Model, chip: chips.Chip, rows: int, shards: int
) -> list[float] | None:
    """Seconds of attention's and of MLP's products of `rows` tokens at a chip's peak.

    None where there are so few rows that the reads of the weights take longer.
    """
    # A bfloat16 weight is 2 bytes and 2 FLOPs a row.
    if rows < chip.peak_flops / chip.hbm_bandwidth:
        return None
    heads = 2 * (model_config.heads + model_config.kv_heads)  # wq, wo; wk, wv
    widths = (heads * model_config.head_dim, 3 * model_config.ffn_dim)
    return [
        2 * rows * model_config.dim * width / shards / chip.peak_flops
        for width in widths
    ]


def network_of(
    devices: Sequence[Any],
    all_reduce: float | None = None,
    chip: chips.Chip | None = None,
) -> cost.Network | None:
    """The `cost.Network` of JAX devices, in a mesh's order.

    None where the cost model does not know the chip.

    Args:
      devices: all of one kind.
      all_reduce: see cost.Network.
      chip: with other costs than the row of chips.CHIPS. None: that row.
    """
    kind = chips.kind_of(devices[0])
    chip = chip or (chips.CHIPS[kind] if kind is not None else None)
    if chip is None or not chip.modelled:
        return None
    places = [tuple(d.coords) if chip.is_tpu else d.process_index for d in devices]
    return cost.Network(chip, places, all_reduce)


def reduction_for(
    name: str, model_config: Model, mesh: jax.sharding.Mesh, layout: str = "rows"
) -> str | Policy:
    """The reduction for mesh.reduction=`name`: `name`, or for "auto" the fastest.

    layout: of the cache in decode, "rows" or "pages".
    Raises ConfigError where XLA cannot compile the reduction for the mesh.
    """
    if name == "auto":
        return auto_reduction(model_config, mesh, layout)
    if (
        name == "one-shot"
        and _overlaps(model_config)
        and chips.kind_of(mesh.devices.flat[0]) == "v5e"
    ):
        raise ConfigError(
            "mesh.reduction='one-shot' is not accepted on v5e with "
            f"model.residual={model_config.residual!r}: XLA does not "
            "finish compiling its all-gathers; choose 'auto' or another reduction"
        )
    return _fixed(name, mesh)


@functools.lru_cache(maxsize=32)
def _fixed(name: str, mesh: jax.sharding.Mesh) -> str | Policy:
    """One reduction for all messages, with the program that "auto" has if it picks it:
    `name` alone says nothing of what the chip needs beside it."""
    chip = chips.CHIPS.get(chips.kind_of(mesh.devices.flat[0]) or "")
    if chip is None or not (chip.in_order or chip.tied_rows):
        return name
    return Policy(lambda value: name, chip.in_order, chip.tied_rows)


def _overlaps(model_config: Model) -> bool:
    """Whether a reduction can run beside some block."""
    return schedule.parse(model_config.residual, model_config.layers).overlaps


@functools.lru_cache(maxsize=32)
def auto_reduction(
    model_config: Model, mesh: jax.sharding.Mesh, layout: str = "rows"
) -> str | Policy:
    """The fastest reduction of each message of a model on a mesh, as a Policy.

    For decode with a schedule that has delays it is the one with which XLA's compiler
    was found to make the shortest step, where the table has the model and the chip
    (tuned.py); elsewhere the one that costs least (`choose_reduction`).

    "psum" on chips that the cost model does not know, on CPUs, and without a tensor
    axis. Raises ConfigError if the table is damaged.
    """
    network = network_of(list(mesh.devices.flat))
    tensor = mesh.shape[TENSOR]
    if network is None or tensor == 1:
        return "psum"
    groups = np.arange(mesh.size).reshape(-1, tensor).tolist()
    hides = _overlaps(model_config)
    kind = chips.kind_of(mesh.devices.flat[0])
    found = tuned.choices_for(kind, tensor, model_config, layout) if hides else {}

    @functools.cache
    def cheapest(rows: int, size: int) -> str:
        blocks = block_seconds(model_config, network.chip, rows, tensor)
        return choose_reduction(network, groups, size, hides, blocks)

    def name_for(value: Like) -> str:
        choice = tuned.choice_of(found, value, model_config.dim)
        if choice is not None:
            return choice
        rows = value.size // value.shape[-1] if value.ndim else 1
        return cheapest(rows, value.size * value.dtype.itemsize)

    return Policy(name_for, network.chip.in_order, network.chip.tied_rows)
