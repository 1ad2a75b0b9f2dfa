"""The command `tokenize`: a corpus before its run; lists and removes caches."""

import re
import shutil

import pytest
import tiny

from ladder_jax import cli
from ladder_jax.data import (
    corpus,
    file_digests,
    token_cache,
    token_progress,
    token_units,
    tokenizer,
)


@pytest.fixture
def command(capfd):
    """Runs `ladder-jax tokenize ...`: (status, stdout, stderr)."""

    def call(*words):
        status = cli.run(["tokenize", *map(str, words)])
        return (status, *capfd.readouterr())

    return call


def test_a_run_finds_the_tokens(tmp_path, command, monkeypatch):
    tiny.write_corpus(tmp_path / "corpus")
    recipe = tiny.recipe(tmp_path)
    status, out, err = command(recipe, "--train.out", tmp_path / "x", "--workers", 1)
    assert status == 0 and not (tmp_path / "x").exists(), err
    assert "/corpus': train 31 documents" in out and "\ndone: " in out

    def refuse(self, texts):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenizer.ByteTokenizer, "encode_batch", refuse)
    corpus.prepare(tiny.make(tmp_path).data, tokenizer.ByteTokenizer())


def test_caches_are_listed_and_removed(tmp_path, command):
    tiny.write_corpus(tmp_path / "corpus")
    cache = tmp_path / "cache"
    where = ["--data.token-cache", cache]
    status, out, _ = command("--list", *where)
    assert (status, out) == (0, f"0 token caches, 0.0 MB in {cache}\n")
    made = tiny.make(tmp_path).data
    corpus.prepare(made, tokenizer.ByteTokenizer())
    (folder,) = cache.glob("tokens-*")
    # An unfinished one; one of an older version; a file that is no cache.
    unfinished, old = cache / f"tokens-{'a' * 32}", cache / f"tokens-{'b' * 32}"
    shutil.copytree(folder / "000000", unfinished / "000000")
    shutil.copytree(folder / "000000", old)
    (cache / "tokens-of-love.txt").write_text("text")
    _, out, _ = command("--list", *where)
    lines = sorted(out.splitlines()[:-1])
    own = folder.name.removeprefix("tokens-")
    find = lambda name: next(line for line in lines if line.startswith(name))
    assert f"40 documents of {made.source}" in find(own)
    assert "unfinished" in find("a" * 32) and "of an older version" in find("b" * 32)
    assert out.splitlines()[-1].startswith("3 token caches, 0.")

    status, _, err = command("--remove", "c", *where)
    assert status == 2 and "remove='c' is not accepted: it is the name of 0" in err
    assert command("--remove", "aaa", "old", *where)[:2] == (
        0,
        f"done: removed 2 token caches, 0.1 MB, from {cache}\n",
    )
    assert [entry.name for entry in token_cache.entries(cache)] == [own]
    command("--remove", folder.name, *where)
    assert token_cache.entries(cache) == []
    assert (cache / "tokens-of-love.txt").exists()


def test_a_cache_of_an_older_version_is_mentioned(tmp_path, capfd):
    tiny.write_corpus(tmp_path / "corpus")
    old = tmp_path / "cache" / f"tokens-{'b' * 32}"
    old.mkdir(parents=True)
    (old / "ids.bin").write_bytes(b"")
    data = tiny.make(tmp_path).data
    for expected in (1, 0):
        corpus.prepare(data, tokenizer.ByteTokenizer())
        err = capfd.readouterr().err
        assert (
            err.count("are of an older version, and not used: ladder-jax") == expected
        )


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(token_progress, "LINE_S", 0)
    lines = []
    with token_progress.Progress("tokenise", 8_000_000, lines.append) as progress:
        progress.elsewhere(2_000_000)
        progress.update(3, 1_000_000, 500)
        progress.finish(3, 2_000_000)
        progress.update(4, 2_000_000, 700)
    shown = [re.sub(r"[\d.]+ MB/s here, .* left", "...", line) for line in lines]
    assert shown == [
        "tokenise: 2.0 of 8.0 MB, 0 documents here, ...",
        "tokenise: 3.0 of 8.0 MB, 500 documents here, ...",
        "tokenise: 4.0 of 8.0 MB, 500 documents here, ...",
        "tokenise: 6.0 of 8.0 MB, 1,200 documents here, ...",
    ]


def test_the_benchmark_has_a_row_for_each_tokenizer_and_number_of_workers(
    monkeypatch, capfd
):
    monkeypatch.setattr(file_digests, "FRESH_S", 0.0)
    monkeypatch.setattr(token_units, "SMALLEST", 100_000)
    texts = [f"document {i} has some words\n" * 9 for i in range(200)]
    monkeypatch.setattr(corpus, "documents", lambda data: texts)
    assert cli.run("bench tokenize --megabytes 1 --vocab-size 300".split()) == 0
    _, title, *rows = capfd.readouterr().out.splitlines()
    assert title.split()[:5] == ["tokenizer", "workers", "MB/s", "a", "core"]
    assert [row.split()[:2] for row in rows] == [
        ["bytes", "1"],
        ["bytes", "2"],
        ["BPE", "1"],
        ["BPE", "2"],
    ]
    assert all(float(word) > 0 for row in rows for word in row.split()[2:5])


@pytest.mark.parametrize(
    "words, message",
    [
        (
            [],
            "missing argument: RECIPE, such as in ladder-jax tokenize configs/demo.py",
        ),
        (["--workers", "2"], "missing argument: RECIPE"),
        (
            ["configs/demo.py", "--workers", "0"],
            "workers=0 is not accepted: it must be",
        ),
        (["configs/demo.py", "--nothing"], "--nothing is not an option"),
        (
            ["--list", "--data.token-cache", "gs://x"],
            "data.token_cache='gs://x' is not",
        ),
    ],
)
def test_a_mistake_is_one_line(command, words, message):
    status, out, err = command(*words)
    assert status == 2 and out == "" and message in err and err.count("\n") == 1
