"""How many iterations fit in burst_ms, from the times of chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ladder_jax.serve.pace import SAMPLES, Pace


def make_pace(burst_ms=50.0, steps_per_call=16, widths=(1, 2, 4, 8)):
    return Pace(burst_ms, steps_per_call, widths)


def test_before_the_first_chunk_one_iteration_fits():
    assert make_pace().fitting == {1: 1, 2: 1, 4: 1, 8: 1}


def test_without_burst_ms_there_is_no_limit():
    pace = make_pace(burst_ms=0)
    pace.add(4, 16, 9.0, True)
    assert pace.fitting == {}


@pytest.mark.parametrize(
    "seconds, fitting",
    [(0.0001, 16), (0.004, 12), (0.025, 2), (0.045, 1), (0.055, 1), (3.0, 1)],
)
def test_as_many_fit_as_the_time_of_one_says(seconds, fitting):
    pace = make_pace()
    pace.add(4, 5, 5 * seconds, True)
    assert set(pace.fitting.values()) == {fitting}


def test_each_width_has_its_estimate_and_others_that_of_the_nearest():
    pace = make_pace()
    pace.add(1, 16, 16 * 0.005, True)
    pace.add(8, 2, 2 * 0.012, True)
    assert pace.fitting == {1: 10, 2: 10, 4: 4, 8: 4}


def test_two_chunks_that_are_far_too_slow_or_too_fast_change_nothing():
    pace = make_pace()
    for seconds in (0.01, 0.01, 9.0, 0.01, 1e-9):
        pace.add(4, 1, seconds, True)
        assert pace.fitting[4] == 5


def test_recent_chunks_count():
    pace = make_pace()
    for _ in range(100):
        pace.add(4, 1, 0.001, True)
    for _ in range(SAMPLES // 2 + 1):
        pace.add(4, 1, 0.02, True)
    assert pace.fitting[4] == 2


@pytest.mark.parametrize(
    "seconds, host, hiding",
    [(0.02, 0.002, 1), (0.01, 0.002, 2), (0.001, 0.001, 8), (0.0001, 0.001, 16)],
)
def test_hiding_the_hosts_work_takes_so_many(seconds, host, hiding):
    pace = make_pace()
    assert pace.hiding(4) is None
    pace.add(4, 5, 5 * seconds, True)
    assert pace.hiding(4) is None  # the host's time is not known
    pace.add_host(host)
    assert pace.hiding(4) == hiding


def test_without_burst_ms_nothing_is_hidden():
    pace = make_pace(burst_ms=0)
    pace.add(4, 5, 0.1, True)
    pace.add_host(0.001)
    assert pace.hiding(4) is None


@pytest.mark.parametrize("seconds, fitting", [(9.0, 4), (0.04, 5), (0.01, 16)])
def test_at_least_twice_as_many_fit_if_the_host_did_not_wait(seconds, fitting):
    pace = make_pace()
    pace.add(4, 2, seconds, False)
    assert pace.fitting[4] == fitting
    pace.add(4, 2, 0.08, True)
    pace.add(4, 2, 0.08, True)
    assert pace.fitting[4] == 1


def test_a_chunk_that_only_removed_requests_does_not_count():
    pace = make_pace()
    pace.add(4, 0, 0.01, True)
    pace.add(4, 3, 0.0, True)
    assert set(pace.fitting.values()) == {1}


@given(
    st.floats(0.01, 1e4),
    st.lists(
        st.tuples(
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, 16),
            st.floats(-1.0, 1e3),
            st.booleans(),
        )
    ),
)
def test_what_fits_is_always_possible(burst_ms, chunks):
    pace = make_pace(burst_ms)
    for chunk in chunks:
        pace.add(*chunk)
    assert sorted(pace.fitting) == [1, 2, 4, 8]
    assert all(1 <= steps <= 16 for steps in pace.fitting.values())


def test_the_next_chunk_starts_before_the_estimated_end():
    pace = make_pace()
    assert pace.nearly_done(4, 10, 7.0) == 7.0  # no estimate
    pace.add(4, 10, 0.1, True)
    # Ten iterations take 0.1 s, less a tenth, and half of it for a host never measured.
    assert pace.nearly_done(4, 10, 7.0) == pytest.approx(7.0 + 0.09 - 0.05)
    for _ in range(3):
        pace.add_host(0.002)
    assert pace.nearly_done(4, 10, 7.0) == pytest.approx(7.0 + 0.09 - 0.004)
    assert pace.nearly_done(4, 20, 7.0) == pytest.approx(7.0 + 0.18 - 0.004)
    for _ in range(3):
        pace.add_host(0.2)  # a slow host never waits
    assert pace.nearly_done(4, 10, 7.0) == 7.0
