"""Delayed tensor parallelism: own streams that each block's sum corrects later.

Kog, "Delayed Tensor Parallelism for Faster Transformer Inference", 2026. Each of L
tensor shards has a residual stream X_l. With o_l^n shard l's partial of block n of N,
and a delay of d blocks:

    n < d           X_l += sqrt(L) o_l^n
    n >= d          X_l += o_l^n + sum(o_j^(n-d) for j != l)
    n >= N - d      as above, and o^n is never sent

At the end, every shard normalises its stream, and the head reads the mean of the L
results. With d = 0 or L = 1 this is schedule standard.
"""

from typing import Any

import jax
from jax import lax

from ladder_jax import sharding
from ladder_jax.residual.blocks import ComputeBlock, Rows, take
from ladder_jax.residual.overlap import AsyncReduction, BackwardReduction, Overlap
from ladder_jax.residual.reductions import Policy, copy_to_tensor_axis, reduce
from ladder_jax.residual.stream import Stream
from ladder_jax.schedule import Block


def run_dtp_block(
    stream: Stream,
    block: Block,
    compute: ComputeBlock,
    reduction: str | Policy,
    rows: Rows,
) -> tuple[Stream, Any]:
    """Computes a block on this shard's own stream, beside two reductions.

    They are the sum of the block before it, and in the backward pass the sum of the
    cotangents of the correction that this block adds.

    Args:
      stream: `total` is this shard's stream, `sums` are the other shards' shares that
        it still lacks, oldest first, and `partial` is the newest block's partial, or
        None if nobody sends it.
      block: whether a correction joins the stream after it, and whether its own
        partial is sent.
      compute: the block's computation.
      reduction: a name in REDUCTIONS, or a Policy.
      rows: the positions that are computed.

    Returns:
      The stream after the block, and compute's output.
    """
    shards = sharding.axis_size(sharding.TENSOR)
    x_BTD: Any = stream.total
    # The corrections join the stream after this block, so at its positions alone.
    total_BTD = take(x_BTD, rows.stream)
    waiting = tuple(take(x, rows.stream) for x in stream.sums)
    in_flight, pending, backward = waiting, None, None
    if stream.partial is not None:
        pending = AsyncReduction(take(stream.partial, rows.stream), reduction)
        in_flight = (*waiting, pending.partial)
    if block.lands and shards > 1:
        backward = BackwardReduction(in_flight[:1], reduction)
    overlap = Overlap(pending, backward)
    partial_BTD, output = compute(overlap.enter(x_BTD), overlap.progress, rows.partial)
    partial_BTD = overlap.leave(partial_BTD)
    if pending is not None:
        # Its cotangent is that of the partial.
        waiting = (*waiting, pending.wait() - lax.stop_gradient(pending.partial))
    if block.lands:
        total_BTD = total_BTD + partial_BTD
        correction_BTD, *waiting_BTD = waiting
        if backward is not None:
            total_BTD = total_BTD + _land(correction_BTD, backward.next_input())
        waiting = tuple(waiting_BTD)
    else:
        total_BTD = total_BTD + partial_BTD * shards**0.5
    sent = partial_BTD if block.reduce else None
    return Stream(total_BTD, waiting, sent), output


def mean_of_streams(u_BTD: jax.Array) -> jax.Array:
    """The mean of the shards' final streams, ready for column-parallel work."""
    shards = sharding.axis_size(sharding.TENSOR)
    return copy_to_tensor_axis(reduce(u_BTD / shards, "psum"), "psum")


@jax.custom_vjp
def _land(correction: jax.Array, token: jax.Array) -> jax.Array:
    """Returns `correction`: the sum of a block's partials without this shard's own.

    That map is its own transpose. `token` gets the cotangent, which its
    BackwardReduction sums over the shards and gives to the partial; `correction` takes
    this shard's own share away again.
    """
    return correction


def _land_forward(correction: jax.Array, token: jax.Array) -> tuple[jax.Array, None]:
    return correction, None


def _land_backward(_: None, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return -cotangent, cotangent


_land.defvjp(_land_forward, _land_backward)
