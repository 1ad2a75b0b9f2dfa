"""Runs a model's blocks along the residual stream, as a schedule says.

The stream is kept as three things: the sum of what has been added, the reduced partials that are not yet due, and the
newest partial, not yet reduced. A partial's reduction starts where the next block starts, so that it can run behind
that block's compute, and is waited for only by the block that reads it. All of it crosses the layer scan's boundary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import sharding
from ladder_jax.residual.reductions import (
    AsyncReduction,
    BackwardReduction,
    copy_to_tensor_axis,
    reduce,
    with_gradient_of,
)


class Stream(NamedTuple):
    """The residual stream between two blocks; arrays are [B, T, D]."""

    total: jax.Array | None  # all that has been added (None: zero)
    pending: tuple = ()  # not yet added, oldest first: sums, or AsyncReduction while they are being made
    partial: jax.Array | None = None  # the newest block's, not yet reduced
    ahead: jax.Array | None = (
        None  # zeros; their cotangent is that of the next block's input, not yet reduced
    )

    def read(self, delay, reduction):
        """The sum that a block with this delay sees, and the stream afterwards. Starts the newest reduction."""
        pending = self.pending
        if self.partial is not None:
            pending += (AsyncReduction(self.partial, reduction),)
        due = max(len(pending) - delay, 0)
        total = _sum(self.total, *map(_arrived, pending[:due]))
        return total, Stream(total, pending[due:])

    def returning(self, delay, reduction):
        """The `BackwardReduction` of the next block's cotangent, if its delay is such that this block does without it."""
        if not delay or sharding.axis_size(sharding.TENSOR) == 1:
            return None
        fresh = (
            self.partial is not None
        )  # between blocks; inside of one, its own partial is still to come
        later = (*self.pending, self.partial) if fresh else (*self.pending, None)
        due = later[: max(len(later) - delay, 0)]
        return BackwardReduction(
            (
                self.total,
                *(x.partial if isinstance(x, AsyncReduction) else x for x in due),
            ),
            reduction,
        )

    def behind(self, returning, product, *operands, name="product"):
        """`product(*operands)`, of activations, with a round of a reduction under way behind it: of the oldest partial
        in the forward pass, of `returning` in the backward pass. `name` is what policies of `remat` know it by."""
        if returning is not None:
            operands = returning.behind(operands)
        made = product(*operands)
        flying = [
            x for x in self.pending if isinstance(x, AsyncReduction) and not x.done
        ]
        return checkpoint_name(flying[0].behind(made) if flying else made, name)

    def landed(self):
        """The same stream with nothing under way, fit to cross a scan's boundary."""
        return self._replace(pending=tuple(map(_arrived, self.pending)))

    def shape(self):
        """Which of its parts there are, to compare streams by."""
        return (
            self.total is not None,
            len(self.pending),
            self.partial is not None,
            self.ahead is not None,
        )

    def reshape(self, shape, delay, reduction):
        """The same stream with the parts that `shape` names, for a block with this delay: zeros are put in, what is too
        old is added."""
        _, pending, has_partial, has_ahead = shape
        surplus = max(len(self.pending) - pending, 0)
        total, kept = _sum(self.total, *self.pending[:surplus]), self.pending[surplus:]
        zero = jnp.zeros_like(self.partial if total is None else total)
        made = Stream(
            zero if total is None else total,
            (zero,) * (pending - len(kept)) + kept,
            zero if has_partial and self.partial is None else self.partial,
        )
        if not has_ahead:
            return made
        returning = made.returning(delay, reduction)
        return made._replace(
            ahead=self.ahead
            if returning is None or self.ahead is not None
            else returning.start()
        )


def take(x, read_BR):
    """`x` [B, T, ...] at the positions `read_BR` [B, R] along T: [B, R, ...]; all of it where they are None."""
    if read_BR is None:
        return x
    return jnp.take_along_axis(
        x, read_BR.reshape(*read_BR.shape, *(1,) * (x.ndim - 2)), axis=1
    )


def _arrived(pending):
    return (
        checkpoint_name(pending.wait(), "reduced")
        if isinstance(pending, AsyncReduction)
        else pending
    )


def _sum(*values):
    total = None
    for value in values:
        if value is not None:
            total = value if total is None else total + value
    return total


def run(
    schedule,
    embedded_BTD,
    layers,
    apply,
    *,
    reduction="psum",
    remat=None,
    unroll=False,
    read_BR=None,
):
    """The final residual stream of a model.

    Args:
      schedule: a schedule.Schedule.
      embedded_BTD: the embedding's partial over the tensor axis.
      layers: a tree whose leaves lead with a layer dimension (run in `lax.scan` wherever layers repeat), or a list of
        trees, one a layer (run one after another, for compilers that copy slices of a stack).
      apply: (layer tree, block, x_BTD, behind, read_BR) -> (partial_BTD, output). It calls its matrix products through
        `behind`, so that reductions under way run behind them; `output` is collected by layer and block. With `read_BR`
        its partial is of those positions of x_BTD alone.
      reduction: of reductions.REDUCTIONS.
      remat: a policy of `jax.checkpoint` for each layer, or None for none.
      unroll: whether the compiled program has a scan's layers written out one after another.
      read_BR: the positions along T of which the stream after the last block is wanted, or None for all. What the last
        block with attention does not see is wanted of them alone: its own partial, those after it and, with delays,
        those just before it. Lists of layers compute and reduce no more. A scan's layers are alike, and to cut off the
        last ones would copy the rest of the stack: there the last reduction alone is of these positions.

    Returns:
      The stream after the last block [B, T or R, D], ready for column-parallel work, and the outputs: a tuple with an
      entry for every block of a layer, stacked by layer, or a list of such tuples where `layers` is a list.
    """
    shared = lambda value: copy_to_tensor_axis(value, reduction)
    stream = Stream(None, (), embedded_BTD)
    with jax.named_scope("embedding"):
        if schedule.local:
            stream = Stream(shared(reduce(embedded_BTD, reduction)))
        elif schedule.layers[0][
            0
        ].delay:  # the first block sees the embedding whatever its delay
            stream = Stream(reduce(embedded_BTD, reduction))

    ends = (
        narrowing(schedule) if read_BR is not None and isinstance(layers, list) else ()
    )

    def run_layer(stream, layer, blocks, next_delay, first=0):
        outputs = []
        for number, (block, following) in enumerate(
            zip(blocks, [*(block.delay for block in blocks[1:]), next_delay]), first
        ):
            with jax.named_scope(
                "+".join(block.parts)
            ):  # profiles and plan.py tell the blocks apart by it
                ahead = stream.ahead
                x_BTD, stream = stream.read(block.delay, reduction)
                asked_BR = read_BR if number in ends else None
                if number in ends[-1:]:
                    stream = stream._replace(total=take(stream.total, read_BR))
                if not schedule.local:
                    x_BTD = (
                        shared(x_BTD)
                        if ahead is None
                        else with_gradient_of(x_BTD, ahead)
                    )
                returning = stream.returning(following, reduction)
                partial_BTD, output = apply(
                    layer, block, x_BTD, partial(stream.behind, returning), asked_BR
                )
                ahead = None if returning is None else returning.start()
            if schedule.local:
                total = _write_local(stream.total, partial_BTD, block.reduce, reduction)
                stream = Stream(shared(total) if block.reduce else total)
            else:
                stream = stream._replace(partial=partial_BTD, ahead=ahead)
            outputs.append(output)
        return stream.landed(), tuple(outputs)

    def delay_after(layer):
        return (
            schedule.layers[layer + 1][0].delay
            if layer + 1 < len(schedule.layers)
            else 0
        )

    if isinstance(layers, list):
        outputs = []
        for index, (layer, blocks) in enumerate(zip(layers, schedule.layers)):
            step = lambda stream, layer, i=index, blocks=blocks: run_layer(
                stream, layer, blocks, delay_after(i), i * len(blocks)
            )
            with jax.named_scope(f"layer{index}"):
                stream, output = _remat(step, remat)(stream, layer)
            outputs.append(output)
    else:
        pieces = []
        for start, stop, period in repeats(schedule.layers):
            pattern = schedule.layers[start : start + period]
            first_delay = pattern[0][0].delay
            delays = [delay_after(start + i) for i in range(period)]
            if stop - start > period:
                delays[-1] = first_delay

            def step(stream, group, pattern=pattern, delays=delays):
                outputs = []
                for i, blocks in enumerate(pattern):
                    one = lambda stream, group, i=i, blocks=blocks: run_layer(
                        stream, jax.tree.map(lambda x: x[i], group), blocks, delays[i]
                    )
                    stream, output = _remat(one, remat)(stream, group)
                    outputs.append(output)
                return stream, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)

            group = jax.tree.map(
                lambda x, a=start, b=stop, p=period: _groups(x, a, b, p), layers
            )
            if stop - start == period:
                stream, output = step(stream, jax.tree.map(lambda x: x[0], group))
            else:
                if not schedule.local:
                    stream = stream.reshape(
                        _settled(stream.shape(), pattern), first_delay, reduction
                    )
                with jax.named_scope(f"layers{start}to{stop - 1}"):
                    stream, output = lax.scan(step, stream, group, unroll=unroll)
                output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
            pieces.append(output)
        outputs = (
            pieces[0]
            if len(pieces) == 1
            else jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces)
        )
        stream = jax.tree.map(lambda x: take(x, read_BR), stream)

    with jax.named_scope("last"):
        x_BTD, _ = stream.read(0, reduction)
        return (x_BTD if schedule.local else shared(x_BTD)), outputs


def narrowing(schedule):
    """The numbers of the blocks that see all positions, but whose partials are wanted of those that are read alone: the
    last with attention, which begins the last layer, and those before it that it does not see."""
    last = sum(map(len, schedule.layers[:-1]))
    return range(max(last - schedule.layers[-1][0].delay, 0), last + 1)


def _write_local(total, partial, reduced, reduction):
    """Desync: a tensor shard adds its own partial to its own stream, until a reduction makes the streams equal again.

    The mean rule: the new stream is the sum of the partials and the mean of the shards' streams.
    """
    if not reduced:
        return total + partial
    mean_share = total / sharding.axis_size(sharding.TENSOR)
    return checkpoint_name(reduce(partial + mean_share, reduction), "reduced")


def _groups(x, start, stop, period):
    rows = x if (start, stop) == (0, x.shape[0]) else x[start:stop]
    return rows.reshape(-1, period, *x.shape[1:])


def _remat(function, policy):
    return function if policy is None else jax.checkpoint(function, policy=policy)


def repeats(layers):
    """`layers` cut into (start, stop, period): runs that repeat a pattern of `period` layers, as few as can be.

    At every start the pattern that covers the most layers is taken, the shortest among equals.
    """
    runs, start = [], 0
    while start < len(layers):
        best = (start + 1, 1)
        for period in range(1, (len(layers) - start) // 2 + 1):
            stop = start + period
            while (
                stop + period <= len(layers)
                and layers[stop : stop + period] == layers[start : start + period]
            ):
                stop += period
            if stop - start >= 2 * period and stop > best[0]:
                best = (stop, period)
        runs.append((start, *best))
        start = best[0]
    return runs


def _settled(shape, pattern):
    """The parts that a stream has at the start of every repetition of `pattern`, once they no longer change."""
    while True:
        after = shape
        for block in [block for blocks in pattern for block in blocks]:
            after = (
                True,
                min(after[1] + after[2], block.delay),
                True,
                pattern[0][0].delay > 0,
            )
        if after == shape:
            return shape
        shape = after
