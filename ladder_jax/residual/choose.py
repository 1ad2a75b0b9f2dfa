"""Chooses a reduction by the planner's cost model: for a machine, a mesh, a message. Needs no compiler of that machine.

What a reduction sends is read off its own rounds, as JAX traces them, so that there is no second list to keep true.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import schedule
from ladder_jax.config import ConfigError
from ladder_jax.hardware import chips, cost
from ladder_jax.residual.reductions import PRODUCTS, REDUCTIONS, Policy
from ladder_jax.sharding import TENSOR

# Seconds that a TPU computes for one message more, to cut it out and put it in its place: from the difference in
# compute between direct and recursive doubling in the schedules of 70B decode at batch 64 (docs/overlap.md).
MESSAGE = 2e-6
HIDDEN = 0.5  # what a second on a TPU's links counts for where compute runs beside it: less than one of compute
KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "ppermute": "collective-permute",
}


@functools.cache
def rounds(name, n, size):
    """What reduction `name` of `size` bytes over `n` shards sends: by round, (XLA's kind, pairs or None, bytes)."""

    def program(value):
        start, steps, _ = REDUCTIONS[name](value)
        state = start(value)
        for step in steps:
            state = jax.tree.map(lambda x: checkpoint_name(x, "round"), state)
            state = step.merge(state, step.send(state))
        return state

    value = jax.ShapeDtypeStruct((max(size // 2, 1),), jnp.bfloat16)
    made, marked = [], False
    for equation in jax.make_jaxpr(program, axis_env=[(TENSOR, n)])(value).eqns:
        kind = equation.primitive.name
        if kind == "name":
            made += [] if marked else [[]]
        elif kind in KINDS:
            array = (equation.outvars if kind == "all_gather" else equation.invars)[
                0
            ].aval
            made[-1].append(
                (
                    KINDS[kind],
                    equation.params.get("perm"),
                    array.size * array.dtype.itemsize,
                )
            )
        marked = kind == "name"
    return made


def seconds(name, network, groups, size):
    """How long each round takes, all groups of devices at once."""
    taken = []
    for sends in rounds(name, len(groups[0]), size):
        free, end = {}, 0.0
        for kind, pairs, bytes in sends:
            who = (
                groups
                if pairs is None
                else [(group[a], group[b]) for group in groups for a, b in pairs]
            )
            transfer = network.collective(kind, who, bytes)
            start = max([0.0, *(free.get(link, 0.0) for link in transfer.links)])
            free |= dict.fromkeys(transfer.links, start + transfer.flow)
            end = max(end, start + transfer.seconds)
        taken.append(end)
    return taken


def choose_reduction(network, groups, size, hides, blocks=None):
    """The name of the reduction for a message of `size` bytes.

    Where compute runs beside it (`hides`), it is one that the compiler makes asynchronous: exchanges, all-reduces on a
    GPU and long ones on TPU. Its rounds beyond those that a block's products can end are waited for, and count in full;
    the others for a part. Where nothing hides it, the fastest is taken.

    `blocks`: seconds that each block of a layer computes, where products of many rows bound it. A long message may take
    longer than a block: what is left to wait for decides then.
    """
    chip = network.chip
    tpu = chip.wrap > 0
    synchronous = ("one-shot",) * tpu + ("psum",) * (tpu and size < chip.aside)

    def cost_of(name):
        taken, sent = (
            seconds(name, network, groups, size),
            sum(rounds(name, len(groups[0]), size), []),
        )
        more = MESSAGE * (len(sent) - 1) if tpu else 0.0
        more += (
            sum(bytes for kind, _, bytes in sent if kind == "all-gather")
            / chip.hbm_bandwidth
        )  # to be summed
        hidden = sum(taken[:PRODUCTS]) if hides else 0.0
        if tpu and hides and blocks:
            hides_in = lambda block: 0.0 if name in synchronous else min(hidden, block)
            return sum(sum(taken) - hides_in(block) + more for block in blocks)
        return sum(taken) - (1 - (chip.interference or HIDDEN)) * hidden + more

    if not tpu:  # XLA:GPU runs a kernel for every exchange, and each takes most of what an all-reduce takes
        return min("psum", "one-shot", key=cost_of)
    left_out = synchronous if hides and not blocks else ()
    return min((name for name in REDUCTIONS if name not in left_out), key=cost_of)


def block_seconds(model, chip, rows, shards):
    """How long attention's and MLP's products of `rows` tokens take at a chip's peak (`model`: config.Model), or None
    for rows so few that reading the weights takes longer."""
    if rows < chip.flops / chip.hbm_bandwidth:
        return None
    width = 2 * (model.heads + model.kv_heads) * model.head_dim
    return [
        2 * rows * model.dim * outputs / shards / chip.flops
        for outputs in (width, 3 * model.ffn_dim)
    ]


def network_of(devices, all_reduce=None):
    """The `cost.Network` of jax devices in a mesh's order, or None where the machine is not known."""
    kind = chips.kind_of(devices[0])
    if kind is None:
        return None
    chip = chips.CHIPS[kind]
    return cost.Network(
        chip,
        [tuple(d.coords) if chip.wrap else d.process_index for d in devices],
        all_reduce,
    )


def reduction_for(name, config, mesh):
    """What `model.hidden` takes for mesh.reduction=`name` and a model (config.Model). ConfigError where it cannot be
    compiled."""
    if name == "auto":
        return auto_reduction(config, mesh)
    if (
        name == "one-shot"
        and _delayed(config)
        and chips.kind_of(mesh.devices.flat[0]) == "v5e"
    ):
        raise ConfigError(
            f"mesh.reduction='one-shot' is not accepted on v5e with model.residual={config.residual!r}: "
            "XLA's fusion of its all-gathers does not come to an end; choose 'auto' or another reduction"
        )
    return name


def _delayed(config):
    return any(
        block.delay
        for blocks in schedule.parse(config.residual, config.layers).layers
        for block in blocks
    )


@functools.lru_cache(maxsize=32)
def auto_reduction(config, mesh):
    """What suits a model (config.Model) on a mesh: a name, or a Policy that gives each message one.

    On machines that the cost model does not know, CPUs among them, it is psum.
    """
    network = network_of(list(mesh.devices.flat))
    if network is None or mesh.shape[TENSOR] == 1:
        return "psum"
    groups = [
        list(map(int, row))
        for row in jnp.arange(mesh.size).reshape(-1, mesh.shape[TENSOR])
    ]
    hides = _delayed(config)

    @functools.cache
    def chosen(rows, size):
        return choose_reduction(
            network,
            groups,
            size,
            hides,
            block_seconds(config, network.chip, rows, mesh.shape[TENSOR]),
        )

    def name_for(value):
        return chosen(
            value.size // value.shape[-1] if value.ndim else 1,
            value.size * value.dtype.itemsize,
        )

    return Policy(name_for, network.chip.in_order)
