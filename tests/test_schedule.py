"""Residual schedules: the notation, and the stream that every block reads."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ladder_jax import sharding
from ladder_jax.residual import blocks, forms, stream
from ladder_jax.residual import layers as residual
from ladder_jax.schedule import (
    ATTENTION,
    MLP,
    Block,
    format_layers,
    parse,
    parse_layers,
)


def delays(notation, layers):
    return [block.delay for layer in parse(notation, layers).layers for block in layer]


def reduces(notation, layers):
    return "".join(
        "FT"[block.reduce]
        for layer in parse(notation, layers).layers
        for block in layer
    )


# ---------------------------------------------------------------- notation


@pytest.mark.parametrize(
    "notation, layers, expected",
    [
        ("standard", 2, [0, 0, 0, 0]),
        ("ladder", 2, [1, 1, 1, 1]),
        ("ladder:0,0", 2, [0, 0, 0, 0]),
        ("ladder:0,1", 2, [0, 1, 0, 1]),
        ("ladder:1,2", 2, [1, 2, 1, 2]),
        ("ladder:0,3", 2, [0, 1, 0, 1]),  # a delay rises by at most one a block
        # The first block reads the embedding whatever its delay.
        ("ladder:3,3", 2, [3, 3, 3, 3]),
        ("hybrid:last1", 3, [0, 0, 0, 0, 1, 1]),
        ("hybrid:last0", 2, [0, 0, 0, 0]),
        ("hybrid:1", 3, [0, 0, 1, 1, 0, 0]),
        ("hybrid:0,2-3", 4, [1, 1, 0, 0, 1, 1, 1, 1]),
        ("hybrid:0-2", 3, [1, 1, 1, 1, 1, 1]),
        ("delays:0,1,2,0", 2, [0, 1, 2, 0]),
    ],
)
def test_every_notation_gives_its_delays(notation, layers, expected):
    plan = parse(notation, layers)
    assert delays(notation, layers) == expected
    assert not plan.local and len(plan.layers) == layers
    assert all(
        [block.parts for block in layer] == [ATTENTION, MLP] for layer in plan.layers
    )
    assert set(reduces(notation, layers)) == {"T"}


@pytest.mark.parametrize(
    "notation, layers, expected",
    [
        ("desync:1", 2, "TTTT"),
        ("desync:2", 2, "FTFT"),
        ("desync:4", 4, "FFFTFFFT"),
        ("desync:3", 2, "FFTT"),
        ("desync:99", 2, "FFFT"),
        ("upper-bound", 2, "FFFF"),
    ],
)
def test_desync_reduces_every_nth_block_and_the_last(notation, layers, expected):
    assert reduces(notation, layers) == expected
    assert parse(notation, layers).local and set(delays(notation, layers)) == {0}


def test_parallel_is_one_block_a_layer():
    assert parse("parallel", 2).layers == ((Block(("attention", "mlp")),),) * 2


@pytest.mark.parametrize(
    "notation, says",
    [
        ("", "standard, ladder"),
        ("laddr", "standard, ladder"),
        ("Ladder", "standard, ladder"),
        ("standard:1", "takes no argument"),
        ("parallel:2", "takes no argument"),
        ("upper-bound:1", "takes no argument"),
        ("ladder:1", "two delays"),
        ("ladder:1,2,3", "two delays"),
        ("ladder:a,b", "whole numbers"),
        ("ladder:-1,1", "from 0 up"),
        ("ladder:1.5,1", "whole numbers"),
        ("hybrid", "whole numbers"),
        ("hybrid:4", "0 to 3"),
        ("hybrid:0-9", "0 to 3"),
        ("hybrid:last5", "4 layers"),
        ("hybrid:last", "whole numbers"),
        ("hybrid:x", "whole numbers"),
        ("hybrid:3-1", "range"),
        ("hybrid:0-1-2", "range"),
        ("delays:0,1", "8 blocks"),
        ("delays:0,2,0,0,0,0,0,0", "grow by at most one"),
        ("delays:", "whole numbers"),
        ("desync", "whole numbers"),
        ("desync:0", "1 or more"),
        ("desync:2,2", "one number"),
        ("desync:x", "whole numbers"),
        ("dtp", "whole numbers"),
        ("dtp:5", "one delay, from 0 to 4: half of the 8 blocks"),
        ("dtp:1,2", "one delay"),
        ("dtp:-1", "from 0 up"),
    ],
)
def test_a_wrong_notation_is_one_line_that_says_what_is_accepted(notation, says):
    with pytest.raises(ValueError) as error:
        parse(notation, 4)
    assert says in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- the layer scan's cut


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_repeats_covers_every_layer_once_with_its_own_pattern(layers):
    runs, rebuilt = residual.repeats(layers), []
    for start, stop, period in runs:
        assert start == len(rebuilt) and (stop - start) % period == 0
        rebuilt += layers[start : start + period] * ((stop - start) // period)
    assert rebuilt == layers, runs


@pytest.mark.parametrize(
    "text, expected",
    [
        ("all", {0, 1, 2, 3, 4}),
        ("none", set()),
        ("last2", {3, 4}),
        ("0,2-3", {0, 2, 3}),
    ],
)
def test_layers_are_named_by_numbers_and_words(text, expected):
    assert parse_layers(text, 5) == expected


@given(st.integers(1, 9), st.data())
def test_any_layers_have_a_text(layers, data):
    chosen = data.draw(st.sets(st.integers(0, layers - 1)))
    assert parse_layers(format_layers(chosen, layers), layers) == chosen


@pytest.mark.parametrize("notation", ["ladder", "parallel", "desync:2"])
def test_a_window_belongs_to_the_attention_of_its_layers(notation):
    layers = parse(notation, 3, window_layers="1").layers
    windowed = [
        (number, block.parts)
        for number, blocks in enumerate(layers)
        for block in blocks
        if block.window
    ]
    assert windowed == [(1, ATTENTION + MLP if notation == "parallel" else ATTENTION)]
    plain = [[block._replace(window=False) for block in blocks] for blocks in layers]
    assert plain == [list(blocks) for blocks in parse(notation, 3).layers]


def test_layers_without_rope_that_repeat_are_one_scan():
    """SmolLM3: every fourth layer has none."""
    layers = parse("ladder", 8, nope_layers="3,7").layers
    assert [blocks[0].rope for blocks in layers] == [True, True, True, False] * 2
    assert all(blocks[1].rope for blocks in layers), "an MLP has nothing to rotate"
    assert residual.repeats(layers) == [(0, 8, 4)]


@pytest.mark.parametrize(
    "notation, layers, runs",
    [
        ("ladder", 8, [(0, 8, 1)]),
        ("desync:4", 8, [(0, 8, 2)]),
        ("hybrid:last5", 8, [(0, 3, 1), (3, 8, 1)]),
        ("ladder:1,2", 8, [(0, 8, 1)]),
        ("parallel", 1, [(0, 1, 1)]),
    ],
)
def test_published_schedules_are_few_scans(notation, layers, runs):
    assert residual.repeats(parse(notation, layers).layers) == runs


# ---------------------------------------------------------------- the definition

BLOCKS = 10  # the widest toy model


class Doubled:
    """A reduction whose sum is twice the partial."""

    def __init__(self, partial, reduction):
        self.partial, self.wait = partial, lambda: 2 * partial

    def progress(self, product):
        return product


class Silent:
    """A cotangent's reduction, which changes nothing in the forward pass."""

    def __init__(self, sources, reduction):
        pass

    def progress(self, operands):
        return operands

    def next_input(self):
        return jnp.zeros((1, 1, BLOCKS + 1))


def run_toy(plan, unrolled):
    """What each block read, one row a block, and the final stream of `layers.run`.

    Channel 0 is the embedding, channel 2i + 1 is layer i's attention, 2i + 2 its MLP.
    A reduction doubles; `copy_to_tensor_axis` and `with_gradient_of` triple. An entry
    is 6 exactly if the partial was reduced once and the stream was copied once.
    """
    count = len(plan.layers)
    rows_LPD = jnp.eye(BLOCKS + 1)[1 : 1 + 2 * count].reshape(count, 2, BLOCKS + 1)
    layers = [rows_LPD[i] for i in range(count)] if unrolled else rows_LPD
    row = dict(attention=0, mlp=1)

    def compute(layer, block, x, progress, _):
        return progress(sum(layer[row[part]] for part in block.parts)[None, None]), x

    triple = lambda x, _: 3 * x
    with (
        mock.patch.multiple(stream, AsyncReduction=Doubled, BackwardReduction=Silent),
        mock.patch.multiple(
            forms,
            reduce=lambda x, _: 2 * x,
            copy_to_tensor_axis=triple,
        ),
        mock.patch.multiple(
            blocks, copy_to_tensor_axis=triple, with_gradient_of=triple
        ),
        mock.patch.object(sharding, "axis_size", lambda axis: 8),
    ):
        embedded = jnp.eye(BLOCKS + 1)[None, None, 0]
        final, read = residual.run(
            plan, embedded, layers, compute, forms.form_of(plan, "psum")
        )
    if unrolled:
        read = [x for layer in read for x in layer]
    else:
        read = [blocks[i] for i in range(count) for blocks in read]
    return np.concatenate([x[0] for x in read]), np.asarray(final[0, 0])


def assert_definition(plan):
    """Block b reads embedding + sum(y_j, j < b - delay_b); the result is the sum."""
    blocks = [block for layer in plan.layers for block in layer]
    width = 2 // len(plan.layers[0])  # channels that a block's output fills
    known = [1 + width * max(b - block.delay, 0) for b, block in enumerate(blocks)]
    expected = 6 * (np.arange(BLOCKS + 1) < np.array(known)[:, None])
    for unrolled in (False, True):
        read, final = run_toy(plan, unrolled)
        for b, block in enumerate(blocks):
            np.testing.assert_array_equal(
                read[b],
                expected[b],
                f"block {b} of {[b.delay for b in blocks]} (unrolled={unrolled}, delay "
                f"{block.delay}) read another stream; channel 0 is the embedding, then "
                "the blocks; 6 is read once",
            )
        np.testing.assert_array_equal(
            final,
            6 * (np.arange(BLOCKS + 1) <= width * len(blocks)),
            f"the final stream (unrolled={unrolled}) lacks a partial, has one twice, "
            "or one that was not reduced",
        )


@st.composite
def delay_lists(draw):
    """Delays of up to 5 layers, in stretches that repeat one or two layers."""
    drawn = []
    while len(drawn) < BLOCKS and (not drawn or draw(st.booleans())):
        period = 2 * draw(st.integers(1, 2))
        drawn += draw(
            st.lists(st.integers(0, 4), min_size=period, max_size=period)
        ) * draw(st.integers(1, 4))
    delays = []
    for delay in drawn[:BLOCKS]:
        delays.append(min(delay, delays[-1] + 1) if delays else delay)
    return delays


# Scans that start with fewer, and with more pending reductions than they carry.
@example([0, 1, 2, 3, 2, 3, 2, 3])
@example([3, 3, 3, 3, 0, 0, 0, 0])
@settings(deadline=None, max_examples=15)
@given(delay_lists())
def test_every_block_reads_what_its_delay_says(values):
    assert_definition(parse("delays:" + ",".join(map(str, values)), len(values) // 2))


@pytest.mark.parametrize(
    "notation",
    [
        "standard",
        "ladder",
        "ladder:1,2",
        "ladder:3,4",
        "ladder:0,1",
        "hybrid:last2",
        "hybrid:0,2,4",
        "hybrid:1-3",
        "parallel",
    ],
)
def test_every_named_schedule_reads_what_its_delays_say(notation):
    assert_definition(parse(notation, 5))
