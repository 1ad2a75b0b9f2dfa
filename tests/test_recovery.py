"""Training from a checkpoint's weights, toward a parent, with an annealed delay."""

import contextlib
import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from train_runs import ALWAYS, documented, written

from ladder_jax import anneal, config, loading, training
from ladder_jax.config import ConfigError, Distill
from ladder_jax.convert import ladderize
from ladder_jax.data import tokenizer

pytestmark = pytest.mark.usefixtures("fast_compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, a trained standard run, and its ladder conversion."""
    path = tmp_path_factory.mktemp("recovery")
    tiny.write_corpus(path / "corpus")
    training.train(tiny.make(path, model_residual="standard"))
    ladderize.run(ladderize.Ladderize(str(path / "run"), str(path / "new"), "all"))
    return path


def recovery(folder, out, **fields):
    """A run that recovers the conversion, with the model of the checkpoint."""
    own = dict(
        train_out=str(out),
        train_init_from=str(folder / "new"),
        train_steps=8,
        train_eval_every=2,
        distill_parent=str(folder / "run"),
        optimizer_learning_rate=1e-3,
    )
    run = tiny.make(folder, **own | fields)
    return dataclasses.replace(run, model=config.Model())


def rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    clock = ("time", "tokens_per_s", "mfu", "save_s", "evaluation_s")
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


@pytest.fixture(scope="module")
def whole(folder):
    """A whole run with distillation and an annealed delay."""
    out = folder / "whole"
    training.train(recovery(folder, out, distill_anneal_steps=4))
    return out


def test_a_run_starts_with_the_checkpoints_weights_and_model(folder, whole):
    """The first loss is that of the standard parent, as the delay is still fresh."""
    first = rows(whole)[0]
    assert first["step"] == 1 and abs(first["divergence"]) < 1e-5
    last = next(r for r in reversed(rows(folder / "run")) if "loss" in r)
    assert first["cross_entropy"] == pytest.approx(last["loss"], rel=0.2)
    assert first["loss"] == pytest.approx(0.1 * first["cross_entropy"], abs=1e-5)
    loaded = loading.load(whole)
    assert loaded.config.model.residual == "ladder"
    assert loaded.config.model.ffn_dim == 64


def test_the_metrics_are_the_documented_ones(whole):
    groups = ("distill.parent", "distill.anneal_steps")
    assert written(whole) == documented(*ALWAYS, *groups)


def test_the_delay_falls_and_evaluations_have_none(whole):
    found = {row["step"]: row for row in rows(whole) if "held_out_loss" in row}
    freshness = {step: row.get("freshness") for step, row in found.items()}
    assert freshness == {2: 0.5, 4: None, 6: None, 8: None}
    difference = found[2]["blended_held_out_loss"] - found[2]["held_out_loss"]
    assert abs(difference) > 1e-4, "the evaluation has the whole delay"


def test_recovery_brings_the_model_towards_its_parent(whole):
    losses = [row["held_out_loss"] for row in rows(whole) if "held_out_loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(folder, whole, tmp_path, stop_after):
    """While the delay falls, and after; the checkpoint that it began with is gone."""
    run = recovery(folder, tmp_path / "run", distill_anneal_steps=4)
    origin = tmp_path / "origin"
    shutil.copytree(folder / "new", origin)
    own = dataclasses.replace(run.train, init_from=str(origin))
    run = dataclasses.replace(run, train=own)

    class Stop(training.StopSignal):
        def requested(self, step):
            return signal.SIGTERM if step == stop_after else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "StopSignal", Stop)
        assert training.train(run)["step"] == stop_after
    shutil.rmtree(origin)
    training.train(run, resume=True)
    assert rows(tmp_path / "run") == rows(whole)
    left, right = (loading.load(path).model for path in (tmp_path / "run", whole))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        np.testing.assert_array_equal(a, b)


def test_without_a_parent_the_loss_is_the_cross_entropy(folder, tmp_path):
    """Supervised fine-tuning; the first loss is the conversion's own."""
    run = recovery(folder, tmp_path / "run", distill_parent="", train_steps=1)
    training.train(run)
    first = rows(tmp_path / "run")[0]
    assert "divergence" not in first
    fresh = recovery(folder, tmp_path / "b", train_steps=1)
    training.train(fresh)
    expected = rows(tmp_path / "b")[0]["cross_entropy"]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def others(folder):
    """Checkpoints that do not fit: of another tokenizer, parallel, desync."""
    bpe = tokenizer.train(["some text of words"] * 9, 260)
    bpe.save(folder / "tokenizer.json")
    for name, residual, tensor, its in (
        ("bpe", "ladder", 1, bpe),
        ("parallel", "parallel", 1, tokenizer.ByteTokenizer()),
        ("desync", "desync:2", 4, tokenizer.ByteTokenizer()),
    ):
        shape = tiny.make(folder, model_residual=residual)
        tiny.save(folder / name, shape, tensor=tensor, tokenizer=its.to_json())
    return folder


MISTAKES = [
    (dict(train_init_from="nowhere"), "train.init_from: "),
    (dict(distill_parent="nowhere"), "distill.parent: "),
    (dict(model_ffn_dim=128), "model.ffn_dim=128 is not accepted"),
    (dict(train_init_from="PARALLEL"), "one norm"),
    (dict(data_tokenizer="TOKENIZER"), "is not the tokenizer of the checkpoint"),
    (dict(distill_parent="BPE"), "its tokenizer is another one"),
    (dict(distill_parent="DESYNC"), "mesh.tensor=4"),
    (dict(distill_top_k=264), "distill.top_k=264"),
    (dict(model_residual="standard", distill_anneal_steps=2), "has no delay"),
]


@pytest.mark.parametrize("fields, message", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(others, tmp_path, fields, message):
    names = dict(PARALLEL="parallel", BPE="bpe", DESYNC="desync")
    names["TOKENIZER"] = "tokenizer.json"
    fields = {
        name: str(others / names[value]) if value in names else value
        for name, value in fields.items()
    }
    own = dict(train_init_from=str(others / "new"), distill_parent=str(others / "run"))
    run = tiny.make(others, train_out=str(tmp_path / "run"), **own | fields)
    with pytest.raises(ConfigError, match="(?s).*") as error:
        training.train(run)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_field_that_may_differ_is_said(folder, tmp_path, capfd):
    """rope_theta changes no parameter, but it changes the model."""
    run = recovery(folder, tmp_path / "run", train_steps=1)
    theta = dataclasses.replace(tiny.make(folder).model, rope_theta=500.0)
    with contextlib.suppress(FloatingPointError):
        training.train(dataclasses.replace(run, model=theta))
    assert "model.rope_theta is 500.0 here and 10000.0 there" in capfd.readouterr().out


# ---------------------------------------------------------------- the annealed delay


def values(options, steps, losses=(), every=1):
    """The freshness of every step; `losses`: what evaluations find."""
    delay = anneal.Anneal(options, steps)
    found = []
    for step in range(steps):
        found.append(float(delay.freshness(step)))
        delay.after_step()
        if losses and step % every == 0:
            delay.see(losses[step // every])
        delay = anneal.Anneal(options, steps, json.loads(json.dumps(delay.state())))
    return found


def test_freshness_falls_linearly():
    options = Distill(anneal_steps=4, anneal_tolerance=None)
    assert values(options, 8) == [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]


def test_freshness_waits_while_the_loss_is_too_high():
    options = Distill(anneal_steps=4, anneal_tolerance=0.1)
    losses = [2.0, 2.05, 2.2, 2.3, 2.0] + [2.0] * 20
    assert values(options, 12, losses)[:8] == [1, 0.75, 0.5, 0.25, 0.25, 0.25, 0, 0]


def test_the_last_steps_do_not_wait():
    options = Distill(anneal_steps=4, anneal_tolerance=0.1)
    losses = [2.0] + [9.0] * 20
    found = values(options, 10, losses)
    assert found == [1, 0.75, *[0.5] * 6, 0.25, 0]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(temperature=0.0), "distill.temperature=0.0"),
        (dict(top_k=-1), "distill.top_k=-1"),
        (dict(cross_entropy=-0.1), "distill.cross_entropy"),
        (dict(anneal_tolerance=-1.0), "distill.anneal_tolerance"),
    ],
)
def test_values_that_are_not_accepted(fields, message):
    with pytest.raises(ConfigError, match=message):
        Distill(**fields)


def test_the_delay_cannot_take_longer_than_the_run():
    with pytest.raises(ConfigError, match=r"anneal_steps=9 .* train.steps=8"):
        config.Config(train=config.Train(steps=8), distill=Distill(anneal_steps=9))
