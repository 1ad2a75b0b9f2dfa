"""Sequence parallelism: each tensor shard has the residual stream of its own tokens.

A block's partial is reduce-scattered out, and its normalised input all-gathered in
(Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2). The two send together as
many bytes as the all-reduce that they replace; the stream, the norms and the sums take
a shard's part of the memory and of the time. A data shard's B T tokens are divided
evenly, in order, without regard to rows.

A block with a delay reads a stream that is known before the block before it ends. So
that block's time hides both: the partial of the block before it becomes sums, and the
next input is gathered.

    block b - 1    computes | scatter partial b - 2 | add, norm | gather input b |
    block b                                                     reads input b

JAX's own transposes do the same in the backward pass: a gather's is a scatter of the
input's cotangent, a scatter's a gather of the stream's. The input is carried from block
to block, so its cotangent is scattered beside the block before.

M tokens of a tensor shard: B T / tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import sharding
from ladder_jax.config import ConfigError
from ladder_jax.residual.blocks import ComputeBlock
from ladder_jax.residual.overlap import Overlap, OverlappedSum
from ladder_jax.residual.stream import add, split_newest
from ladder_jax.schedule import Block, Schedule


class SequenceParallel(NamedTuple):
    """What the division by tokens needs to know of a model.

    Attributes:
      scale_of: (a layer's tree, a block) -> the scale [D] of the block's norm; [L, D]
        where the tree's arrays lead with a layer dimension.
      norm: (stream [M, D], scale) -> the same normalised, which the block then is not
        to do.
      length: T.
    """

    scale_of: Callable[[Any, Block], jax.Array]
    norm: Callable[[jax.Array, jax.Array], jax.Array]
    length: int

    def input_of(self, x_MD: jax.Array, scale_D: jax.Array) -> jax.Array:
        """The input [B, T, D] of a block that reads `x_MD`."""
        return gather(self.norm(x_MD, scale_D), self.length)

    def scales(self, layers: Any, blocks: Sequence[Block]) -> Any:
        """For every layer, a tuple with each block's scale and that of the block after.

        The last layer's last block, after which none comes, has the first one's.

        Args:
          layers: a tree with a layer dimension, or a list of trees, one a layer.
          blocks: of a layer.

        Returns a tree with a layer dimension, or a list.
        """
        if isinstance(layers, list):
            own = [[self.scale_of(layer, b) for b in blocks] for layer in layers]
            after = own[1:] + own[:1]
            return [
                tuple(zip(scales, [*scales[1:], following[0]]))
                for scales, following in zip(own, after)
            ]
        stacked = [self.scale_of(layers, block) for block in blocks]
        first_of_next = jnp.roll(stacked[0], -1, axis=0)
        return tuple(zip(stacked, [*stacked[1:], first_of_next]))


class Shares(NamedTuple):
    """A shard's share of the residual stream between two blocks: see stream.Stream.

    `total` and `sums` are [M, D]; `partial`, not yet reduced, and `input` [B, T, D].
    """

    total: jax.Array | None = None
    sums: tuple[jax.Array, ...] = ()
    partial: jax.Array | None = None
    # The next block's input. None: it is not gathered yet.
    input: jax.Array | None = None

    def split(
        self, delay: int
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
        """What a block with this delay reads, the newer sums, and a pending partial."""
        if self.partial is None:
            readable, unread = split_newest(self.sums, delay)
            return add(self.total, *readable), unread, None
        if delay == 0:
            total = checkpoint_name(scatter(self.partial), "reduced")
            return add(self.total, *self.sums, total), (), None
        readable, unread = split_newest(self.sums, delay - 1)
        return add(self.total, *readable), unread, self.partial

    def as_carry(
        self, count: int, delay: int, scale_D: jax.Array, sequence: SequenceParallel
    ) -> "Shares":
        """The same stream in the one structure that all iterations of a scan carry.

        There are `count` sums: older ones are added to the total. Missing arrays become
        zeros; the input of a next block with a delay is gathered.

        Args:
          count: see forms.carried_sums.
          delay: the delay of the next block.
          scale_D: the scale of its norm.
          sequence: of the model.
        """
        older, sums = split_newest(self.sums, count)
        total, partial, input_BTD = add(self.total, *older), self.partial, self.input
        if delay and input_BTD is None:
            input_BTD = sequence.input_of(self.split(delay)[0], scale_D)
        if partial is None:  # as at the first block, if it has a delay
            assert input_BTD is not None
            partial = jnp.zeros_like(input_BTD)
        if total is None:
            tokens = partial.size // partial.shape[-1]
            share = tokens // sharding.axis_size(sharding.TENSOR), partial.shape[-1]
            total = jnp.zeros(share, partial.dtype)
        zeros = (jnp.zeros_like(total),) * (count - len(sums))
        return Shares(total, zeros + sums, partial, input_BTD)


def not_accepted(reason: str) -> ConfigError:
    """The error that says why the stream cannot be divided by tokens."""
    return ConfigError(f"sequence_parallel=True is not accepted {reason}")


def check(schedule: Schedule, shape: tuple[int, ...]) -> None:
    """Raises ConfigError where the stream [B, T, D] cannot be divided by tokens."""
    if schedule.local:
        raise not_accepted(
            "with desync, dtp and upper-bound: each tensor shard has a residual stream "
            "of its own; choose another model.residual, or False"
        )
    shards = sharding.axis_size(sharding.TENSOR)
    if shape[0] * shape[1] % shards:
        raise not_accepted(
            f"with {shape[0]} x {shape[1]} tokens on a data shard: "
            f"mesh.tensor={shards} must divide them; choose another batch or length, "
            "or False"
        )


def scatter(partial_BTD: jax.Array) -> jax.Array:
    """The sum [M, D] of a partial over the tensor axis, of this shard's tokens."""
    rows = partial_BTD.reshape(-1, partial_BTD.shape[-1])
    return lax.psum_scatter(rows, sharding.TENSOR, scatter_dimension=0, tiled=True)


def gather(x_MD: jax.Array, length: int) -> jax.Array:
    """All tokens [B, T, D], where T is `length`, from the shards' [M, D]."""
    rows = lax.all_gather(x_MD, sharding.TENSOR, axis=0, tiled=True)
    return rows.reshape(-1, length, rows.shape[-1])


def first_shares(schedule: Schedule, embedded_BTD: jax.Array) -> Shares:
    """The stream before the first block, which reads the embedding at any delay."""
    if schedule.layers[0][0].delay:
        return Shares(scatter(embedded_BTD))
    return Shares(partial=embedded_BTD)


def run_sequence_block(
    stream: Shares,
    block: Block,
    next_delay: int,
    compute: ComputeBlock,
    sequence: SequenceParallel,
    scale_D: jax.Array,
    next_scale_D: jax.Array,
) -> tuple[Shares, Any]:
    """Computes a block while the partial before it is scattered and, if the next block
    has a delay, that block's input gathered.

    Args:
      stream: the shard's share of the stream before the block.
      block: its delay says how much of the stream it reads.
      next_delay: the delay of the block after it.
      compute: the block's computation, without its norm.
      sequence: of the model.
      scale_D: the scale of the block's norm.
      next_scale_D: the same of the block after it.

    Returns:
      The stream after the block, with the block's partial not yet reduced, and
      compute's output.
    """
    x_MD, sums, pending_BTD = stream.split(block.delay)
    input_BTD = stream.input
    if input_BTD is None:
        input_BTD = sequence.input_of(x_MD, scale_D)
    overlap: Overlap | OverlappedSum = Overlap(None, None)
    if pending_BTD is not None:
        overlap = OverlappedSum(scatter(pending_BTD))
    partial_BTD, output = compute(input_BTD, overlap.progress, None)
    if isinstance(overlap, OverlappedSum):
        sums = (*sums, checkpoint_name(overlap.total, "reduced"))
    after = Shares(x_MD, sums, partial_BTD)
    if next_delay:
        next_MD, *_ = after.split(next_delay)
        after = after._replace(input=sequence.input_of(next_MD, next_scale_D))
    return after, output


def read_all(stream: Shares, sequence: SequenceParallel) -> jax.Array:
    """The sum of all terms, for all tokens [B, T, D]."""
    total_MD, *_ = stream.split(0)
    return gather(total_MD, sequence.length)
