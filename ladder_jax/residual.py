"""Runs a model's blocks along the residual stream, as a schedule says.

The stream is kept as three things: the sum of what has been added, the reduced partials that are not yet due, and the
newest partial, not yet reduced. A partial's reduction starts where the next block starts, so that it can run behind
that block's compute, and is waited for only by the block that reads it. All of it crosses the layer scan's boundary.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ladder_jax import sharding


class Stream(NamedTuple):
    """The residual stream between two blocks; arrays are [B, T, D]."""
    total: jax.Array | None              # all that has been added (None: zero)
    pending: tuple[jax.Array, ...] = ()  # reduced, not yet added, oldest first
    partial: jax.Array | None = None     # the newest block's, not yet reduced

    def read(self, delay):
        """The sum that a block with this delay sees, and the stream afterwards. Starts the newest reduction."""
        pending = self.pending if self.partial is None else (*self.pending, _reduce(self.partial))
        due = max(len(pending) - delay, 0)
        total = _sum(self.total, *pending[:due])
        return total, Stream(total, pending[due:])

    def shape(self):
        """Which of its parts there are, to compare streams by."""
        return self.total is not None, len(self.pending), self.partial is not None

    def reshape(self, shape):
        """The same stream with the parts that `shape` names: zeros are put in, what is too old is added."""
        _, pending, has_partial = shape
        surplus = max(len(self.pending) - pending, 0)
        total, kept = _sum(self.total, *self.pending[:surplus]), self.pending[surplus:]
        zero = jnp.zeros_like(self.partial if total is None else total)
        return Stream(zero if total is None else total, (zero,) * (pending - len(kept)) + kept,
                      zero if has_partial and self.partial is None else self.partial)


def _reduce(partial):
    return checkpoint_name(sharding.reduce(partial), "reduced")


def _sum(*values):
    total = None
    for value in values:
        if value is not None:
            total = value if total is None else total + value
    return total


def run(schedule, embedded_BTD, layers, apply, *, remat=None):
    """The final residual stream of a model.

    Args:
      schedule: a schedule.Schedule.
      embedded_BTD: the embedding's partial over the tensor axis.
      layers: a tree whose leaves lead with a layer dimension (run in `lax.scan` wherever layers repeat), or a list of
        trees, one a layer (run one after another, for compilers that copy slices of a stack).
      apply: (layer tree, block, x_BTD) -> (partial_BTD, output); `output` is collected by layer and block.
      remat: a policy of `jax.checkpoint` for each layer, or None for none.

    Returns:
      The stream after the last block [B, T, D], ready for column-parallel work, and the outputs: a tuple with an entry
      for every block of a layer, stacked by layer, or a list of such tuples where `layers` is a list.
    """
    stream = Stream(None, (), embedded_BTD)
    if schedule.local:
        stream = Stream(sharding.replicate(_reduce(embedded_BTD)))
    elif schedule.layers[0][0].delay:      # the first block sees the embedding whatever its delay
        stream = Stream(_reduce(embedded_BTD))

    def run_layer(stream, layer, blocks):
        outputs = []
        for block in blocks:
            with jax.named_scope("+".join(block.parts)):      # profiles and plan.py tell the blocks apart by it
                x_BTD, stream = stream.read(block.delay)
                partial_BTD, output = apply(layer, block, x_BTD if schedule.local else sharding.replicate(x_BTD))
            stream = _write_local(stream, partial_BTD, block.reduce) if schedule.local else (
                stream._replace(partial=partial_BTD))
            outputs.append(output)
        return stream, tuple(outputs)

    if isinstance(layers, list):
        outputs = []
        for index, (layer, blocks) in enumerate(zip(layers, schedule.layers)):
            step = lambda stream, layer, blocks=blocks: run_layer(stream, layer, blocks)
            with jax.named_scope(f"layer{index}"):
                stream, output = _remat(step, remat)(stream, layer)
            outputs.append(output)
    else:
        pieces = []
        for start, stop, period in repeats(schedule.layers):
            pattern = schedule.layers[start:start + period]

            def step(stream, group, pattern=pattern):
                outputs = []
                for i, blocks in enumerate(pattern):
                    one = lambda stream, group, i=i, blocks=blocks: run_layer(
                        stream, jax.tree.map(lambda x: x[i], group), blocks)
                    stream, output = _remat(one, remat)(stream, group)
                    outputs.append(output)
                return stream, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)

            group = jax.tree.map(lambda x, a=start, b=stop, p=period: _groups(x, a, b, p), layers)
            if stop - start == period:
                stream, output = step(stream, jax.tree.map(lambda x: x[0], group))
            else:
                if not schedule.local:
                    stream = stream.reshape(_settled(stream.shape(), pattern))
                with jax.named_scope(f"layers{start}to{stop - 1}"):
                    stream, output = lax.scan(step, stream, group)
                output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
            pieces.append(output)
        outputs = pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces)

    x_BTD, _ = stream.read(0)
    return (x_BTD if schedule.local else sharding.replicate(x_BTD)), outputs


def _write_local(stream, partial, reduce):
    """Desync: a tensor shard adds its own partial to its own stream, until a reduction makes the streams equal again.

    The mean rule: the new stream is the sum of the partials and the mean of the shards' streams.
    """
    if not reduce:
        return Stream(stream.total + partial)
    mean_share = stream.total / sharding.axis_size(sharding.TENSOR)
    return Stream(sharding.replicate(_reduce(partial + mean_share)))


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
            while stop + period <= len(layers) and layers[stop:stop + period] == layers[start:start + period]:
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
            after = (True, min(after[1] + after[2], block.delay), True)
        if after == shape:
            return shape
        shape = after
