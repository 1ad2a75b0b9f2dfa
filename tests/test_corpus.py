"""Data: every target once an epoch, resumable exactly, tokenised once, split by document."""

import json
import math
import signal
import subprocess
import sys

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from ladder_jax.config import Data
from ladder_jax.data import token_cache, tokenizer
from ladder_jax.data.batches import Rows, held_out_batches, train_iterator
from ladder_jax.data.corpus import Corpus, Side, documents, prepare

BOS, EOS, PAD = 0, 1, 2
TOK = tokenizer.ByteTokenizer()


def make_side(sizes):
    """Documents of the given numbers of text tokens; no text token occurs twice in the corpus."""
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
            assert (
                start == 0 or tokens[b, start] == BOS
            )  # only a row's edge cuts a document
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
    alone = take(
        train_iterator(corpus, batch=6, length=4, seed=3), 9
    )  # over several epochs
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


def test_a_corpus_shorter_than_a_row_or_a_batch():
    batch = next(train_iterator(make_corpus([3, 2]), batch=4, length=32, seed=0))
    check_batch(batch, (4, 32))
    assert (batch["weights"].sum(axis=1) == 7).all()


def test_state_restores_the_next_batches(tmp_path):
    corpus = make_corpus([11] * 20)

    def fresh():
        return train_iterator(corpus, batch=2, length=8, seed=5)

    batches = fresh()
    take(batches, 21)  # into the second epoch
    state = batches.get_state()
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        saving = checkpointer.save_checkpointables_async(21, dict(data=batches))
        expected = take(batches, 20)  # training goes on while it is written
        saving.result()

        again = fresh()
        again.set_state(state)
        np.testing.assert_equal(take(again, 20), expected)

        restored = fresh()
        take(restored, 3)
        checkpointer.load_checkpointables(21, dict(data=restored))
        np.testing.assert_equal(take(restored, 20), expected)


def test_grain_s_own_check_of_restoring():
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
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(make_corpus([3]), **dict(batch=1, length=4, seed=0) | arguments)


def test_bits_per_byte_is_the_code_length():
    side = make_side([5, 0, 9])
    loss = math.log(256)  # 8 bits for each of 14 + 3 targets
    assert side.bits_per_byte(loss) == pytest.approx(8 * 17 / 14)


# ---------------------------------------------------------------- split and cache


def texts(side):
    """The documents of a side that was tokenised to bytes."""
    return sorted(
        bytes(side.ids[start + 1 : start + targets].astype(np.uint8)).decode()
        for start, targets in zip(side.starts_D, side.targets_D)
    )


def both(corpus):
    return sorted(texts(corpus.train) + texts(corpus.held_out))


@pytest.fixture
def open_corpus(tmp_path):
    def call(source, tok=TOK, **fields):
        return prepare(
            Data(
                **dict(
                    source=str(source),
                    token_cache=str(tmp_path / "cache"),
                    held_out_fraction=0.5,
                )
                | fields
            ),
            tok,
        )

    return call


def write_files(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


LETTERS = {f"{name}.txt": f"text of {name}" for name in "abcdefgh"}


def test_the_report_says_what_was_left_out_or_repaired(tmp_path, open_corpus):
    rows = [
        *(json.dumps({"body": f"line {i}"}) for i in range(9)),
        "{broken",
        json.dumps({"text": "no body"}),
    ]
    folder = write_files(
        tmp_path / "in",
        {
            "rows.jsonl": "\n".join(rows),
            "empty.txt": "",
            "bad.txt": b"caf\xc3\xa9 \xff",
        },
    )
    corpus = open_corpus(folder, text_field="body")
    assert both(corpus) == sorted(["café \ufffd", *(f"line {i}" for i in range(9))])
    for part in (
        "1 rows that are not JSON",
        "1 rows without a text field 'body'",
        "1 empty documents",
        "repaired: 1 documents with bytes that are not UTF-8",
    ):
        assert part in corpus.report
    assert "\n" not in corpus.report
    assert corpus.train.bytes + corpus.held_out.bytes == sum(
        len(text.encode()) for text in both(corpus)
    )
    assert (
        open_corpus(folder, text_field="body").report == corpus.report
    )  # from the cache, too
    good = open_corpus(write_files(tmp_path / "good", LETTERS))
    assert "left out" not in good.report and "repaired" not in good.report


def test_more_documents_move_none_and_copies_stay_together(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)
    before = open_corpus(folder)
    write_files(folder, {f"copy-{name}": text for name, text in LETTERS.items()})
    write_files(folder, {f"{i}.txt": f"more text {i}" for i in range(30)})
    after = open_corpus(folder)
    for old, new in ((before.train, after.train), (before.held_out, after.held_out)):
        assert set(texts(old)) <= set(texts(new))
    assert not set(texts(after.train)) & set(texts(after.held_out))
    assert len(both(after)) == 46
    assert sorted(documents(Data(source=str(folder), held_out_fraction=0.5))) == texts(
        after.train
    )


class Refusing(tokenizer.ByteTokenizer):
    def encode_batch(self, texts):
        raise AssertionError("tokenised again")


def test_tokenised_once(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)
    first = open_corpus(folder)
    assert both(open_corpus(folder, Refusing())) == both(first)
    assert both(open_corpus(folder, Refusing(), held_out_fraction=0.4)) == both(
        first
    )  # the split is made when it is opened
    (folder / "a.txt").write_text("changed text")
    with pytest.raises(AssertionError, match="tokenised again"):
        open_corpus(folder, Refusing())
    assert [path.name.count(".") for path in (tmp_path / "cache").iterdir()] == [
        0
    ]  # nothing half made is left
    assert "changed text" in both(open_corpus(folder))
    open_corpus(folder, tokenizer.train(LETTERS.values(), 300))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_two_processes_make_the_same_cache(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)

    class Slow(tokenizer.ByteTokenizer):
        def encode_batch(self, texts):
            open_corpus(folder)  # another process is faster
            return super().encode_batch(texts)

    assert both(open_corpus(folder, Slow())) == sorted(LETTERS.values())
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_killed_while_tokenising(tmp_path, open_corpus, monkeypatch):
    folder = write_files(tmp_path / "in", LETTERS)
    script = """if True:
        import os, sys
        from ladder_jax import config
        from ladder_jax.data import corpus, tokenizer
        class Killed(tokenizer.ByteTokenizer):
            def encode_batch(self, texts):
                os.kill(os.getpid(), 9)
        corpus.prepare(config.Data(source=sys.argv[1], token_cache=sys.argv[2], held_out_fraction=0.5), Killed())"""
    cache = tmp_path / "cache"
    assert (
        subprocess.run(
            [sys.executable, "-c", script, str(folder), str(cache)]
        ).returncode
        == -signal.SIGKILL
    )
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(token_cache, "STALE_SECONDS", -1)  # as if that was long ago
    assert both(open_corpus(folder)) == sorted(LETTERS.values())
    assert [path.name.count(".") for path in cache.iterdir()] == [0]


def test_long_documents_are_tokenised_in_pieces(tmp_path, open_corpus, monkeypatch):
    folder = write_files(
        tmp_path / "in", LETTERS | {"long.txt": "é line\n" * 50 + "x" * 90}
    )
    whole = open_corpus(folder)
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 16)
    monkeypatch.setattr(token_cache, "CHUNK_CHARACTERS", 40)
    monkeypatch.setattr(token_cache, "FORMAT", -1)
    pieces = open_corpus(folder)
    np.testing.assert_array_equal(whole.train.ids, pieces.train.ids)
    np.testing.assert_array_equal(whole.train.starts_D, pieces.train.starts_D)


def test_large_vocabularies(tmp_path, open_corpus):
    class Large(tokenizer.ByteTokenizer):
        size, eos = 70_000, 69_999

        def to_json(self):
            return "large"

    folder = write_files(tmp_path / "in", LETTERS)
    batch = next(
        train_iterator(open_corpus(folder, Large()), batch=1, length=64, seed=0)
    )
    assert batch["targets"].max() == 69_999


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "does not exist"),
        (
            "bad",
            "has no usable document \\(1 files that are not text, 1 rows that are not JSON\\)",
        ),
        ("one", "has one document \\(2 with copies\\)"),
    ],
)
def test_sources_that_hold_nothing(tmp_path, open_corpus, source, message):
    write_files(tmp_path / "bad", {"a.bin": b"\0", "b.jsonl": "?"})
    write_files(tmp_path / "one", {"a.txt": "same", "b.txt": "same"})
    with pytest.raises(ValueError, match=f"data.source='.*{message}") as error:
        open_corpus(tmp_path / source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "held_out, lacking", [(1e-9, "evaluation"), (1 - 1e-9, "training")]
)
def test_an_empty_side(tmp_path, open_corpus, held_out, lacking):
    folder = write_files(tmp_path / "in", LETTERS)
    with pytest.raises(
        ValueError,
        match=f"data.held_out_fraction={held_out} leaves none of the 8 documents for {lacking}",
    ) as e:
        open_corpus(folder, held_out_fraction=held_out)
    low, high = (float(word) for word in str(e.value).rsplit("from ")[1].split(" to "))
    assert (
        len(texts(open_corpus(folder, held_out_fraction=low).held_out)) == 1
    )  # what it names is accepted
    assert len(texts(open_corpus(folder, held_out_fraction=high).train)) == 1


def test_a_cache_that_cannot_be_written(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError,
        match="data.token_cache='.*' cannot be written \\(.*\\): it must be a folder that can$",
    ):
        open_corpus(folder, token_cache=str(tmp_path / "file" / "cache"))


def test_builtin_is_python_s_documentation(tmp_path):
    corpus = prepare(Data(token_cache=str(tmp_path)), TOK)
    assert (
        len(corpus.train.starts_D) > 500
        and corpus.train.bytes > 2_000_000
        and len(corpus.held_out.starts_D) >= 5
    )
    assert "left out" not in corpus.report and "repaired" not in corpus.report
    for words in ("class OrderedDict(dict)", "assert_stmt"):  # a docstring, a topic
        assert any(words in text for text in texts(corpus.train))
