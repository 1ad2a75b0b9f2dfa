"""Batches: every target once an epoch, in a new order each epoch, resumable exactly."""

import dataclasses
import json
import math
import tracemalloc

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.config import ConfigError
from ladder_jax.data.batches import Rows, held_out_batches, train_iterator
from ladder_jax.data.corpus import Corpus, Side

BOS, EOS, PAD = 0, 1, 2


def make_side(sizes):
    """Documents of these numbers of text tokens, none of which occurs twice."""
    text = iter(range(10, 10 + sum(sizes)))
    stored = [[BOS, *(next(text) for _ in range(size)), EOS] for size in sizes]
    stops = np.cumsum([len(ids) for ids in stored])
    return Side(
        np.concatenate(stored).astype(np.uint32),
        stops - [len(ids) for ids in stored],
        np.array(sizes) + 1,
        sum(sizes),
        PAD,
    )


def make_corpus(sizes):
    return Corpus(make_side(sizes), make_side(sizes), "digest", "report")


def counted(batch):
    """The targets of a batch that count, in order."""
    return batch["targets"][batch["weights"] == 1].tolist()


def check_batch(batch, shape):
    """What the docstring of train_iterator promises of one batch."""
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "tokens": (shape, "int32"),
        "targets": (shape, "int32"),
        "segments": (shape, "int32"),
        "positions": (shape, "int32"),
        "weights": (shape, "float32"),
    }
    tokens, targets, segments, positions, weights = (
        batch[name]
        for name in ("tokens", "targets", "segments", "positions", "weights")
    )
    np.testing.assert_array_equal(weights, segments > 0)
    assert (targets[weights == 1] != BOS).all() and (tokens[weights == 1] != EOS).all()
    assert (tokens[weights == 0] == PAD).all() and (targets[weights == 0] == PAD).all()
    for b in range(shape[0]):
        used = int(weights[b].sum())
        assert (segments[b, used:] == 0).all() and (positions[b, used:] == 0).all()
        starts = np.flatnonzero(np.diff(segments[b, :used], prepend=0))
        np.testing.assert_array_equal(segments[b, starts], 1 + np.arange(len(starts)))
        for start, stop in zip(starts, [*starts[1:], used]):
            np.testing.assert_array_equal(
                positions[b, start:stop], np.arange(stop - start)
            )
            np.testing.assert_array_equal(
                tokens[b, start + 1 : stop], targets[b, start : stop - 1]
            )
            # Only a row's edge cuts a document.
            assert start == 0 or tokens[b, start] == BOS
            assert stop == shape[1] or targets[b, stop - 1] == EOS


sizes = st.lists(st.integers(0, 12), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, length=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_an_epoch_has_every_target_once(sizes, length, seed):
    corpus = make_corpus(sizes)
    expected = sorted([EOS] * len(sizes) + list(range(10, 10 + sum(sizes))))
    assert corpus.train.tokens == len(expected)
    batches = train_iterator(corpus, batch=1, length=length, seed=seed)
    for _ in range(2):
        seen = []
        for _ in range(math.ceil(len(expected) / length)):
            batch = next(batches)
            check_batch(batch, (1, length))
            seen += counted(batch)
        assert sorted(seen) == expected


@settings(max_examples=40, deadline=None)
@given(
    sizes=sizes,
    length=st.integers(1, 9),
    batch=st.integers(1, 3),
    count=st.integers(1, 3),
)
def test_held_out_is_all_documents_once_and_every_process_has_as_many_batches(
    sizes, length, batch, count
):
    corpus = make_corpus(sizes)
    shares = [
        held_out_batches(
            corpus, batch=batch, length=length, process_index=i, process_count=count
        )
        for i in range(count)
    ]
    assert len({len(share) for share in shares}) == 1
    seen, padded = [], False
    for step in zip(*shares):
        for one in step:
            check_batch(one, (batch, length))
            assert not (padded and one["weights"].any())  # padding is at the end
            padded = padded or not one["weights"].all()
            seen += counted(one)
    documents = "".join("," if i == EOS else chr(i + 1000) for i in seen).split(",")[
        :-1
    ]
    side = corpus.held_out
    assert sorted(documents) == sorted(
        "".join(chr(i + 1000) for i in side.ids[start + 1 : start + targets])
        for start, targets in zip(side.starts_D, side.targets_D)
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_processes_share_what_one_process_gets():
    corpus = make_corpus([5, 30, 0, 7, 19, 3])
    # 9 batches are several epochs.
    alone = take(train_iterator(corpus, batch=6, length=4, seed=3), 9)
    shares = [
        train_iterator(
            corpus, batch=2, length=4, seed=3, process_index=i, process_count=3
        )
        for i in range(3)
    ]
    for whole, *parts in zip(alone, *(take(share, 9) for share in shares)):
        for name in whole:
            np.testing.assert_array_equal(
                whole[name], np.concatenate([part[name] for part in parts])
            )


def test_seed_and_epoch_decide_the_order():
    corpus = make_corpus([7] * 16)  # 128 targets: 16 rows of 8

    def epochs(seed, count=2):
        return [
            counted(batch)
            for batch in take(
                train_iterator(corpus, batch=16, length=8, seed=seed), count
            )
        ]

    first, second = epochs(0)
    assert epochs(0) == [first, second] and first != second and epochs(1)[0] != first
    assert first != sorted(first)


def test_documents_come_in_a_new_order_each_epoch():
    corpus = make_corpus([3] * 8)  # an epoch is one row

    def orders(seed):
        return [
            counted(batch)
            for batch in take(train_iterator(corpus, batch=1, length=32, seed=seed), 2)
        ]

    assert orders(0)[0] != orders(0)[1] and orders(0)[0] != orders(1)[0]


def test_a_row_of_a_short_corpus_is_padded_and_repeated_for_a_batch():
    batch = next(train_iterator(make_corpus([3, 2]), batch=4, length=32, seed=0))
    check_batch(batch, (4, 32))
    assert (batch["weights"].sum(axis=1) == 7).all()


def test_state_restores_the_next_batches():
    corpus = make_corpus([11] * 20)

    def fresh():
        return train_iterator(corpus, batch=2, length=8, seed=5)

    batches = fresh()
    take(batches, 21)  # into the second epoch
    state = batches.get_state()
    assert state == {"next_index": 21}  # of Grain's prefetched batches, none counts
    expected = take(batches, 20)
    for taken in (0, 3):
        again = fresh()
        take(again, taken)
        again.set_state(json.loads(json.dumps(state)))
        np.testing.assert_equal(take(again, 20), expected)


@settings(max_examples=6, deadline=None)
@given(
    stops=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 5)),
        min_size=2,
        max_size=4,
    ),
    is_chat=st.booleans(),
)
def test_any_number_of_processes_goes_on_with_the_same_rows(stops, is_chat):
    """A run of 12 rows a step stops again and again, each time to go on elsewhere."""
    corpus = make_corpus([5, 30, 0, 7, 19, 3])
    if is_chat:
        counted = np.ones(len(corpus.train.ids), np.uint8)
        train = dataclasses.replace(corpus.train, counted=counted)
        corpus = dataclasses.replace(corpus, train=train)
    shape = dict(length=4, seed=3)
    alone = train_iterator(corpus, batch=12, **shape)
    state = {"next_index": 0}
    for count, steps in stops:
        shares = [
            train_iterator(
                corpus,
                batch=12 // count,
                process_index=i,
                process_count=count,
                **shape,
            )
            for i in range(count)
        ]
        for share in shares:
            share.set_state(state)
        for _ in range(steps):
            parts, whole = [next(share) for share in shares], next(alone)
            for name in whole:
                joined = np.concatenate([part[name] for part in parts])
                np.testing.assert_array_equal(joined, whole[name])
        states = [share.get_state() for share in shares]
        assert states == [alone.get_state()] * count
        state = states[-1]


def test_the_iterator_passes_grains_own_check_of_restoring():
    rows = (
        Rows(make_side([9, 1, 4]), 4, 0).shuffle(0).repeat(2).batch(2).to_iter_dataset()
    )
    grain.experimental.assert_equal_output_after_checkpoint(rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch=0), "batch=0"),
        (dict(length=0), "length=0"),
        (dict(process_count=0), "process_count=0"),
        (
            dict(process_index=2, process_count=2),
            "process_index=2 is not accepted: it must be from 0 to 1",
        ),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(make_corpus([3]), **dict(batch=1, length=4, seed=0) | arguments)


def test_bits_per_byte_is_the_code_length():
    side = make_side([5, 0, 9])
    loss = math.log(256)  # 8 bits for each of 14 + 3 targets
    assert side.bits_per_byte(loss) == pytest.approx(8 * 17 / 14)


def test_a_step_of_a_very_long_run_costs_no_memory_for_those_before_it():
    corpus = make_corpus([11] * 20)
    batches = train_iterator(corpus, batch=4, length=8, seed=5)
    next(batches)
    state = batches.get_state()
    position = json.loads(state) if isinstance(state, (str, bytes)) else state
    tracemalloc.start()
    try:
        assert "next_index" in position
        batches.set_state(position | {"next_index": 3_000_000_000})
        check_batch(next(batches), (4, 8))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5e6, f"{peak / 1e6:.1f} MB for a batch of 32 tokens"


def test_a_corpus_with_more_rows_than_can_be_shuffled_is_an_error():
    side = dataclasses.replace(make_side([1]), targets_D=np.array([2**33]))
    corpus = dataclasses.replace(make_corpus([1]), train=side)
    with pytest.raises(
        ConfigError, match="length=1 is not accepted: it cuts the 85899"
    ):
        train_iterator(corpus, batch=1, length=1, seed=0)


def slow_rows(side, length, seed, epoch):
    """The targets of each row of an epoch, from the documents laid end to end."""
    raw_D = np.random.PCG64([seed, epoch]).random_raw(len(side.starts_D))
    targets = np.concatenate(
        [
            side.ids[side.starts_D[i] + 1 :][: side.targets_D[i]]
            for i in np.argsort(raw_D, kind="stable")
        ]
    )
    return [targets[i : i + length] for i in range(0, len(targets), length)]


@pytest.mark.parametrize("count, length", [(1, 3), (63, 4), (64, 5), (65, 7), (400, 9)])
def test_rows_are_the_documents_in_an_epochs_order(count, length):
    """The order that runs of older versions have."""
    sizes = np.random.default_rng(count).integers(0, 30, count).tolist()
    side = make_side(sizes)
    rows = Rows(side, length, seed=5)
    for epoch in range(3):
        for i, expected in enumerate(slow_rows(side, length, 5, epoch)):
            assert counted(rows[epoch * len(rows) + i]) == expected.tolist()
