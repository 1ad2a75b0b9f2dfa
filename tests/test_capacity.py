"""What fits into a budget of memory, and which shapes are compiled."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.config import ConfigError, Decode, to_bytes
from ladder_jax.serve.capacity import Capacity


def plan(
    length=512, fixed_trip_count=False, page_size=0, compute_bound=False, **options
):
    return Capacity(
        Decode(**options),
        length,
        token_bytes=100,
        arrays=4,
        prefix_bytes=1000,
        fixed_trip_count=fixed_trip_count,
        page_size=page_size,
        compute_bound=compute_bound,
    )


def test_memory_is_what_rows_prefixes_and_one_moving_array_take():
    capacity = plan(slots=8, staging=3)
    row = 100 * 512
    assert capacity.memory == dict(
        rows=11 * row,
        prefixes=1000,
        reshaping=8 * row // 4,
        total=13 * row + 1000,
    )
    assert plan(slots=8, staging=3, fit_shapes=False).memory["reshaping"] == 0


@settings(max_examples=100, deadline=None)
@given(kib=st.integers(300, 20_000), fit=st.booleans())
def test_without_a_number_it_plans_as_many_slots_as_the_memory_holds(kib, fit):
    memory = f"{kib}KiB"
    capacity = plan(slots=None, kv_memory=memory, fit_shapes=fit)
    assert capacity.memory["total"] <= to_bytes(memory, "")
    assert capacity.budget(capacity.slots + 1)["total"] > to_bytes(memory, "")


def test_a_budget_that_is_too_small_names_the_slots_that_fit():
    with pytest.raises(ConfigError, match="decode.kv_memory=500KiB is not enough for "):
        plan(slots=64, kv_memory="500KiB")
    with pytest.raises(ConfigError, match="decode.slots=1 of 512 .* 0 slots fit"):
        plan(slots=None, kv_memory="1KiB")


def test_shapes_come_in_few_sizes():
    capacity = plan(slots=6, steps_per_call=10, prefill_budget=100)
    assert capacity.widths == [1, 2, 4, 6] and capacity.lengths == [64, 128, 256, 512]
    assert capacity.pieces == [16, 32, 64, 100] and capacity.chunk_sizes == [10]
    assert plan(steps_per_call=10, fixed_trip_count=True).chunk_sizes == [3, 10]
    fixed = plan(slots=6, fit_shapes=False)
    assert fixed.widths == [6] and fixed.lengths == [512]


def test_a_cpu_with_pages_has_more_widths():
    options = dict(slots=40, page_size=32)
    assert plan(**options).widths == [1, 2, 4, 8, 16, 32, 40]
    on_cpu = plan(**options, compute_bound=True)
    assert on_cpu.widths == [1, 2, 4, 8, 12, 16, 24, 32, 36, 40]
    assert on_cpu.lengths == [512]
    rows = plan(slots=40, compute_bound=True)  # each width is compiled for all lengths
    assert rows.widths == [1, 2, 4, 8, 16, 32, 40]


def test_moves_change_one_size_at_a_time():
    capacity = plan(slots=4)
    up = [(2, 64), (4, 64), (4, 128)]
    assert capacity.shapes_between((1, 64), (4, 128)) == up
    assert capacity.shapes_between((4, 128), (2, 64)) == [(2, 128), (2, 64)]
    assert capacity.shapes_between((2, 64), (2, 64)) == []


@pytest.mark.parametrize(
    "length, contexts", [(64, [64]), (128, [128]), (256, [64, 256]), (512, [128, 512])]
)
def test_the_context_of_a_prefill_call_is_every_second_length(length, contexts):
    assert plan(slots=4).context_lengths(length) == contexts
