"""The forms in which a tensor axis holds the residual stream, one class each.

`Shared`    every shard has the whole stream, equal on all of them
`Annealed`  the same, and blocks read a blend of it (annealing.py)
`Own`       every shard has a stream of its own: desync, dtp (blocks.py, dtp.py)
`Divided`   every shard has the stream of its own tokens (sequence.py)

layers.py runs layers without a word of the form: a new one is a class here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ladder_jax.residual import sequence as by_tokens
from ladder_jax.residual.annealing import Freshness, run_annealed_block
from ladder_jax.residual.blocks import (
    ComputeBlock,
    Rows,
    run_block,
    run_desync_block,
    take,
)
from ladder_jax.residual.dtp import run_dtp_block
from ladder_jax.residual.reductions import Policy, copy_to_tensor_axis, reduce
from ladder_jax.residual.sequence import SequenceParallel, Shares
from ladder_jax.residual.stream import Stream
from ladder_jax.schedule import Block, Schedule

Pattern = Sequence[Sequence[Block]]  # the blocks of repeated layers


class Call(NamedTuple):
    """One block to run: its place in the schedule, and its computation."""

    block: Block
    next_delay: int  # of the block after it
    compute: ComputeBlock
    rows: Rows  # the positions that it computes
    extra: Any  # its entry of Form.extras


class Form(Protocol):
    """What layers.py does with a stream, whatever its form."""

    # Whether a block reads its stream's newest terms in spite of its delay.
    reads_newest: bool

    def first(self, embedded_BTD: jax.Array) -> Any:
        """The stream before the first block, from the embedding's partial."""

    def extras(self, layers: Any) -> Any:
        """What blocks take beside their parameters, by layer, and in a layer by block.

        Returns a tree that leads with a layer dimension, or a list if `layers` is one.
        None: nothing.
        """

    def block(self, stream: Any, call: Call) -> tuple[Any, Any]:
        """The stream after a block, and compute's output: see blocks.run_block."""

    def as_carry(self, stream: Any, pattern: Pattern, extras: Any) -> Any:
        """The stream in the structure that all iterations of a scan over `pattern`
        carry; `extras`: those of the scan's layers, [repetition, layer, ...]."""

    def before_another_delay(self, stream: Any) -> Any:
        """The stream without what was made ready for the delay of a scan's layers."""

    def at(self, stream: Any, read_BR: jax.Array | None) -> Any:
        """The stream at some positions along T, before it is read."""

    def last(self, stream: Any, read_BR: jax.Array | None) -> jax.Array:
        """The sum of all terms, ready for column-parallel work; `read_BR` counts for a
        stream that `at` left whole."""


@dataclass(frozen=True)
class Shared:
    """Every shard has the whole stream.

    Attributes:
      schedule: of the model.
      reduction: a name in REDUCTIONS, or a Policy.
    """

    schedule: Schedule
    reduction: str | Policy
    reads_newest = False

    def first(self, embedded_BTD: jax.Array) -> Stream:
        """The first block reads the embedding at any delay."""
        if self.schedule.layers[0][0].delay:
            return Stream(reduce(embedded_BTD, self.reduction))
        return Stream(partial=embedded_BTD)

    def extras(self, layers: Any) -> Any:
        """Blocks take nothing beside their parameters."""
        return None

    def block(self, stream: Stream, call: Call) -> tuple[Stream, Any]:
        """See blocks.run_block."""
        block, next_delay, compute, rows, _ = call
        return run_block(stream, block, next_delay, compute, self.reduction, rows)

    def as_carry(self, stream: Stream, pattern: Pattern, extras: Any) -> Stream:
        """See Stream.as_carry."""
        delay = pattern[0][0].delay
        return stream.as_carry(carried_sums(pattern), delay, self.reduction)

    def before_another_delay(self, stream: Stream) -> Stream:
        """Without the token, whose reduction is for the delay of a scan's layers."""
        return stream._replace(token=None)

    def at(self, stream: Stream, read_BR: jax.Array | None) -> Stream:
        """The last reduction is of these positions alone."""
        return jax.tree.map(lambda x: take(x, read_BR), stream)

    def last(self, stream: Stream, read_BR: jax.Array | None) -> jax.Array:
        """Reduces the newest partial."""
        return copy_to_tensor_axis(stream.read(self.reduction), self.reduction)


@dataclass(frozen=True)
class Annealed(Shared):
    """Blocks read a blend of the stream that their delay names and the whole one.

    Attributes:
      freshness: how much of the terms that its delay skips a block reads: one value, or
        an array with one for every block.
    """

    freshness: Freshness
    reads_newest = True

    def extras(self, layers: Any) -> Any:
        """The freshness of each block, if they differ."""
        if jnp.ndim(self.freshness) == 0:
            return None
        return jnp.reshape(self.freshness, (len(self.schedule.layers), -1))

    def block(self, stream: Stream, call: Call) -> tuple[Stream, Any]:
        """See annealing.run_annealed_block."""
        block, _, compute, rows, freshness = call
        if freshness is None:
            freshness = self.freshness
        return run_annealed_block(
            stream, block, freshness, compute, self.reduction, rows
        )

    def as_carry(self, stream: Stream, pattern: Pattern, extras: Any) -> Stream:
        """Without a token: a block sums its input's cotangent at once."""
        return stream.as_carry(carried_sums(pattern), 0, self.reduction)


@dataclass(frozen=True)
class Own(Shared):
    """Every shard has a stream of its own."""

    def first(self, embedded_BTD: jax.Array) -> Stream:
        """Equal on all shards."""
        total_BTD = reduce(embedded_BTD, self.reduction)
        return Stream(copy_to_tensor_axis(total_BTD, self.reduction))

    def block(self, stream: Stream, call: Call) -> tuple[Stream, Any]:
        """See blocks.run_desync_block and dtp.run_dtp_block."""
        run = run_dtp_block if self.schedule.mean else run_desync_block
        return run(stream, call.block, call.compute, self.reduction, call.rows)

    def as_carry(self, stream: Stream, pattern: Pattern, extras: Any) -> Stream:
        """It has one structure already."""
        return stream

    def last(self, stream: Stream, read_BR: jax.Array | None) -> jax.Array:
        """This shard's stream; with desync it is that of all shards."""
        return stream.read(self.reduction)


@dataclass(frozen=True)
class Divided:
    """Every shard has the stream of its own tokens; see sequence.py.

    Attributes:
      schedule: of the model.
      sequence: the norms of the model's blocks, which the form computes itself.
    """

    schedule: Schedule
    sequence: SequenceParallel
    reads_newest = False

    def first(self, embedded_BTD: jax.Array) -> Shares:
        """See sequence.first_shares. Raises ConfigError where tokens do not divide."""
        by_tokens.check(self.schedule, embedded_BTD.shape)
        return by_tokens.first_shares(self.schedule, embedded_BTD)

    def extras(self, layers: Any) -> Any:
        """The scales of a block's norm and of the next one's."""
        return self.sequence.scales(layers, self.schedule.layers[0])

    def block(self, stream: Shares, call: Call) -> tuple[Shares, Any]:
        """See sequence.run_sequence_block; it computes all positions."""
        block, next_delay, compute, _, scales = call
        return by_tokens.run_sequence_block(
            stream, block, next_delay, compute, self.sequence, *scales
        )

    def as_carry(self, stream: Shares, pattern: Pattern, extras: Any) -> Shares:
        """See Shares.as_carry."""
        scale_D = extras[0][0][0, 0]  # of the first block
        count, delay = carried_sums(pattern), pattern[0][0].delay
        return stream.as_carry(count, delay, scale_D, self.sequence)

    def before_another_delay(self, stream: Shares) -> Shares:
        """Without the input, which was gathered for the delay of a scan's layers."""
        return stream._replace(input=None)

    def at(self, stream: Shares, read_BR: jax.Array | None) -> Shares:
        """All positions: those that are read may be on other shards."""
        return stream

    def last(self, stream: Shares, read_BR: jax.Array | None) -> jax.Array:
        """Gathers all tokens, and takes those that are read."""
        return take(by_tokens.read_all(stream, self.sequence), read_BR)


def form_of(
    schedule: Schedule,
    reduction: str | Policy,
    freshness: Freshness | None = None,
    sequence: SequenceParallel | None = None,
) -> Form:
    """The form that a schedule and the options of `model.hidden` name.

    Raises ConfigError where two of them do not go together.
    """
    if sequence is not None:
        if freshness is not None:
            raise by_tokens.not_accepted("with an annealed delay: choose False")
        return Divided(schedule, sequence)
    if schedule.local:
        return Own(schedule, reduction)
    if freshness is not None:
        return Annealed(schedule, reduction, freshness)
    return Shared(schedule, reduction)


def carried_sums(pattern: Pattern) -> int:
    """How many sums the Stream has at the start of each repetition of `pattern`.

    After a block with delay d the stream has at most d sums; each block after it adds
    at most one. So the count is the least of these bounds.
    """
    blocks = [block for layer in pattern for block in layer]
    return min(
        block.delay + blocks_after
        for blocks_after, block in enumerate(reversed(blocks))
    )
