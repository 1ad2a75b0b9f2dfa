"""What a step does, from counts alone: no device, no engine."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.serve.scheduler import Limits, Load, Phase, Work, plan_step
from ladder_jax.serve.tracker import Chunk, Tracker

LIMITS = Limits(
    slots=4,
    steps_per_call=16,
    prefill_budget=32,
    widths=(1, 2, 4),
    lengths=(64, 128, 256),
    chunk_sizes=(4, 16),
    fit_shapes=True,
    fixed_trip_count=False,
    patience=2,
)


def work(prompt=8, max_tokens=100, **progress):
    return Work(prompt, max_tokens, **progress)


def load(**counts):
    return Load(**dict(width=4, length=256) | counts)


DECODES = work(emitted=5)

# The name of a rule, a load, what the step must have, and changed limits.
TABLE = [
    ("nothing to do", load(), dict(admit=0, prefill_budget=0, chunk_steps=0)),
    (
        "all candidates are admitted",
        load(queued=9, candidates=(work(), work())),
        dict(admit=2),
    ),
    # ------------------------------------------------------------ shape
    (
        "an empty engine keeps its shape",
        load(width=1, length=64, smaller_steps=1),
        dict(width=1, length=64, smaller_steps=1),
    ),
    (
        "the width grows at once, for the admitted too",
        load(width=1, candidates=(work(), work()), decoding=(DECODES,)),
        dict(width=4),
    ),
    (
        "the width never exceeds the slots",
        load(width=1, staged=(work(),) * 3, decoding=(DECODES,) * 4),
        dict(width=4),
    ),
    (
        "requests that the device has not dropped yet hold their slots",
        load(width=2, decoding=(DECODES,), cancelled=2),
        dict(width=4),
    ),
    (
        "the length holds prompt, first token and one chunk",
        load(length=64, candidates=(work(prompt=48),)),
        dict(length=128),
    ),
    (
        "a request that ends within the chunk needs less",
        load(length=64, candidates=(work(prompt=48, max_tokens=16),)),
        dict(length=64),
    ),
    (
        "the length counts chunks that the host has not read",
        load(length=64, decoding=(work(emitted=39),), unread_chunks=1),
        dict(length=128),
    ),
    (
        "a smaller shape must suffice for `patience` steps",
        load(decoding=(DECODES,), smaller_steps=1),
        dict(width=4, length=256, smaller_steps=2),
    ),
    (
        "then the state shrinks",
        load(decoding=(DECODES,), smaller_steps=2),
        dict(width=1, length=64, smaller_steps=0),
    ),
    (
        "the patience starts again when the shape is needed",
        load(width=1, length=64, decoding=(DECODES,), smaller_steps=2),
        dict(width=1, length=64, smaller_steps=0),
    ),
    (
        "an idle state shrinks at once",
        load(candidates=(work(),)),
        dict(width=1, length=64),
    ),
    (
        "without fit_shapes the shape stays",
        load(candidates=(work(),)),
        dict(width=4, length=256),
        dict(fit_shapes=False),
    ),
    # ------------------------------------------------------------ prefill
    (
        "nothing decodes: the whole budget",
        load(prefilling=(work(),), prefill_spent=32),
        dict(prefill_budget=32, chunk_steps=0),
    ),
    (
        "requests decode: what is left of the budget",
        load(prefilling=(work(),), decoding=(DECODES,), prefill_spent=20),
        dict(prefill_budget=12),
    ),
    (
        "the budget is spent",
        load(prefilling=(work(),), decoding=(DECODES,), prefill_spent=40),
        dict(prefill_budget=0),
    ),
    (
        "a quarter of the slots wait in staging: prefill can wait",
        load(prefilling=(work(),), staged=(work(),), decoding=(DECODES,) * 4),
        dict(prefill_budget=0),
    ),
    (
        "a slot is free: prefill cannot wait",
        load(prefilling=(work(),), staged=(work(),), decoding=(DECODES,) * 3),
        dict(prefill_budget=32),
    ),
    (
        "a request ends within the next chunk: another must wait for its slot",
        load(
            prefilling=(work(),),
            staged=(work(),),
            decoding=(work(emitted=90), work(emitted=90), DECODES, DECODES),
        ),
        dict(prefill_budget=32),
    ),
    (
        "it does not end within the iterations that fit: prefill can wait",
        load(
            prefilling=(work(),),
            staged=(work(),),
            decoding=(work(emitted=90), work(emitted=90), DECODES, DECODES),
            fitting_steps=2,
        ),
        dict(prefill_budget=0),
    ),
    # ------------------------------------------------------------ chunk
    (
        "a full width decodes for the whole chunk",
        load(decoding=(DECODES,) * 4, queued=3),
        dict(chunk_steps=16),
    ),
    (
        "half the slots are empty and prefill can fill them: half the chunk",
        load(decoding=(DECODES,) * 2, prefilling=(work(),) * 2),
        dict(chunk_steps=8),
    ),
    (
        "requests that wait on the host can fill slots as well",
        load(decoding=(DECODES,), queued=8),
        dict(chunk_steps=4),
    ),
    (
        "a prompt that is longer than the next call does not shorten the chunk",
        load(decoding=(DECODES,), prefilling=(work(prompt=100),)),
        dict(chunk_steps=16),
    ),
    (
        "no more iterations than the longest has left",
        load(decoding=(work(emitted=97), work(emitted=99))),
        dict(chunk_steps=3),
    ),
    (
        "iterations of unread chunks count",
        load(decoding=(work(emitted=90, unread_steps=8),), unread_chunks=1),
        dict(chunk_steps=2),
    ),
    (
        "all tokens are under way: no chunk",
        load(decoding=(work(emitted=90, unread_steps=16),), unread_chunks=1),
        dict(chunk_steps=0),
    ),
    (
        "the first token comes with prefill",
        load(staged=(work(max_tokens=3),)),
        dict(chunk_steps=2),
    ),
    (
        "more requests than slots: a staged one may not have run",
        load(
            staged=(work(max_tokens=9, unread_steps=16),),
            decoding=(work(max_tokens=9, emitted=1, unread_steps=16),) * 4,
            unread_chunks=1,
        ),
        dict(chunk_steps=8),
    ),
    (
        "a cancellation needs a chunk",
        load(cancelled=1),
        dict(chunk_steps=1),
    ),
    (
        "prefill has emitted the only token: no chunk",
        load(staged=(work(max_tokens=1), work(max_tokens=0))),
        dict(chunk_steps=0),
    ),
    (
        "a loop that cannot end early gets a compiled size",
        load(decoding=(work(emitted=97),)),
        dict(chunk_steps=4),
        dict(fixed_trip_count=True),
    ),
    (
        "no more iterations than fit in burst_ms",
        load(decoding=(DECODES,) * 4, fitting_steps=3),
        dict(chunk_steps=3),
    ),
    (
        "one iteration, if none fits",
        load(decoding=(DECODES,) * 4, fitting_steps=0),
        dict(chunk_steps=1),
    ),
    (
        "more than steps_per_call fit",
        load(decoding=(DECODES,) * 4, fitting_steps=99),
        dict(chunk_steps=16),
    ),
    (
        "half the slots are empty: half of what fits",
        load(decoding=(DECODES,) * 2, prefilling=(work(),) * 2, fitting_steps=6),
        dict(chunk_steps=3),
    ),
    (
        "slots are free: no more iterations than hide the host's work",
        load(decoding=(DECODES,) * 2, fitting_steps=6, hiding_steps=2),
        dict(chunk_steps=2),
    ),
    (
        "the host needs longer than burst_ms: what fits counts",
        load(decoding=(DECODES,) * 2, fitting_steps=6, hiding_steps=9),
        dict(chunk_steps=6),
    ),
    (
        "no slot is free: an arrival would wait anyway",
        load(decoding=(DECODES,) * 4, fitting_steps=6, hiding_steps=2),
        dict(chunk_steps=6),
    ),
    (
        "requests that wait fill the slots",
        load(decoding=(DECODES,) * 2, queued=2, fitting_steps=6, hiding_steps=1),
        dict(chunk_steps=3),
    ),
    (
        "slots are free, and a loop that cannot end early has a compiled size",
        load(decoding=(DECODES,) * 2, fitting_steps=99, hiding_steps=2),
        dict(chunk_steps=4),
        dict(fixed_trip_count=True),
    ),
    (
        "a loop that cannot end early gets the largest compiled size that fits",
        load(decoding=(DECODES,) * 4, fitting_steps=15),
        dict(chunk_steps=4),
        dict(fixed_trip_count=True),
    ),
    (
        "the smallest compiled size, if none fits",
        load(decoding=(DECODES,) * 4, fitting_steps=3),
        dict(chunk_steps=4),
        dict(fixed_trip_count=True),
    ),
    (
        "a cancellation needs a chunk, however slow",
        load(cancelled=1, fitting_steps=0),
        dict(chunk_steps=1),
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_plan_step_returns_the_step_of_the_table(row):
    _, given_load, expected, *changes = row
    limits = dataclasses.replace(LIMITS, **(changes[0] if changes else {}))
    step = plan_step(given_load, limits)._asdict()
    assert {name: step[name] for name in expected} == expected


WORKS = st.builds(
    Work,
    prompt=st.integers(1, 60),
    max_tokens=st.integers(1, 100),
    computed=st.just(0),
    emitted=st.integers(0, 60),
    unread_steps=st.integers(0, 32),
)
LOADS = st.builds(
    Load,
    queued=st.integers(0, 20),
    candidates=st.lists(WORKS, max_size=4).map(tuple),
    prefilling=st.lists(WORKS, max_size=4).map(tuple),
    staged=st.lists(WORKS, max_size=4).map(tuple),
    decoding=st.lists(WORKS, max_size=4).map(tuple),
    cancelled=st.integers(0, 4),
    unread_chunks=st.integers(0, 2),
    prefill_spent=st.integers(0, 64),
    width=st.sampled_from(LIMITS.widths),
    length=st.sampled_from(LIMITS.lengths),
    smaller_steps=st.integers(0, 5),
    fitting_steps=st.none() | st.integers(0, 20),
    hiding_steps=st.none() | st.integers(1, 16),
)


@settings(max_examples=200, deadline=None)
@given(LOADS, st.booleans(), st.booleans())
def test_every_step_is_possible_and_there_is_always_one(load, fixed, fit):
    limits = dataclasses.replace(LIMITS, fixed_trip_count=fixed, fit_shapes=fit)
    load = dataclasses.replace(load, queued=max(load.queued, len(load.candidates)))
    step = plan_step(load, limits)
    assert step.admit == len(load.candidates)
    assert 0 <= step.prefill_budget <= limits.prefill_budget
    assert 0 <= step.chunk_steps <= limits.steps_per_call
    if fixed and step.chunk_steps:
        assert step.chunk_steps in limits.chunk_sizes
    if load.fitting_steps is not None:
        smallest = limits.chunk_sizes[0] if fixed else 1
        assert step.chunk_steps <= max(load.fitting_steps, smallest)
        without = dataclasses.replace(load, fitting_steps=None)
        unlimited = plan_step(without, limits)
        assert step.chunk_steps <= unlimited.chunk_steps
        assert step[:4] == unlimited[:4], "admission and shape do not depend on it"
        assert step.prefill_budget <= unlimited.prefill_budget
    if fit and (works := load.on_device + load.candidates):
        assert step.width in limits.widths and step.length in limits.lengths
        assert step.width >= min(len(works) + load.cancelled, limits.slots)
        steps = limits.steps_per_call * (load.unread_chunks + 1)
        for one in works:
            tokens = one.prompt + min(one.max_tokens, one.emitted + 1 + steps)
            assert step.length >= tokens
    if load.prefilling or load.candidates:
        assert step.prefill_budget or load.staged or load.decoding
    left = [
        one.max_tokens - max(one.emitted, 1) - one.unread_steps
        for one in load.staged + load.decoding
    ]
    if max(left, default=0) > 0:
        assert step.chunk_steps, "a request has tokens left, but no chunk decodes them"


# ---------------------------------------------------------------- phases


@dataclasses.dataclass
class FakeRequest:
    number: int
    prompt: tuple = (1, 2, 3)
    max_tokens: int = 9
    tokens: tuple = ()
    submitted: float = 0.0


def test_a_request_passes_through_the_phases_and_leaves_nothing():
    tracker = Tracker(staging_size=2)
    record = tracker.admit(FakeRequest(7), staging_index=0, ticket=1)
    assert record.phase is Phase.PREFILLING and tracker.free_staging_indices() == [1]
    tracker.stage(record, first_chunk=3)
    assert record.phase is Phase.STAGED and record.computed == 3
    tracker.leave_staging(Chunk(number=2, steps=4), [-1, -1])
    assert record.phase is Phase.STAGED, "chunk 2 started before the request was staged"
    tracker.leave_staging(Chunk(number=3, steps=4), [7, -1])
    assert record.phase is Phase.STAGED, "it waits in staging after chunk 3"
    tracker.leave_staging(Chunk(number=4, steps=4), [-1, -1])
    assert record.phase is Phase.DECODING and tracker.free_staging_indices() == [0, 1]
    tracker.finish(record, device_ended=True)
    assert record.phase is Phase.DONE and not list(tracker)


def test_iterations_of_unread_chunks_count_from_the_one_that_can_admit_it():
    tracker = Tracker(staging_size=2)
    unread = [Chunk(number=4, steps=8), Chunk(number=5, steps=2)]
    for number, first_chunk in ((1, 4), (2, 5)):
        record = tracker.admit(
            FakeRequest(number), tracker.free_staging_indices()[0], number
        )
        tracker.stage(record, first_chunk)
    assert [w.unread_steps for w in tracker.work(Phase.STAGED, unread)] == [10, 2]
    tracker.leave_staging(Chunk(number=3, steps=8), [-1, -1])
    assert len(tracker.in_phase(Phase.STAGED)) == 2
    tracker.leave_staging(unread.pop(0), [-1, 2])
    assert [w.unread_steps for w in tracker.work(Phase.DECODING, unread)] == [2]


@pytest.mark.parametrize("phase", [Phase.PREFILLING, Phase.STAGED, Phase.DECODING])
def test_a_cancelled_request_frees_its_place_when_the_device_has_dropped_it(phase):
    tracker = Tracker(staging_size=1)
    record = tracker.admit(FakeRequest(1), staging_index=0, ticket=1)
    if phase is not Phase.PREFILLING:
        tracker.stage(record, first_chunk=0)
    if phase is Phase.DECODING:
        tracker.leave_staging(Chunk(number=0, steps=4), [-1])
    assert record.phase is phase
    tracker.finish(record, device_ended=False)
    assert not tracker.live()
    if phase is Phase.PREFILLING:  # the device does not decode it
        assert not list(tracker) and tracker.free_staging_indices() == [0]
        return
    assert tracker.cancelled_count() == 1 and tracker.take_cancelled(4, 0) == [1]
    if phase is Phase.STAGED:
        assert tracker.free_staging_indices() == []
        tracker.leave_staging(Chunk(number=1, steps=4), [-1])
    assert not list(tracker) and tracker.free_staging_indices() == [0]


def test_a_chunk_cancels_no_more_than_it_has_room_for():
    tracker = Tracker(staging_size=5)
    for number in range(5):
        record = tracker.admit(FakeRequest(number), number, number)
        tracker.stage(record, 0)
        tracker.finish(record, device_ended=False)
    assert tracker.take_cancelled(3, 0) == [0, 1, 2]
    assert tracker.take_cancelled(3, 0) == [3, 4] and tracker.take_cancelled(3, 0) == []
