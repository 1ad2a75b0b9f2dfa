"""Perplexity: equal to a loop over targets on every mesh; counts, windows, mistakes."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from helpers import make_mesh, random_parameters

from ladder_jax import cli, config
from ladder_jax.config import ConfigError
from ladder_jax.data import corpus
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.evaluation import command, perplexity
from ladder_jax.evaluation.scoring import Scorer, Window
from ladder_jax.loading import Loaded

pytestmark = pytest.mark.usefixtures("fast_compiler")

MODEL = config.Model(
    vocab_size=264,
    dim=16,
    layers=2,
    heads=8,
    kv_heads=8,
    head_dim=4,
    ffn_dim=16,
    dtype="float32",
    max_length=64,
)
TEXTS = [
    "short",
    "naïve 東京 🙂 " * 3,
    "a longer text that one window cannot hold " * 3,
]


def make_loaded(residual="ladder", **mesh):
    model_config = dataclasses.replace(MODEL, residual=residual)
    parameters = random_parameters(model_config, make_mesh(**mesh))
    own = config.Config(model=model_config, train=config.Train(seq_len=32))
    return Loaded(parameters, own, ByteTokenizer(), make_mesh(**mesh))


@functools.cache
def slow_program(residual, ranks):
    own = dataclasses.replace(MODEL, residual=residual)
    parameters = random_parameters(own)

    def log_probs(tokens_T):
        positions_T = jnp.arange(len(tokens_T))
        segments_T = jnp.ones_like(positions_T)
        logits_TV = reference.logits(
            parameters, own, tokens_T, positions_T, segments_T, ranks
        )
        return jax.nn.log_softmax(logits_TV)

    return jax.jit(log_probs)


@functools.cache
def slow(residual, context, ranks=1):
    """The log-probabilities [V] of the id that follows `context`, a tuple of ids."""
    tokens_T = np.zeros(MODEL.max_length, np.int32)  # one compiled shape
    tokens_T[: len(context)] = context
    return np.array(slow_program(residual, ranks)(tokens_T))[len(context) - 1]


def slow_loss(ids, context, stride, residual="ladder", ranks=1):
    """The loss of a document, one target at a time."""
    total, start = 0.0, 0
    for target in range(1, len(ids)):
        if target > start + context:  # the next window
            start = min(start + stride, len(ids) - 1 - context)
        total -= slow(residual, tuple(ids[start:target]), ranks)[ids[target]]
    return total


@pytest.mark.parametrize(
    "residual, mesh, context, stride, bos, eos",
    [
        ("ladder", dict(), 16, 16, True, False),
        ("standard", dict(tensor=8), 20, 7, True, True),
        ("parallel", dict(data=2, fsdp=2, tensor=2), 64, 64, False, False),
        ("ladder", dict(fsdp=4), 33, 1, True, False),
    ],
)
def test_loss_equals_a_loop_over_targets(residual, mesh, context, stride, bos, eos):
    loaded = make_loaded(residual, **mesh)
    documents = list(perplexity.encode(TEXTS, loaded.tokenizer, bos=bos, eos=eos))
    losses = perplexity.score(
        loaded, documents, context=context, stride=stride, batch_tokens=128
    )
    for text, document, loss in zip(TEXTS, documents, losses):
        ids = [256] * bos + list(text.encode()) + [257] * eos
        np.testing.assert_array_equal(document.ids, ids)
        assert document.bytes == len(text.encode()) - (not bos)
        expected = slow_loss(ids, context, stride, residual)
        np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_desync_scores_with_the_stream_of_each_rank():
    loaded = make_loaded("desync:2", tensor=4)
    documents = list(perplexity.encode(TEXTS[:1], loaded.tokenizer))
    losses = perplexity.score(loaded, documents, context=16, stride=16)
    ids = documents[0].ids.tolist()
    expected = slow_loss(ids, 16, 16, "desync:2", ranks=4)
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4)


@pytest.mark.parametrize("mesh, rows", [(dict(), 1), (dict(data=2, tensor=4), None)])
def test_scores_of_windows_equal_one_at_a_time(mesh, rows):
    """Continuations of shared contexts, in any order, some of them greedy."""
    loaded = make_loaded(**mesh)
    generator = np.random.default_rng(0)
    windows = []
    for length in (1, 3, 15, 16, 17, 40):
        context = generator.integers(0, 256, length).tolist()
        best = int(slow("ladder", tuple(context)).argmax())
        for target in (best, *generator.integers(0, 256, 20)):
            windows.append(Window(np.array([*context, target]), 1))
        windows.append(Window(np.array([*context, best, 7, 8]), 3))
        windows.append(Window(np.array(context), 0))
    order = generator.permutation(len(windows))
    windows = [windows[i] for i in order]
    scorer = Scorer(
        loaded.model, MODEL, loaded.mesh, length=64, batch_tokens=256, batch_rows=rows
    )
    done = []
    scores = scorer.score(windows, share=True, progress=done.append)
    assert sum(done) == len(windows)
    for (ids, scored), score in zip(windows, scores):
        first = len(ids) - scored
        after = [
            slow("ladder", tuple(ids[:i].tolist())) for i in range(first, len(ids))
        ]
        expected = [log_probs[token] for log_probs, token in zip(after, ids[first:])]
        np.testing.assert_allclose(score.log_probs, expected, rtol=2e-5)
        greedy = [log_probs.argmax() for log_probs in after] == ids[first:]
        np.testing.assert_array_equal(score.is_greedy, greedy)
    assert sum(score.is_greedy[:1].sum() for score in scores) >= 12


def test_rows_are_shared_and_shapes_are_few():
    loaded = make_loaded()
    scorer = Scorer(loaded.model, MODEL, loaded.mesh, length=64, batch_tokens=256)
    same = [Window(np.array([*range(20), target]), 1) for target in range(10)]
    longer = [Window(np.arange(30), 5)]
    assert len(scorer._rows(same + longer, share=True)) == 1
    assert len(scorer._rows(same + longer, share=False)) == 11
    many = [Window(np.arange(2 + i % 60), 1) for i in range(1000)]
    shapes = {shape for shape, _ in scorer._batches(many, share=False)}
    assert len(shapes) <= 6  # three lengths, full and small batches
    assert {length for _, length, _ in shapes} == {16, 32, 64}


def test_ties_and_equal_logits_take_the_smallest_id():
    """All parameters are zero, so every id is equally probable."""
    for mesh in (dict(), dict(tensor=8)):
        loaded = make_loaded(**mesh)
        zeros = jax.tree.map(jnp.zeros_like, loaded.model)
        scorer = Scorer(zeros, MODEL, loaded.mesh, length=16)
        windows = [Window(np.array([5, target]), 1) for target in (0, 1, 263)]
        scores = scorer.score(windows)
        assert [bool(score.is_greedy[0]) for score in scores] == [True, False, False]
        for score in scores:
            np.testing.assert_allclose(score.log_probs, -math.log(264), rtol=1e-6)


# ---------------------------------------------------------------- documents


def test_windows_score_each_target_once_and_the_last_one_is_full():
    for count in range(2, 40):
        for context, stride in ((1, 1), (4, 2), (8, 8), (8, 3), (64, 64)):
            ids = np.arange(count)
            targets = []
            for window in perplexity.windows_of(ids, context, stride):
                assert len(window.ids) - 1 <= context
                assert len(window.ids) == min(context, count - 1) + 1
                targets += window.ids[len(window.ids) - window.scored :].tolist()
            assert targets == list(range(1, count))


def test_max_tokens_cuts_a_document_and_counts_its_bytes():
    text = "é 東"  # 2 + 1 + 3 bytes
    bytes_of = {1: 1, 2: 2, 3: 3, 4: 4, 6: 6, 9: 6}
    for most, size in bytes_of.items():
        documents = list(perplexity.encode([text], ByteTokenizer(), max_tokens=most))
        assert [(d.bytes, len(d.ids) - 1) for d in documents] == [(size, size)]
    both = list(perplexity.encode([text, "xy z"], ByteTokenizer(), max_tokens=7))
    assert [(d.bytes, d.words) for d in both] == [(6, 2), (1, 1)]
    alone = list(perplexity.encode(["x"], ByteTokenizer(), bos=False))
    assert alone == []  # its only token has nothing before it
    end = list(perplexity.encode(["xy"], ByteTokenizer(), eos=True, max_tokens=2))
    assert end[0].ids.tolist() == [256, 120, 121]


def test_measures_and_their_errors():
    generator = np.random.default_rng(0)
    losses = generator.uniform(5, 9, 50)
    ids = [np.zeros(n + 1, np.int32) for n in generator.integers(1, 9, 50)]
    documents = [perplexity.Document(x, 3 * len(x) - 3, len(x) - 1) for x in ids]
    results = perplexity.summarize(documents, losses)
    counts = np.array([len(x) - 1 for x in ids])
    mean = losses.sum() / counts.sum()
    assert results["loss"].value == pytest.approx(mean)
    assert results["bits_per_byte"].value == pytest.approx(mean / 3 / math.log(2))
    assert results["perplexity"].value == pytest.approx(math.exp(mean))
    assert results["word_perplexity"].value == pytest.approx(math.exp(mean))
    draws = generator.integers(0, 50, (20000, 50))  # the bootstrap
    spread = (losses[draws].sum(1) / counts[draws].sum(1)).std()
    assert results["loss"].error == pytest.approx(spread, rel=0.1)
    assert results["bits_per_byte"].error == pytest.approx(
        results["loss"].error / 3 / math.log(2)
    )
    one = perplexity.summarize(documents[:1], losses[:1])
    assert one["loss"].error is None and "±" not in command.report(SETTINGS, one)
    huge = perplexity.summarize(documents[:2], losses[:2] * 1e4)
    assert json.loads(command.to_json(SETTINGS, huge))["perplexity"] is None


SETTINGS = dict(
    data="x",
    held_out=False,
    context=8,
    stride=8,
    bos=True,
    eos=False,
    dtype="float32",
    weights_dtype="auto",
)

# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with a checkpoint of a tiny model, as if it had trained on a corpus."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    tiny.write_corpus(folder.parent / "corpus")
    own = tiny.make(folder.parent, train_out=str(folder))
    tiny.save(folder / "checkpoints", own, corpus=[1, 1])
    return folder


def run_json(capsys, *words):
    small = ["--batch-tokens", "512", "--json"]
    assert cli.run(["eval", *map(str, words), *small]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_on_held_out_documents_and_on_files(run_folder, capsys, tmp_path):
    held_out = run_json(capsys, run_folder)
    assert held_out["held_out"] and held_out["context"] == 32
    assert 0 < held_out["documents"] < 20
    # The same texts as files: both give the same numbers.
    own = tiny.make(run_folder.parent)
    texts = list(corpus.documents(own.data, held_out=True))
    rows = [json.dumps({"body": text}) for text in texts] + ['{"body": "  "}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    words = ["--data", tmp_path, "--text-field", "body", "--context", 32]
    files = run_json(capsys, run_folder, *words)
    same = ("documents", "tokens", "bytes", "words", "bits_per_byte", "loss_stderr")
    assert [files[name] for name in same] == [held_out[name] for name in same]
    mesh = ["--mesh.tensor", 2]
    sharded = run_json(capsys, run_folder, *words, *mesh)
    assert sharded["loss"] == pytest.approx(files["loss"], rel=1e-5)
    few = run_json(capsys, run_folder, *words, "--max-tokens", 100, "--stride", 8)
    assert few["tokens"] == few["bytes"] == 100 and few["documents"] == 1
    half = run_json(capsys, run_folder, *words, "--dtype", "bfloat16")
    assert half["loss"] == pytest.approx(files["loss"], rel=1e-2)
    assert half["loss"] != files["loss"]
    assert cli.run(["eval", str(run_folder), "--data", str(tmp_path / "*.jsonl")]) == 2
    assert cli.run(["eval", str(run_folder), *map(str, words)]) == 0
    text = capsys.readouterr().out
    assert "bits per byte" in text and "±" in text and "stride 32" in text


MISTAKES = {
    "--data /nowhere": "data='/nowhere' does not exist",
    "--data {empty}": "has no usable document (1 empty documents)",
    "--data {empty} --no-bos --text-field x": "has no usable document",
    "--data {one} --no-bos": "the data has no token to score",
    "--context 65": "context=65 is not accepted: it must be at most model.max_length",
    "--context 8 --stride 9": "stride=9 is not accepted: it must be from 1 to 8",
    "--context 0": "context=0 is not accepted: it must be 1 or more",
    "--max-tokens 0": "max_tokens=0 is not accepted",
    "--limit 5": "limit=5.0 is not accepted: it must be given with --tasks",
    "--tasks x --data y": "data='y' is not accepted: it must be left out with --tasks",
    "--mesh.tensor 3": "mesh.tensor=3",
    "--mesh.tensor 16": "the mesh needs 16 devices",
    "--step 4": "4",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(run_folder, capsys, tmp_path, words):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("x")
    names = dict(empty=tmp_path / "empty.txt", one=tmp_path / "one.txt")
    command = ["eval", str(run_folder), *words.format(**names).split()]
    assert cli.run(command) in (1, 2)
    out, error = capsys.readouterr()
    assert MISTAKES[words] in error
    assert error.count("\n") == 1 and not out


def test_a_model_from_elsewhere_has_no_held_out_documents(tmp_path, capsys):
    own = tiny.make(tmp_path)
    tiny.save(tmp_path / "run/checkpoints", own)
    assert cli.run(["eval", str(tmp_path / "run")]) == 2
    assert "was not trained here" in capsys.readouterr().err
    assert command.choose_context(None, own, trained_here=False) == 64
    assert command.choose_context(None, own, trained_here=True) == 32


def test_parameters_that_are_not_finite(tmp_path, capsys):
    nan = float("nan")
    tiny.save(tmp_path / "run/checkpoints", tiny.make(tmp_path), scale=nan)
    (tmp_path / "a.txt").write_text("text")
    command = ["eval", str(tmp_path / "run"), "--data", str(tmp_path / "a.txt")]
    assert cli.run(command) == 1
    assert "the loss of document 0 (from 0) is nan" in capsys.readouterr().err


# The command, which says when the job starts.
def test_errors_of_a_source_name_the_option(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"other": "x"}\n' * 3)
    with pytest.raises(ConfigError, match=r"--text-field"):
        list(command.read_source(config.Data(source=str(tmp_path))))
