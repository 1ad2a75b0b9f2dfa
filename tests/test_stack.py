"""The short stack of layers that the planner compiles in place of a deep model."""

import dataclasses

import pytest

from ladder_jax.config import Model
from ladder_jax.planner import report
from ladder_jax.planner.stack import shorten


def test_a_short_stack_stands_for_a_deep_one():
    stack = shorten(Model(residual="ladder", layers=80), 4)
    assert stack.notation == "ladder" and stack.counts == (1, 39, 39, 1)
    stack = shorten(Model(residual="hybrid:last40", layers=80), 4)
    assert (
        sum(stack.counts) == 80
        and stack.notation == "delays:0,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1"
    )
    assert shorten(Model(residual="standard", layers=3), 4).counts == (1, 1, 1)
    assert shorten(Model(residual="ladder", layers=80), 5, ends=2).counts == (
        1,
        38.5,
        38.5,
        1,
        1,
    )


def test_a_short_stack_has_the_windows_of_the_deep_one():
    alternating = ",".join(map(str, range(0, 40, 2)))
    fields = dict(residual="ladder", layers=40, sliding_window=512)
    stack = shorten(Model(**fields, window_layers=alternating), 4)
    assert len(stack.counts) == 8 and sum(stack.counts) == 40
    assert (stack.notation, stack.window_layers) == ("ladder", "0,2,4,6")
    assert shorten(Model(**fields), 4).window_layers == "all"
    smollm3 = Model(
        residual="ladder", layers=36, nope_layers=",".join(map(str, range(3, 36, 4)))
    )
    stack = shorten(smollm3, 2)
    assert (stack.window_layers, stack.nope_layers) == ("all", "3,7")
    stack = shorten(Model(**fields, window_layers="last20"), 3)
    assert (stack.window_layers, sum(stack.counts)) == ("3-5", 40)


def test_a_window_bounds_the_positions_that_count_as_flops():
    full = Model(layers=2, heads=1, kv_heads=1, head_dim=2)
    flops = lambda model, workload: report.forward_flops(model, workload, 1, 100)
    one_layer = dataclasses.replace(full, sliding_window=10, window_layers="0")
    difference = lambda workload: flops(full, workload) - flops(one_layer, workload)
    assert difference("decode") == 4 * 2 * (100 - 10)
    seen = 50 - (10 - 10**2 / 200)  # the mean over 100 tokens, halves on the diagonal
    assert difference("train") == pytest.approx(100 * 4 * 2 * seen)
