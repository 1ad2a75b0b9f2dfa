"""The few sizes that programs are compiled for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladder_jax.serve.buckets import between, bucket_sizes, round_up, with_halves

LIMITS = st.tuples(st.integers(1, 5000), st.integers(1, 5000)).map(sorted)


@pytest.mark.parametrize(
    "least, most, sizes",
    [
        (16, 100, [16, 32, 64, 100]),
        (16, 64, [16, 32, 64]),
        (1, 1, [1]),
        (5, 6, [5, 6]),
    ],
)
def test_bucket_sizes_double_up_to_the_largest(least, most, sizes):
    assert bucket_sizes(least, most) == sizes


@given(LIMITS, st.data())
def test_a_rounded_size_holds_what_is_needed_and_is_less_than_twice_it(limits, data):
    least, most = limits
    sizes = bucket_sizes(least, most)
    assert sizes == sorted(set(sizes)) and (sizes[0], sizes[-1]) == (least, most)
    needed = data.draw(st.integers(1, most))
    size = round_up(sizes, needed)
    assert size in sizes and size >= needed
    assert size < 2 * needed or size == least


@pytest.mark.parametrize(
    "sizes, least, result",
    [
        ([4, 8, 16, 32], 8, [4, 8, 12, 16, 24, 32]),
        ([1, 2, 4, 6], 8, [1, 2, 4, 6]),
        ([8, 9], 8, [8, 9]),
        ([8, 13], 1, [8, 10, 13]),
    ],
)
def test_halves_are_between_neighbours_from_the_least_one_on(sizes, least, result):
    assert with_halves(sizes, least) == result


def test_more_than_the_largest_size_is_rounded_to_the_largest():
    assert round_up([4, 8], 9) == 8


@given(LIMITS, st.data())
def test_the_way_between_two_sizes_goes_by_neighbours(limits, data):
    sizes = bucket_sizes(*limits)
    start, stop = (data.draw(st.sampled_from(sizes)) for _ in range(2))
    way = [start, *between(sizes, start, stop)]
    assert way[-1] == stop
    for size, following in zip(way, way[1:]):
        assert abs(sizes.index(size) - sizes.index(following)) == 1
    assert len(set(way)) == len(way), "no size comes twice"
