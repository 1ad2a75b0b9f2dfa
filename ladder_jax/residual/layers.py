"""Runs a model's layers on the residual stream, as a schedule says.

`run` runs them in a `lax.scan` or one after another. blocks.py says what each block
does with the stream, forms.py what the tensor shards have of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax.residual.blocks import Rows
from ladder_jax.residual.forms import Call, Form
from ladder_jax.schedule import Block, Schedule

Remat = Callable[..., Any] | None  # a policy of jax.checkpoint; None: no remat

# A block's computation: (layer tree, block, x_BTD, progress, read_BR) -> (partial_BTD,
# output).
Compute = Callable[..., tuple[jax.Array, Any]]


def run(
    schedule: Schedule,
    embedded_BTD: jax.Array,
    layers: Any,
    compute: Compute,
    form: Form,
    *,
    remat: Remat = None,
    unroll: bool = False,
    read_BR: jax.Array | None = None,
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
        partial is of those positions of x_BTD alone. In form Divided its inputs are
        normed.
      form: what the tensor shards have of the stream: forms.form_of.
      remat: a policy of `jax.checkpoint` for each layer, or None for none.
      unroll: whether the compiled program repeats a scan's body for every layer.
      read_BR: the positions along T at which the caller reads the result, or None for
        all. If `layers` is a list, its last blocks compute no others (`narrow_blocks`).
        A scan computes all its layers alike: only the last reduction is narrow then.

    Returns:
      The stream after the last block [B, T or R, D], ready for column-parallel work
      (of a schedule with `mean`: this shard's own stream), and the outputs: a tuple
      with an entry for every block of a layer, stacked by layer, or a list of such
      tuples if `layers` is a list.
    """
    run_layer = partial(_run_layer, form, compute)
    with jax.named_scope("embedding"):
        stream = form.first(embedded_BTD)
    extras = form.extras(layers)
    if isinstance(layers, list):
        pairs = list(zip(layers, [None] * len(layers) if extras is None else extras))
        narrow = range(0)
        if read_BR is not None:
            narrow = narrow_blocks(schedule, form.reads_newest)
        stream, outputs = _run_list(
            schedule, stream, pairs, run_layer, remat, read_BR, narrow
        )
    else:
        stream, outputs = _run_scans(
            schedule, stream, (layers, extras), run_layer, form, remat, unroll
        )
        stream = form.at(stream, read_BR)
    with jax.named_scope("last"):
        return form.last(stream, read_BR), outputs


def _run_layer(
    form: Form,
    compute: Compute,
    stream: Any,
    layer_and_extras: tuple[Any, Any],
    blocks: Sequence[Block],
    next_delay: int,
    rows: Sequence[Rows],
) -> tuple[Any, tuple[Any, ...]]:
    """Runs the blocks of a layer; `next_delay` is that of the next layer's first."""
    layer, extras = layer_and_extras
    extras = [None] * len(blocks) if extras is None else extras
    next_delays = [*(block.delay for block in blocks[1:]), next_delay]
    outputs = []
    for block, next_block_delay, block_rows, extra in zip(
        blocks, next_delays, rows, extras
    ):
        compute_block = partial(compute, layer, block)
        call = Call(block, next_block_delay, compute_block, block_rows, extra)
        # Profiles and the planner tell blocks apart by this name.
        with jax.named_scope("+".join(block.parts)):
            stream, output = form.block(stream, call)
        outputs.append(output)
    return stream, tuple(outputs)


# `_run_layer` of a form and a computation: (stream, (layer tree, extras), blocks, delay
# of the next layer's first block, rows by block) -> (stream after it, outputs).
RunLayer = Callable[..., tuple[Any, tuple[Any, ...]]]


def _run_list(
    schedule: Schedule,
    stream: Any,
    layers: list[Any],
    run_layer: RunLayer,
    remat: Remat,
    read_BR: jax.Array | None,
    narrow: range,
) -> tuple[Any, list[Any]]:
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
    layers_and_extras: tuple[Any, Any],
    run_layer: RunLayer,
    form: Form,
    remat: Remat,
    unroll: bool,
) -> tuple[Any, Any]:
    """Runs each stretch of repeated layers in a `lax.scan`; outputs are stacked."""
    outputs_by_run = []
    for start, stop, period in repeats(schedule.layers):
        pattern = schedule.layers[start : start + period]
        next_delays = [_delay_after(schedule, start + i) for i in range(period)]
        group = partial(_group, start=start, stop=stop, period=period)
        # [repetition, layer in the pattern, ...]
        groups = jax.tree.map(group, layers_and_extras)
        if stop - start == period:
            step = partial(_run_pattern, run_layer, remat, pattern, next_delays)
            stream, output = step(stream, jax.tree.map(lambda x: x[0], groups))
        else:
            # In the scan the pattern's first layer follows its last layer.
            first_delay = next_delays[-1] = pattern[0][0].delay
            step = partial(_run_pattern, run_layer, remat, pattern, next_delays)
            stream = form.as_carry(stream, pattern, groups[1])
            with jax.named_scope(f"layers{start}to{stop - 1}"):
                stream, output = lax.scan(step, stream, groups, unroll=unroll)
            output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
            if first_delay != _delay_after(schedule, stop - 1):
                stream = form.before_another_delay(stream)
        outputs_by_run.append(output)
    if len(outputs_by_run) == 1:
        return stream, outputs_by_run[0]
    return stream, jax.tree.map(lambda *xs: jnp.concatenate(xs), *outputs_by_run)


def _run_pattern(
    run_layer: RunLayer,
    remat: Remat,
    pattern: Sequence[Sequence[Block]],
    next_delays: Sequence[int],
    stream: Any,
    group: Any,
) -> tuple[Any, Any]:
    """Runs the layers of a pattern once; row i of `group`'s arrays is layer i."""
    outputs = []
    for i, (blocks, next_delay) in enumerate(zip(pattern, next_delays)):

        def step(
            stream: Any,
            group: Any,
            i: int = i,
            blocks: Sequence[Block] = blocks,
            next_delay: int = next_delay,
        ) -> tuple[Any, Any]:
            # The slice is inside remat, so that remat saves no copy of it.
            layer = jax.tree.map(lambda x: x[i], group)
            rows = [Rows()] * len(blocks)
            return run_layer(stream, layer, blocks, next_delay, rows)

        stream, output = _remat(step, remat)(stream, group)
        outputs.append(output)
    return stream, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)


def narrow_blocks(schedule: Schedule, reads_newest: bool = False) -> range:
    """The numbers of the blocks that need to write only the positions of `read_BR`.

    They read a stream of all positions. They are the last block with attention, which
    is the last layer's first, and the blocks before it whose partials it does not read.
    The stream after them has only those positions, so later blocks compute no others.
    If blocks read the newest terms too, the last attention reads all partials before
    it.
    """
    last_attention = sum(map(len, schedule.layers[:-1]))
    delay = 0 if reads_newest else schedule.layers[-1][0].delay
    return range(max(last_attention - delay, 0), last_attention + 1)


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
