"""Corpora: read and tokenised once, split by document, cached safely, compared."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax.config import Data
from ladder_jax.data import token_cache, token_shard, token_units, tokenizer
from ladder_jax.data.batches import train_iterator
from ladder_jax.data.corpus import documents, prepare

TOK = tokenizer.ByteTokenizer()


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


def caches(tmp_path):
    """The caches of `open_corpus`, complete or not."""
    return sorted((tmp_path / "cache").glob("tokens-*"))


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
    # A corpus that is read from the cache has the same report.
    assert open_corpus(folder, text_field="body").report == corpus.report
    good = open_corpus(write_files(tmp_path / "good", LETTERS))
    assert "left out" not in good.report and "repaired" not in good.report


def test_the_report_counts_documents_that_the_tokenizer_drops(tmp_path, open_corpus):
    values = json.loads(tokenizer.train(["some text"], 264).tokenizer_json())
    values["model"] |= dict(vocab={"a": 0, "b": 1, "ab": 2}, merges=[["a", "b"]])
    values["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tok = tokenizer.load(str(tmp_path / "tokenizer.json"))
    texts = {"1.txt": "xyz " * 9, "2.txt": "東", "3.txt": "ab", "4.txt": "xay"}
    folder = write_files(tmp_path / "in", texts)
    report = open_corpus(folder, tok).report
    assert "note: 2 documents of which the tokenizer knows no character" in report


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


def test_a_corpus_is_tokenised_once(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)
    first = open_corpus(folder)
    assert both(open_corpus(folder, Refusing())) == both(first)
    # The cache is not split: each opening splits it by its own fraction.
    other = open_corpus(folder, Refusing(), held_out_fraction=0.4)
    assert both(other) == both(first)
    (folder / "a.txt").write_text("changed text")
    with pytest.raises(AssertionError, match="tokenised again"):
        open_corpus(folder, Refusing())
    # The killed one is not complete, and no lock or unfinished file is left.
    assert [len(list(cache.glob("*"))) for cache in caches(tmp_path)] in (
        [2, 1],
        [1, 2],
    )
    assert "changed text" in both(open_corpus(folder))
    open_corpus(folder, tokenizer.train(LETTERS.values(), 300))
    assert len(caches(tmp_path)) == 3


@contextlib.contextmanager
def without_locks(path):
    yield True


def test_two_processes_make_the_same_cache_where_there_are_no_locks(
    tmp_path, open_corpus, monkeypatch
):
    folder = write_files(tmp_path / "in", LETTERS)
    monkeypatch.setattr(token_units, "_claimed", without_locks)

    class Slow(tokenizer.ByteTokenizer):
        def encode_batch(self, texts):
            open_corpus(folder)  # another process is faster
            return super().encode_batch(texts)

    assert both(open_corpus(folder, Slow())) == sorted(LETTERS.values())
    assert names(only(caches(tmp_path))) == ["000000", "about.json"]


def test_a_process_killed_while_tokenising_leaves_no_broken_cache(
    tmp_path, open_corpus
):
    folder = write_files(tmp_path / "in", LETTERS)
    script = """if True:
        import os, sys
        from ladder_jax import config
        from ladder_jax.data import corpus, tokenizer
        class Killed(tokenizer.ByteTokenizer):
            def encode_batch(self, texts):
                os.kill(os.getpid(), 9)
        source, token_cache = sys.argv[1:]
        data_config = config.Data(
            source=source, token_cache=token_cache, held_out_fraction=0.5
        )
        corpus.prepare(data_config, Killed())"""
    cache = tmp_path / "cache"
    assert (
        subprocess.run(
            [sys.executable, "-c", script, str(folder), str(cache)]
        ).returncode
        == -signal.SIGKILL
    )
    assert len(caches(tmp_path)) == 1
    assert both(open_corpus(folder)) == sorted(LETTERS.values())
    assert names(only(caches(tmp_path))) == ["000000", "about.json"]


def test_long_documents_are_tokenised_in_pieces(tmp_path, open_corpus, monkeypatch):
    folder = write_files(
        tmp_path / "in", LETTERS | {"long.txt": "é line\n" * 50 + "x" * 90}
    )
    whole = open_corpus(folder)
    monkeypatch.setattr(token_shard, "PIECE_CHARACTERS", 16)
    monkeypatch.setattr(token_shard, "BATCH_CHARACTERS", 40)
    monkeypatch.setattr(token_cache, "FORMAT", -1)
    pieces = open_corpus(folder)
    np.testing.assert_array_equal(whole.train.ids, pieces.train.ids)
    np.testing.assert_array_equal(whole.train.starts_D, pieces.train.starts_D)


def test_ids_of_large_vocabularies_are_stored_in_wider_integers(tmp_path, open_corpus):
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
            "has no usable document \\(1 files that are not text, "
            "1 rows that are not JSON\\)",
        ),
        ("one", "has one document \\(2 with copies\\)"),
        ("empty rows", "has no usable document \\(it is empty\\)"),
        ("empty text", "has no usable document \\(1 empty documents\\)"),
        ("broken link", "has no usable document \\(1 unreadable files\\)"),
    ],
)
def test_a_source_without_a_document_is_an_error(
    tmp_path, open_corpus, source, message
):
    write_files(tmp_path / "bad", {"a.bin": b"\0", "b.jsonl": "?"})
    write_files(tmp_path / "one", {"a.txt": "same", "b.txt": "same"})
    write_files(tmp_path / "empty rows", {"a.jsonl": ""})
    write_files(tmp_path / "empty text", {"a.txt": ""})
    write_files(tmp_path / "broken link", {})
    (tmp_path / "broken link" / "a.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"data.source='.*{message}") as error:
        open_corpus(tmp_path / source)
    assert "\n" not in str(error.value)


def test_a_source_may_begin_with_empty_files(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", {"0.txt": "", "1.jsonl": "", **LETTERS})
    alone = write_files(tmp_path / "alone", LETTERS)
    assert texts(open_corpus(folder).train) == texts(open_corpus(alone).train)


@pytest.mark.parametrize(
    "held_out, lacking", [(1e-9, "evaluation"), (1 - 1e-9, "training")]
)
def test_a_split_with_an_empty_side_names_the_fractions_that_are_accepted(
    tmp_path, open_corpus, held_out, lacking
):
    folder = write_files(tmp_path / "in", LETTERS)
    with pytest.raises(
        ValueError,
        match=f"data.held_out_fraction={held_out} leaves none of the 8 documents for "
        + lacking,
    ) as e:
        open_corpus(folder, held_out_fraction=held_out)
    low, high = (float(word) for word in str(e.value).rsplit("from ")[1].split(" to "))
    # The limits that the message names are accepted.
    assert len(texts(open_corpus(folder, held_out_fraction=low).held_out)) == 1
    assert len(texts(open_corpus(folder, held_out_fraction=high).train)) == 1


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError,
        match="data.token_cache='.*' cannot be written \\(.*\\): it must be a "
        "writable folder$",
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


# ---------------------------------------------------------------- a damaged cache


def only(paths):
    (path,) = paths
    return path


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


CACHE_FILES = [
    "000000/ids.bin",
    "000000/documents.npy",
    "000000/about.json",
    "about.json",
]
DAMAGES = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip_a_bit(path, 0),
    "last bit": lambda path: flip_a_bit(path, -1),
    "a bit in the middle": lambda path: flip_a_bit(path, path.stat().st_size // 2),
    "other JSON": lambda path: path.write_text("[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", CACHE_FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_replaced(tmp_path, open_corpus, name, damage):
    folder = write_files(tmp_path / "in", LETTERS)
    before = open_corpus(folder)
    cache = only(caches(tmp_path))
    DAMAGES[damage](cache / name)
    after = open_corpus(folder)
    assert both(after) == sorted(LETTERS.values())
    assert after.digest == before.digest
    if (name, damage) != ("about.json", "gone"):  # that cache is not complete
        assert "the token cache was damaged and has been mended: " in after.report
        assert name in after.report
    assert only(caches(tmp_path)) == cache
    assert names(cache) == ["000000", "about.json"]
    assert open_corpus(folder, Refusing()).report == before.report


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.integers(1, 40), limit=st.integers(1, 40))
def test_a_checksum_sees_a_change_in_any_block_that_it_covers(data, size, limit):
    """With blocks of 4 bytes; those that it covers are spread evenly over the file."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shard, "CHECKSUM_BLOCK", 4)
        path = Path(folder, "file")
        path.write_bytes(data.draw(st.binary(min_size=size, max_size=size)))
        before = token_shard.size_and_checksum(path, limit)
        seen = []
        for position in range(size):
            flip_a_bit(path, position)
            seen.append(token_shard.size_and_checksum(path, limit) != before)
            flip_a_bit(path, position)
    blocks = [seen[start : start + 4] for start in range(0, size, 4)]
    assert all(len(set(block)) == 1 for block in blocks)
    covered = [block[0] for block in blocks]
    assert covered[0] and covered[-1]
    assert all(covered) or sum(covered) <= limit / 4 + 2
    assert limit < size + 4 or all(covered)


def test_a_changed_byte_of_a_small_cache_is_seen(tmp_path, open_corpus):
    open_corpus(write_files(tmp_path / "in", LETTERS))
    cache = only(caches(tmp_path))
    assert token_cache.find_damage(cache) is None
    for name in CACHE_FILES:
        for position in range(0, (cache / name).stat().st_size, 4):
            flip_a_bit(cache / name, position)
            assert token_cache.find_damage(cache), f"byte {position} of {name}"
            flip_a_bit(cache / name, position)


def test_a_cache_inside_of_the_source_does_not_become_text(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)
    for _ in range(2):
        corpus = open_corpus(folder, token_cache=str(folder))
        assert both(corpus) == sorted(LETTERS.values())
    assert "left out" not in corpus.report  # tokenised once, before it was there


# ---------------------------------------------------------------- the digest


def test_the_digest_is_of_contents_and_not_of_paths(tmp_path, open_corpus):
    folder = write_files(tmp_path / "in", LETTERS)
    digest = open_corpus(folder).digest
    assert open_corpus(f"{folder}/").digest == digest
    assert open_corpus(f"{folder}/*.txt").digest == digest
    assert open_corpus(write_files(tmp_path / "moved", LETTERS)).digest == digest
    rows = "".join(json.dumps({"text": text}) + "\n" for text in LETTERS.values())
    assert open_corpus(write_files(tmp_path / "a", {"a.json": rows})).digest == digest
    tok = tokenizer.train(LETTERS.values(), 300)
    assert open_corpus(folder, tok).digest == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: texts[:-1],
        lambda texts: [*texts, "more text"],
        lambda texts: texts[::-1],
        lambda texts: ["Text of a", *texts[1:]],
        lambda texts: [texts[0] + "\n", *texts[1:]],
    ],
)
def test_the_digest_changes_with_any_document_and_their_order(
    tmp_path, open_corpus, change
):
    texts = list(LETTERS.values())
    digests = set()
    for name, documents_ in (("a", texts), ("b", change(texts))):
        files = {f"{i}.txt": text for i, text in enumerate(documents_)}
        digests.add(open_corpus(write_files(tmp_path / name, files)).digest)
    assert len(digests) == 2
