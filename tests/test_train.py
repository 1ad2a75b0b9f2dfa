"""The training job: its numbers are golden, and it leaves what its docstring says."""

import gzip
import json
import math
import re
import struct
import sys

import jax
import matplotlib.image
import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from train_runs import ALWAYS, assert_golden, documented, written

import ladder_jax
from ladder_jax import loading, model, train_programs, training
from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer
from ladder_jax.data.batches import held_out_batches
from ladder_jax.data.corpus import prepare

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_the_first_20_losses(whole):
    assert_golden(whole, range(1, 21))


def test_a_run_writes_the_documented_metrics_and_no_others(whole):
    assert written(whole) == documented(*ALWAYS)


def test_rows_trace_plot_and_events(whole):
    rows = [
        json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()
    ]
    reports, evaluations = (
        [row for row in rows if name in row] for name in ("loss", "held_out_loss")
    )
    assert [row["step"] for row in reports] == list(range(1, 21))
    assert [row["step"] for row in evaluations] == [7, 14, 20] and len(rows) == 23
    assert rows.index(evaluations[0]) == 7  # in the order of the steps
    # The first step compiles the program, so that it has no tokens_per_s.
    assert set(reports[0]) == {
        "step",
        "time",
        "loss",
        "gradient_norm",
        "parameter_norm",
        "learning_rate",
    }
    assert set(reports[1]) == set(reports[0]) | {"tokens_per_s", "mfu"}
    for row in reports[1:]:
        assert row["mfu"] == pytest.approx(
            row["tokens_per_s"]
            * train_programs.flops_per_token(tiny.make(whole.parent).model, 32)
            / (8 * 1e12)
        )
    assert set(evaluations[0]) == {
        "step",
        "time",
        "held_out_loss",
        "held_out_bits_per_byte",
        "evaluation_s",
    }
    # A row after a save has the time that the save took, which tokens_per_s leaves out.
    assert [row["step"] for row in reports if "save_s" in row] == [4, 7, 10, 13, 16, 19]
    # A byte is a token; a token that ends a document is not a byte.
    assert evaluations[-1]["held_out_bits_per_byte"] == pytest.approx(
        evaluations[-1]["held_out_loss"] / math.log(2) * 1.003, rel=3e-3
    )

    [trace] = (whole / "profile").rglob("*.trace.json.gz")
    names = {
        event.get("name", "")
        for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    }
    assert any("all-reduce" in name or "psum" in name for name in names)

    picture = matplotlib.image.imread(whole / "loss.png")
    assert (
        picture.shape == (540, 960, 4)
        and len(np.unique(picture.reshape(-1, 4), axis=0)) > 50
    )

    from tensorboardX.proto.event_pb2 import Event

    seen = {}
    for path in (whole / "tensorboard").iterdir():
        content, start = path.read_bytes(), 0
        while start < len(content):
            (size,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + size])
            start += 12 + size + 4
            seen.update(
                {
                    (value.tag, event.step): value.simple_value
                    for value in event.summary.value
                }
            )
    assert seen == {
        (name, row["step"]): pytest.approx(value, rel=1e-6)
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time")
    }


def test_held_out_loss_is_that_of_the_reference(whole, tiny_folder):
    """Weighted over batches, padding left out, after the step that the row names."""
    import reference

    cfg = tiny.make(tiny_folder)
    corpus = prepare(cfg.data, tokenizer.load("bytes"))
    batches = held_out_batches(corpus, batch=8, length=32)
    batch = {
        name: np.concatenate([batches[i][name] for i in range(2)])
        for name in training.BATCH_FIELDS
    }
    from ladder_jax.checkpoint import load_model

    parameters = load_model(whole, model.abstract(cfg.model))
    loss = jax.jit(
        lambda parameters, batch: reference.loss(parameters, cfg.model, batch)
    )(parameters, batch)
    assert tiny.rows(whole)[-1]["held_out_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_without_a_begin_token_a_document_starts_at_the_eos(
    tiny_folder, tmp_path, monkeypatch
):
    """A tokenizer as GPT-2's, without a template and with one special token."""
    letters = [bytes([byte]).decode("latin1") for byte in range(33, 127)]
    bpe = tokenizers.Tokenizer(
        models.BPE({letter: n for n, letter in enumerate([*letters, "Ġ", "Ċ"])}, [])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    cfg = tiny.make(
        tiny_folder,
        train_out=str(tmp_path / "run"),
        train_steps=1,
        train_sample_tokens=5,
        data_tokenizer=str(tmp_path / "tokenizer.json"),
    )
    prompts = []

    def generate(model, model_config, mesh, prompt, **options):
        prompts.append(list(prompt))
        return iter([0, 1])

    monkeypatch.setattr(training, "generate", generate)
    monkeypatch.setattr(loading, "generate", generate)
    assert training.train(cfg)["sample"] == '!"'
    loaded = ladder_jax.load(tmp_path / "run")
    assert "".join(loaded.generate("")) == '!"'
    assert prompts == [[loaded.tokenizer.eos]] * 2


def test_mistakes_leave_nothing_behind(tiny_folder, tmp_path):
    for changed, message in [
        (dict(data_source=str(tmp_path / "none")), "does not exist"),
        (dict(data_tokenizer=str(tmp_path / "none.json")), "does not exist"),
        (dict(model_vocab_size=256), "smaller than the 259 tokens"),
        (dict(train_global_batch=6), "a batch of 6 sequences"),
        (dict(mesh_tensor=3), "has 12 devices, but there are 8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            training.train(
                tiny.make(tiny_folder, train_out=str(tmp_path / "run"), **changed)
            )
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError,
        match="train.out='.*file/run' is not accepted: .*/file is not a folder that",
    ):
        training.train(tiny.make(tiny_folder, train_out=str(tmp_path / "file/run")))


def test_tensorboard_that_is_not_installed(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ConfigError, match=re.escape("pip install 'ladder_jax[tensorboard]'")
    ):
        training.train(
            tiny.make(
                tiny_folder, train_out=str(tmp_path / "run"), train_tensorboard=True
            )
        )
    assert not (tmp_path / "run").exists()
