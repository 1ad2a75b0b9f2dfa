"""Blends the whole stream into what a delayed block reads: the annealed delay.

A pretrained model becomes a delayed one gently if its blocks first read the whole
stream, as in training, and the newest terms fade out. `freshness` is how much of them a
block reads: 1 is schedule standard, 0 is the model's own schedule.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ladder_jax import config, schedule
from ladder_jax.residual.blocks import ComputeBlock, Rows, take
from ladder_jax.residual.overlap import Overlap
from ladder_jax.residual.reductions import Policy, copy_to_tensor_axis
from ladder_jax.residual.stream import Stream
from ladder_jax.schedule import Block

# A scalar, or an array with a value for every block. It may be traced: a change of its
# value compiles nothing.
Freshness = jax.Array | float


def check_freshness(
    model_config: config.Model, freshness: Freshness | None = None
) -> None:
    """Raises ConfigError where the model has no annealed delay, or not this one."""
    notation = model_config.residual
    if schedule.parse(notation, model_config.layers).local:
        raise config.ConfigError(
            f"model.residual={notation!r} cannot be annealed: each tensor shard has a "
            "residual stream of its own, without a fresh stream to blend it with; "
            "freshness is for ladder, hybrid and delays"
        )
    if isinstance(freshness, int | float) and not 0 <= freshness <= 1:
        raise config.ConfigError(
            f"freshness={freshness} is not accepted: it must be from 0 (the delays of "
            "the schedule) to 1 (schedule standard)"
        )


def run_annealed_block(
    stream: Stream,
    block: Block,
    freshness: Freshness,
    compute: ComputeBlock,
    reduction: str | Policy,
    rows: Rows,
) -> tuple[Stream, Any]:
    """Computes a block on a blend of the stream that its delay names and the whole one.

    It reads `stale + freshness * newer`: `newer` is the sum of the terms that the delay
    skips. The block waits for every reduction, forward and backward, so that nothing
    overlaps.

    Args:
      stream: the stream before the block.
      block: its delay says which terms are newer.
      freshness: a scalar from 0 to 1.
      compute: the block's computation.
      reduction: a name in REDUCTIONS, or a Policy.
      rows: the positions that are computed.

    Returns:
      The stream after the block and compute's output, as blocks.run_block does.
    """
    stale_BTD, sums, pending = stream.split(block.delay, reduction)
    if pending is not None:
        sums = (*sums, pending.wait())
    x_BTD = stale_BTD
    if sums:
        share = jnp.asarray(freshness, stale_BTD.dtype)
        x_BTD = stale_BTD + share * sum(sums[1:], sums[0])
    x_BTD = copy_to_tensor_axis(x_BTD, reduction)
    partial_BTD, output = compute(x_BTD, Overlap(None, None).progress, rows.partial)
    total_BTD, *sums_BTD = (take(x, rows.stream) for x in (stale_BTD, *sums))
    return Stream(total_BTD, tuple(sums_BTD), partial_BTD), output
