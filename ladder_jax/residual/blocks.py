"""Computes one block on the residual stream.

`run_block` defines what a delay does, `run_desync_block` what desync does; dtp.py and
annealing.py have the blocks of dtp and of an annealed delay.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import sharding
from ladder_jax.residual.overlap import Overlap
from ladder_jax.residual.reductions import (
    Policy,
    copy_to_tensor_axis,
    reduce,
    with_gradient_of,
)
from ladder_jax.residual.stream import Stream, backward_reduction
from ladder_jax.schedule import Block

# Computes a block with its parameters: (x_BTD, progress, read_BR) -> (partial_BTD,
# output).
ComputeBlock = Callable[..., tuple[jax.Array, Any]]


class Rows(NamedTuple):
    """The positions along T, [B, R], that a block computes; None: all of them."""

    partial: jax.Array | None = None  # the positions of its partial
    stream: jax.Array | None = None  # the positions of the stream after the block


def take(x: jax.Array, read_BR: jax.Array | None) -> jax.Array:
    """`x` [B, T, ...] at the positions `read_BR` along T; all of `x` if it is None."""
    if read_BR is None:
        return x
    index = read_BR.reshape(*read_BR.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def run_block(
    stream: Stream,
    block: Block,
    next_delay: int,
    compute: ComputeBlock,
    reduction: str | Policy,
    rows: Rows,
) -> tuple[Stream, Any]:
    """Computes a block beside the pending reductions, and adds it to the stream.

    Args:
      stream: the stream before the block.
      block: its delay says how much of the stream it reads.
      next_delay: the delay of the block after it.
      compute: the block's computation.
      reduction: a name in REDUCTIONS, or a Policy.
      rows: the positions that are computed.

    Returns:
      The stream after the block, with the block's partial not yet reduced, and
      compute's output.
    """
    x_BTD, sums, pending = stream.split(block.delay, reduction)
    total_BTD = take(x_BTD, rows.stream)
    if stream.token is None:
        x_BTD = copy_to_tensor_axis(x_BTD, reduction)
    else:
        x_BTD = with_gradient_of(x_BTD, stream.token)
    newer = sums if pending is None else (*sums, pending.partial)
    backward = backward_reduction(total_BTD, newer, next_delay, reduction)
    overlap = Overlap(pending, backward)
    partial_BTD, output = compute(overlap.enter(x_BTD), overlap.progress, rows.partial)
    partial_BTD = overlap.leave(partial_BTD)
    token = None if backward is None else backward.next_input()
    if pending is not None:
        sums = (*sums, pending.wait())
    return Stream(total_BTD, sums, partial_BTD, token), output


def run_desync_block(
    stream: Stream,
    block: Block,
    compute: ComputeBlock,
    reduction: str | Policy,
    rows: Rows,
) -> tuple[Stream, Any]:
    """Computes a block on this tensor shard's own stream, and adds the shard's partial.

    If the block reduces, the streams of all shards are equal afterwards: the sum of the
    partials and, by the mean rule, the mean of the streams.
    """
    x_BTD = stream.read(reduction)
    partial_BTD, output = compute(x_BTD, Overlap(None, None).progress, rows.partial)
    total_BTD = take(x_BTD, rows.stream)
    if not block.reduce:
        return Stream(total_BTD + partial_BTD), output
    mean_share = total_BTD / sharding.axis_size(sharding.TENSOR)
    mean_BTD = checkpoint_name(reduce(partial_BTD + mean_share, reduction), "reduced")
    return Stream(copy_to_tensor_axis(mean_BTD, reduction)), output
