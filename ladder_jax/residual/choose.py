"""Chooses a reduction by the planner's cost model: for a machine, a mesh, a message.

It needs no compiler of that machine. What a reduction sends is read from its own
rounds, as JAX traces them, so there is no second list that could go out of date.
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
from ladder_jax.residual.reductions import PRODUCTS, REDUCTIONS, Like, Policy
from ladder_jax.sharding import TENSOR

# Seconds that a TPU computes for each message beyond the first, to cut it out and to
# put it in its place: the difference in compute between direct and recursive doubling
# in the schedules of 70B decode at batch 64 (docs/overlap.md).
MESSAGE_S = 2e-6
# What a second on a TPU's links counts for where compute hides it. It is below 1, the
# weight of a second of compute.
HIDDEN_WEIGHT = 0.5
# A JAX primitive -> the opcode of XLA that cost.py knows.
COLLECTIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "ppermute": "collective-permute",
}
NOT_SENT = {"axis_index", "pvary"}  # they name an axis and send nothing


class Send(NamedTuple):
    """One collective of a round."""

    kind: str  # XLA's opcode
    pairs: tuple[tuple[int, int], ...] | None  # of a collective-permute, within a group
    size: int  # bytes of the whole message on one device


@functools.cache
def rounds(name: str, n: int, size: int) -> list[list[Send]]:
    """What reduction `name` of `size` bytes over `n` shards sends, round by round.

    Raises ValueError where the reduction uses a collective that has no formula here:
    at no cost, "auto" would always choose it.
    """

    def program(value: jax.Array) -> Any:
        start, steps, _ = REDUCTIONS[name](value)
        state = start(value)
        for step in steps:
            # names mark where a round starts: one for each array of the state
            state = jax.tree.map(lambda x: checkpoint_name(x, "round"), state)
            state = step.merge(state, step.send(state))
        return state

    value = jax.ShapeDtypeStruct((max(size // 2, 1),), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(program, axis_env=[(TENSOR, n)])(value).jaxpr
    by_round: list[list[Send]] = []
    after_mark = False
    for equation in jaxpr.eqns:
        is_mark = equation.primitive.name == "name"
        if is_mark and not after_mark:
            by_round.append([])
        after_mark = is_mark
        sends = [_send(name, collective) for collective in _collectives(equation)]
        if sends and not by_round:
            raise ValueError(f"reduction {name!r} sends before its first round")
        if sends:
            by_round[-1] += sends
    return by_round


def _collectives(equation: Any) -> Iterator[Any]:
    """The collectives in `equation`, itself and those of jaxprs inside it.

    A collective is known by a mesh axis among its parameters.
    """
    primitive = equation.primitive.name
    axes = [equation.params.get(key) for key in ("axes", "axis_name")]
    if TENSOR in jax.tree.leaves(axes) and primitive not in NOT_SENT:
        yield equation
    parameters = list(equation.params.values())
    for inner in jax.tree.leaves(parameters, is_leaf=lambda x: hasattr(x, "eqns")):
        for nested in getattr(inner, "eqns", ()):
            for collective in _collectives(nested):
                if primitive in ("scan", "while", "cond"):
                    raise ValueError(
                        f"a reduction has {collective.primitive.name} inside "
                        f"{primitive}, which the cost model cannot count"
                    )
                yield collective


def _send(name: str, equation: Any) -> Send:
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
    """How long each round takes, all groups of devices at once."""
    round_s = []
    for sends in rounds(name, len(groups[0]), size):
        link_free: dict[Any, float] = {}  # link -> when it has sent all before
        end = 0.0
        for kind, pairs, bytes_ in sends:
            who: Sequence[Sequence[int]] = groups
            if pairs is not None:
                who = [(group[a], group[b]) for group in groups for a, b in pairs]
            transfer = network.collective(kind, who, bytes_)
            start = max([0.0, *(link_free.get(link, 0.0) for link in transfer.links)])
            link_free |= dict.fromkeys(transfer.links, start + transfer.bandwidth_s)
            end = max(end, start + transfer.seconds)
        round_s.append(end)
    return round_s


def choose_reduction(
    network: cost.Network,
    groups: Sequence[Sequence[int]],
    size: int,
    hides: bool,
    blocks: Sequence[float] | None = None,
) -> str:
    """The name of the reduction that costs least for a message of `size` bytes.

    Cost is the seconds that the device waits for the reduction (exposed), plus the
    seconds that the device computes for it. `hidden` is the time of the first PRODUCTS
    rounds, as a block has so many products to end a round behind.

    ============================  ================  ==================================
    machine, compute beside it    reductions        exposed
    ============================  ================  ==================================
    TPU, none                     all               all rounds
    GPU, none                     psum, one-shot    all rounds
    GPU, any                      psum, one-shot    all - (1 - interference) * hidden
    TPU, bound by weights         asynchronous      all - (1 - HIDDEN_WEIGHT) * hidden
    TPU, bound by products        all               all - min(hidden, block), summed
                                                    over blocks; synchronous: all
    ============================  ================  ==================================

    Args:
      network: the machine.
      groups: the logical devices of each tensor-parallel group.
      size: bytes.
      hides: whether a block computes while the reduction runs (the residual schedule
        has delays).
      blocks: seconds that each block of a layer computes, where products of many rows
        bound them (`block_seconds`); None where reading the weights does.
    """
    chip = network.chip
    # XLA:GPU runs a kernel for every exchange, and each takes most of an all-reduce's
    # time: only one kernel's reductions can be the fastest there.
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
    """Seconds that a TPU waits where blocks are as long as reading their weights.

    Hidden rounds count for HIDDEN_WEIGHT of their time.
    """
    return sum(round_s) - (1 - HIDDEN_WEIGHT) * sum(round_s[:PRODUCTS])


def exposed_on_tpu_long_message(round_s: Sequence[float], block_s: float) -> float:
    """Seconds that a TPU waits where a block computes for `block_s` seconds.

    The message is long then too, and may take longer than the block.
    """
    return sum(round_s) - min(sum(round_s[:PRODUCTS]), block_s)


def _is_asynchronous(chip: chips.Chip, name: str, n: int, size: int) -> bool:
    """Whether XLA:TPU runs the reduction beside compute: exchanges, long psums."""
    kinds = {send.kind for sends in rounds(name, n, size) for send in sends}
    if "all-reduce" in kinds and size < chip.async_all_reduce_min_bytes:
        return False
    return not kinds & {"all-gather", "reduce-scatter"}


def _extra_compute(chip: chips.Chip, sends: Sequence[Send]) -> float:
    """Seconds that a device computes for a reduction: it cuts, places and sums."""
    extra_s = MESSAGE_S * (len(sends) - 1) if chip.is_tpu else 0.0
    gathered = sum(send.size for send in sends if send.kind == "all-gather")
    return extra_s + gathered / chip.hbm_bandwidth  # all that was gathered is read


def block_seconds(
    model_config: Model, chip: chips.Chip, rows: int, shards: int
) -> list[float] | None:
    """How long attention's and MLP's products of `rows` tokens take at a chip's peak.

    None where `rows` is so small that reading the weights takes longer.
    """
    if rows < chip.peak_flops / chip.hbm_bandwidth:
        return None
    heads = 2 * (model_config.heads + model_config.kv_heads)
    widths = (heads * model_config.head_dim, 3 * model_config.ffn_dim)
    return [
        2 * rows * model_config.dim * width / shards / chip.peak_flops
        for width in widths
    ]


def network_of(
    devices: Sequence[Any], all_reduce: float | None = None
) -> cost.Network | None:
    """The `cost.Network` of JAX devices in a mesh's order.

    None where the cost model does not know the machine. `all_reduce`: see Network.
    """
    kind = chips.kind_of(devices[0])
    if kind is None or not chips.CHIPS[kind].modelled:
        return None
    chip = chips.CHIPS[kind]
    places = [tuple(d.coords) if chip.is_tpu else d.process_index for d in devices]
    return cost.Network(chip, places, all_reduce)


def reduction_for(
    name: str, model_config: Model, mesh: jax.sharding.Mesh
) -> str | Policy:
    """What the model takes for mesh.reduction=`name`: `name`, or "auto"'s choice.

    Raises ConfigError where XLA cannot compile the reduction for the mesh.
    """
    if name == "auto":
        return auto_reduction(model_config, mesh)
    if (
        name == "one-shot"
        and _has_delays(model_config)
        and chips.kind_of(mesh.devices.flat[0]) == "v5e"
    ):
        raise ConfigError(
            "mesh.reduction='one-shot' is not accepted on v5e with "
            f"model.residual={model_config.residual!r}: XLA's fusion of its "
            "all-gathers does not come to an end; choose 'auto' or another reduction"
        )
    return name


def _has_delays(model_config: Model) -> bool:
    """Whether a block reads a stale stream, so that it can hide a reduction."""
    blocks = schedule.parse(model_config.residual, model_config.layers).layers
    return any(block.delay for layer in blocks for block in layer)


@functools.lru_cache(maxsize=32)
def auto_reduction(model_config: Model, mesh: jax.sharding.Mesh) -> str | Policy:
    """The reductions that suit a model on a mesh: a name, or a Policy by message.

    It is psum on machines that the cost model does not know, CPUs among them.
    """
    network = network_of(list(mesh.devices.flat))
    tensor = mesh.shape[TENSOR]
    if network is None or tensor == 1:
        return "psum"
    groups = np.arange(mesh.size).reshape(-1, tensor).tolist()
    hides = _has_delays(model_config)

    @functools.cache
    def choose(rows: int, size: int) -> str:
        blocks = block_seconds(model_config, network.chip, rows, tensor)
        return choose_reduction(network, groups, size, hides, blocks)

    def name_for(value: Like) -> str:
        rows = value.size // value.shape[-1] if value.ndim else 1
        return choose(rows, value.size * value.dtype.itemsize)

    return Policy(name_for, network.chip.in_order)
