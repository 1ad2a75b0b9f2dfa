"""Runs a model's blocks on the residual stream, as a schedule says.

`run` runs the layers, in a `lax.scan` or one after another. blocks.py says what each
block does with the stream.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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
from ladder_jax.residual.sequence import (
    SequenceParallel,
    Shares,
    check,
    first_shares,
    read_all,
    run_sequence_block,
)
from ladder_jax.residual.stream import Stream
from ladder_jax.schedule import Block, Schedule

Remat = Callable[..., Any] | None  # a policy of jax.checkpoint; None: no remat


def run(
    schedule: Schedule,
    embedded_BTD: jax.Array,
    layers: Any,
    compute: Callable[..., tuple[jax.Array, Any]],
    *,
    reduction: str | Policy,
    remat: Remat = None,
    unroll: bool = False,
    read_BR: jax.Array | None = None,
    freshness: Freshness | None = None,
    sequence: SequenceParallel | None = None,
) -> tuple[jax.Array, Any]:
    """The residual stream after a model's last block.

    Args:
      schedule: the residual schedule.
      embedded_BTD: the embedding's partial over the tensor axis.
      layers: a tree whose arrays lead with a layer dimension: `lax.scan` runs repeated
        layers. Or a list of trees, one a layer: they run one after another, and XLA
        copies no layer's slice out of a stack.
      compute: (layer tree, block, x_BTD, progress, read_BR) -> (partial_BTD, output).
        It calls `progress` (overlap.Overlap) between its products. With `read_BR` its
        partial is of those positions of x_BTD alone.
      reduction: a name in REDUCTIONS, or a Policy.
      remat: a policy of `jax.checkpoint` for each layer, or None for none.
      unroll: whether the compiled program repeats a scan's body for every layer.
      read_BR: the positions along T at which the caller reads the result, or None for
        all. If `layers` is a list, its last blocks compute no others (`narrow_blocks`).
        A scan computes all its layers alike: only the last reduction is narrow then.
      freshness: None, or how much of the terms that its delay skips a block reads
        (annealing.py): one value, or an array with one for every block.
      sequence: if given, each tensor shard has the stream of its own tokens
        (sequence.py); `compute` then gets inputs that are normed.

    Returns:
      The stream after the last block [B, T or R, D], ready for column-parallel work
      (of a schedule with `mean`: this shard's own stream), and the outputs: a tuple
      with an entry for every block of a layer, stacked by layer, or a list of such
      tuples if `layers` is a list.
    """

    def run_layer(
        stream: Any,
        layer: Any,
        blocks: Sequence[Block],
        next_delay: int,
        rows: Sequence[Rows],
    ) -> tuple[Any, tuple[Any, ...]]:
        outputs = []
        next_delays = [*(block.delay for block in blocks[1:]), next_delay]
        extras: Any = [freshness] * len(blocks)
        if has_extras:
            layer, extras = layer
        for block, next_block_delay, block_rows, extra in zip(
            blocks, next_delays, rows, extras
        ):
            compute_block = partial(compute, layer, block)
            # Profiles and the planner tell blocks apart by this name.
            with jax.named_scope("+".join(block.parts)):
                stream, output = run_one(
                    stream, block, next_block_delay, compute_block, block_rows, extra
                )
            outputs.append(output)
        return stream, tuple(outputs)

    def run_one(
        stream: Any,
        block: Block,
        next_delay: int,
        compute: ComputeBlock,
        rows: Rows,
        extra: Any,
    ) -> tuple[Any, Any]:
        if schedule.local:
            run_local = run_dtp_block if schedule.mean else run_desync_block
            return run_local(stream, block, compute, reduction, rows)
        if isinstance(stream, Shares):
            assert sequence is not None
            return run_sequence_block(
                stream, block, next_delay, compute, sequence, *extra
            )
        if annealed:
            return run_annealed_block(stream, block, extra, compute, reduction, rows)
        return run_block(stream, block, next_delay, compute, reduction, rows)

    annealed = freshness is not None
    if sequence is not None:
        check(schedule, embedded_BTD.shape, annealed)
    with jax.named_scope("embedding"):
        stream: Any = (
            _first_stream(schedule, embedded_BTD, reduction)
            if sequence is None
            else first_shares(schedule, embedded_BTD)
        )
    extras_by_layer: Any = None  # what blocks take beside their parameters
    if sequence is not None:
        extras_by_layer = sequence.scales(layers, schedule.layers[0])
    elif freshness is not None and jnp.ndim(freshness) > 0:
        extras_by_layer = jnp.reshape(freshness, (len(schedule.layers), -1))
    has_extras = extras_by_layer is not None
    if has_extras:
        is_list = isinstance(layers, list)
        pair = (layers, extras_by_layer)
        layers = list(zip(*pair)) if is_list else pair
    if isinstance(layers, list):
        narrow = range(0) if read_BR is None else narrow_blocks(schedule, annealed)
        stream, outputs = _run_list(
            schedule, stream, layers, run_layer, remat, read_BR, narrow
        )
    else:
        stream, outputs = _run_scans(
            schedule,
            stream,
            layers,
            run_layer,
            reduction,
            remat,
            unroll,
            annealed,
            sequence,
        )
        if sequence is None:
            stream = jax.tree.map(lambda x: take(x, read_BR), stream)
    with jax.named_scope("last"):
        if sequence is not None:
            return take(read_all(stream, sequence), read_BR), outputs
        x_BTD = stream.read(reduction)
        if not schedule.local:
            x_BTD = copy_to_tensor_axis(x_BTD, reduction)
        return x_BTD, outputs


def _first_stream(
    schedule: Schedule, embedded_BTD: jax.Array, reduction: str | Policy
) -> Stream:
    """The stream before the first block, which reads the embedding at any delay."""
    if schedule.local:
        total_BTD = reduce(embedded_BTD, reduction)
        return Stream(copy_to_tensor_axis(total_BTD, reduction))
    if schedule.layers[0][0].delay:
        return Stream(reduce(embedded_BTD, reduction))
    return Stream(partial=embedded_BTD)


# Runs the blocks of a layer: (stream, layer tree, blocks, delay of the next layer's
# first block, rows by block) -> (stream after the layer, outputs by block).
RunLayer = Callable[..., tuple[Stream, tuple[Any, ...]]]


def _run_list(
    schedule: Schedule,
    stream: Stream,
    layers: list[Any],
    run_layer: RunLayer,
    remat: Remat,
    read_BR: jax.Array | None,
    narrow: range,
) -> tuple[Stream, list[Any]]:
    """Runs one layer after another; outputs are a list, by layer."""
    first_block, outputs = 0, []
    for index, (layer, blocks) in enumerate(zip(layers, schedule.layers)):
        next_delay = _delay_after(schedule, index)
        rows = []
        for number in range(first_block, first_block + len(blocks)):
            partial_BR = read_BR if number in narrow else None
            is_last_narrow = number in narrow and number == narrow[-1]
            stream_BR = read_BR if is_last_narrow else None
            rows.append(Rows(partial_BR, stream_BR))
        step = partial(run_layer, blocks=blocks, next_delay=next_delay, rows=rows)
        with jax.named_scope(f"layer{index}"):
            stream, output = _remat(step, remat)(stream, layer)
        outputs.append(output)
        first_block += len(blocks)
    return stream, outputs


def _run_scans(
    schedule: Schedule,
    stream: Any,
    layers: Any,
    run_layer: RunLayer,
    reduction: str | Policy,
    remat: Remat,
    unroll: bool,
    annealed: bool,
    sequence: SequenceParallel | None,
) -> tuple[Any, Any]:
    """Runs each stretch of repeated layers in a `lax.scan`; outputs are stacked."""
    outputs_by_run = []
    for start, stop, period in repeats(schedule.layers):
        pattern = schedule.layers[start : start + period]
        next_delays = [_delay_after(schedule, start + i) for i in range(period)]
        group = partial(_group, start=start, stop=stop, period=period)
        groups = jax.tree.map(group, layers)  # [repetition, layer in the pattern, ...]
        if stop - start == period:
            step = partial(_run_pattern, run_layer, remat, pattern, next_delays)
            stream, output = step(stream, jax.tree.map(lambda x: x[0], groups))
        else:
            # In the scan the pattern's first layer follows its last layer.
            first_delay = next_delays[-1] = pattern[0][0].delay
            step = partial(_run_pattern, run_layer, remat, pattern, next_delays)
            if sequence is not None:
                count, (_, extras) = carried_sums(pattern), groups
                scale_D = extras[0][0][0, 0]  # of the first block
                stream = stream.as_carry(count, first_delay, scale_D, sequence)
            elif not schedule.local:
                count = carried_sums(pattern)
                # An annealed block sums its input's cotangent at once: no token.
                overlapped = 0 if annealed else first_delay
                stream = stream.as_carry(count, overlapped, reduction)
            with jax.named_scope(f"layers{start}to{stop - 1}"):
                stream, output = lax.scan(step, stream, groups, unroll=unroll)
            output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
            if first_delay != _delay_after(schedule, stop - 1):
                # The next block has another delay than the token's reduction is for,
                # or than the input that is gathered.
                stream = (
                    stream._replace(token=None)
                    if sequence is None
                    else stream._replace(input=None)
                )
        outputs_by_run.append(output)
    if len(outputs_by_run) == 1:
        return stream, outputs_by_run[0]
    return stream, jax.tree.map(lambda *xs: jnp.concatenate(xs), *outputs_by_run)


def _run_pattern(
    run_layer: RunLayer,
    remat: Remat,
    pattern: Sequence[Sequence[Block]],
    next_delays: Sequence[int],
    stream: Stream,
    group: Any,
) -> tuple[Stream, Any]:
    """Runs the layers of a pattern once; row i of `group`'s arrays is layer i."""
    outputs = []
    for i, (blocks, next_delay) in enumerate(zip(pattern, next_delays)):

        def step(
            stream: Stream,
            group: Any,
            i: int = i,
            blocks: Sequence[Block] = blocks,
            next_delay: int = next_delay,
        ) -> tuple[Stream, Any]:
            # The slice is inside remat, so that remat saves no copy of it.
            layer = jax.tree.map(lambda x: x[i], group)
            rows = [Rows()] * len(blocks)
            return run_layer(stream, layer, blocks, next_delay, rows)

        stream, output = _remat(step, remat)(stream, group)
        outputs.append(output)
    return stream, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)


def narrow_blocks(schedule: Schedule, annealed: bool = False) -> range:
    """The numbers of the blocks that need to write only the positions of `read_BR`.

    They read a stream of all positions. They are the last block with attention, which
    is the last layer's first, and the blocks before it whose partials it does not read.
    The stream after them has only those positions, so later blocks compute no others.
    With an annealed delay the last attention reads all partials before it.
    """
    last_attention = sum(map(len, schedule.layers[:-1]))
    delay = 0 if annealed else schedule.layers[-1][0].delay
    return range(max(last_attention - delay, 0), last_attention + 1)


def carried_sums(pattern: Sequence[Sequence[Block]]) -> int:
    """How many sums the Stream has at the start of each repetition of `pattern`.

    After a block with delay d the stream has at most d sums; each block after it adds
    at most one. So the count is the least of these bounds.
    """
    blocks = [block for layer in pattern for block in layer]
    return min(
        block.delay + blocks_after
        for blocks_after, block in enumerate(reversed(blocks))
    )


def repeats(layers: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Splits `layers` into runs (start, stop, period), each of a repeated pattern.

    `period` is the pattern's length. Each run takes the pattern that covers the most
    layers, the shortest among equals. Layers without a repetition are runs of one.
    """
    runs, start = [], 0
    while start < len(layers):
        best = (start + 1, 1)  # stop, period
        for period in range(1, (len(layers) - start) // 2 + 1):
            stop, pattern = start + period, layers[start : start + period]
            while layers[stop : stop + period] == pattern:
                stop += period
            if stop - start >= 2 * period and stop > best[0]:
                best = (stop, period)
        runs.append((start, *best))
        start = best[0]
    return runs


def _delay_after(schedule: Schedule, layer: int) -> int:
    """The delay of the block after a layer; the caller of `run` reads with delay 0."""
    following = schedule.layers[layer + 1 :]
    return following[0][0].delay if following else 0


def _group(x: jax.Array, start: int, stop: int, period: int) -> jax.Array:
    """Layers `start` to `stop` of a stack, in groups of `period`."""
    is_whole_stack = (start, stop) == (0, x.shape[0])
    rows = x if is_whole_stack else x[start:stop]  # no slice in the program if whole
    return rows.reshape(-1, period, *x.shape[1:])


def _remat(function: Callable[..., Any], policy: Remat) -> Callable[..., Any]:
    return function if policy is None else jax.checkpoint(function, policy=policy)
