"""The training job: a stopped run continues bit for bit as if it had not stopped; every
part does what its docstring says.
"""

import contextlib
import dataclasses
import gzip
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tiny
import tokenizers
from orbax.checkpoint import v1 as ocp
from tokenizers import decoders, models, pre_tokenizers

import ladder_jax
from ladder_jax import config, loading, model, progress, sharding, training
from ladder_jax.checkpoint import saved_steps
from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer
from ladder_jax.data.batches import held_out_batches, train_iterator
from ladder_jax.data.corpus import prepare
from ladder_jax.optimizer import learning_rate, make_optimizer

GOLDEN = [
    5.570938,
    5.543566,
    5.492551,
    5.388082,
    5.228017,
    5.075004,
    4.922790,
    4.764683,
    4.610224,
    4.480014,
    4.343559,
    4.229178,
    4.106212,
    4.015522,
    3.953678,
    3.888940,
    3.843435,
    3.804221,
    3.765382,
    3.748419,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    tiny.write_corpus(path / "corpus")
    return path


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with tiny.compiled_once(tmp_path_factory.mktemp("compiled")) as settings:
        yield settings


class Watch:
    """Counts what a run compiles, and whether each step's old state was given up."""

    def __init__(self, patch):
        self.functions, self.traces, self.copies, self.saving = [], 0, 0, False
        loss, make_step, make_evaluation = (
            model.loss,
            training.make_step,
            training.make_evaluation,
        )
        save = training.Checkpoints.save

        def traced(*arguments, **options):
            self.traces += 1
            return loss(*arguments, **options)

        def watched_step(*arguments):
            step = make_step(*arguments)
            self.functions.append(step)

            def call(state, batch):
                results = step(state, batch)
                self.copies += not self.saving and not all(
                    x.is_deleted() for x in jax.tree.leaves(state)
                )
                # A save on a CPU reads the state where it lies: the next step does not
                # overwrite it.
                self.saving = False
                return results

            return call

        def watched_evaluation(*arguments):
            self.functions.append(make_evaluation(*arguments))
            return self.functions[-1]

        def watched_save(*arguments):
            save(*arguments)
            self.saving = True

        patch.setattr(training.Checkpoints, "save", watched_save)
        patch.setattr(model, "loss", traced)
        patch.setattr(training, "make_step", watched_step)
        patch.setattr(training, "make_evaluation", watched_evaluation)

    def check(self):
        assert [f._cache_size() for f in self.functions] == [
            1,
            1,
        ] and self.traces == 2, "a program was compiled twice"
        assert not self.copies, "a step did not donate its old state"


@contextlib.contextmanager
def watched():
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        yield
        watch.check()


@pytest.fixture(scope="module")
def whole(folder, environment):
    """The run that nothing interrupts: its folder."""
    with watched():
        done = training.train(
            tiny.make(
                folder,
                train_out=str(folder / "whole"),
                train_tensorboard=True,
                train_profile_steps=2,
            )
        )
    assert (
        done["step"] == 20 and done["stopped"] is None and done["parameters"] == 37_536
    )
    return folder / "whole"


def arrays(out, step):
    load = lambda name: ocp.load(
        out / "checkpoints" / str(step), checkpointable_name=name
    )
    return jax.tree_util.tree_leaves_with_path(
        {name: load(name) for name in ("model", "optimizer")}
    )


def assert_same_run(out, whole, step=20):
    assert tiny.rows(out) == tiny.rows(whole)
    for (path, left), (other, right) in zip(
        arrays(out, step), arrays(whole, step), strict=True
    ):
        assert (
            path == other and left.dtype == right.dtype and np.array_equal(left, right)
        ), path
    position = lambda run: (
        run / f"checkpoints/{step}/data/process_0-of-1.json"
    ).read_text()
    assert position(out) == position(whole)


def copy(whole, out, last):
    """A run that was killed after its checkpoint of step `last`."""
    shutil.copytree(whole, out)
    for step in saved_steps(out / "checkpoints"):
        if step > last:
            shutil.rmtree(out / "checkpoints" / str(step))


# ---------------------------------------------------------------- stopping and going on


@contextlib.contextmanager
def at_step(number, act):
    """Calls `act(batch)` before the step after `number` steps.

    Where `act` returns a batch, the step takes that one.
    """
    make_step = training.make_step

    def make(*arguments):
        step, count = make_step(*arguments), 0

        def call(state, batch):
            nonlocal count
            count += 1
            return step(state, act(batch) or batch if count == number + 1 else batch)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_step", make)
        yield


@pytest.mark.parametrize("name, step", [("SIGTERM", 5), ("SIGINT", 12)])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    whole, folder, tmp_path, name, step, capfd
):
    cfg = tiny.make(folder, train_out=str(tmp_path / "run"))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with at_step(step - 1, lambda _: os.kill(os.getpid(), signal.Signals[name])):
        done = training.train(cfg)
    assert done["stopped"] == name and done["step"] == step
    assert saved_steps(tmp_path / "run/checkpoints")[-1] == step
    assert f"{name}: stopping after this step" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with watched():
        done = training.train(cfg, resume=True)
    assert done["step"] == 20 and done["stopped"] is None
    assert f"resumed at step {step} of 20" in capfd.readouterr().out
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(
    folder, tmp_path, monkeypatch
):
    make_evaluation = training.make_evaluation

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_evaluation(*arguments)

    monkeypatch.setattr(training, "make_evaluation", interrupted)
    done = training.train(tiny.make(folder, train_out=str(tmp_path / "run")))
    assert (done["step"], done["stopped"], done["saved"]) == (0, "SIGTERM", False)
    assert saved_steps(tmp_path / "run/checkpoints") == []


def test_a_signal_right_after_resuming_keeps_what_was_saved(
    whole, folder, tmp_path, monkeypatch
):
    copy(whole, tmp_path / "run", 9)
    make_evaluation = training.make_evaluation

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return make_evaluation(*arguments)

    monkeypatch.setattr(training, "make_evaluation", interrupted)
    done = training.train(
        tiny.make(folder, train_out=str(tmp_path / "run")), resume=True
    )
    assert (done["step"], done["stopped"], done["saved"]) == (9, "SIGHUP", True)
    assert saved_steps(tmp_path / "run/checkpoints") == [3, 6, 9]


def test_a_run_of_3_billion_steps_ends_when_it_is_stopped(folder, tmp_path):
    """No schedule or order is an array over the steps of the run."""
    cfg = tiny.make(
        folder,
        train_out=str(tmp_path / "run"),
        train_steps=3_000_000_000,
        train_save_every=2**40,
        train_eval_every=2**40,
    )
    with at_step(1, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        done = training.train(cfg)
    assert (done["step"], done["stopped"], done["saved"]) == (2, "SIGTERM", True)
    rates = [row["learning_rate"] for row in tiny.rows(tmp_path / "run")]
    assert rates == pytest.approx([3e-3 / 5, 2 * 3e-3 / 5])


def test_no_step_is_reported_faster_than_it_is(folder, tmp_path, monkeypatch):
    """Steps that take 50 ms at least, around evaluations and saves that count apart."""
    make_step = training.make_step

    def slow(*arguments):
        step = make_step(*arguments)

        def call(state, batch):
            time.sleep(0.05)
            return jax.block_until_ready(step(state, batch))

        return call

    monkeypatch.setattr(training, "make_step", slow)
    for log_every in (1, 3):
        out = tmp_path / f"run{log_every}"
        cfg = tiny.make(folder, train_out=str(out), train_log_every=log_every)
        training.train(cfg)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line).get("tokens_per_s") for line in lines]
        rates = [rate for rate in rates if rate is not None]
        assert len(rates) >= 5 and max(rates) <= 8 * 32 / 0.05, rates


def test_pace_counts_steps_between_the_times_of_their_ends(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.Pace(0) as pace:

        def lap(step, time):
            now[0] = time
            measured = pace.measure(step, {"loss": jnp.float32(1)})
            measured.ready_at.result()
            now[0] = time + 100  # when the host reads the results does not matter
            return pace.lap(measured)

        assert lap(10, 20.0) == 2.0
        assert lap(20, 30.0) == 1.0
        assert lap(20, 31.0) is None  # no step since
        now[0] = 50.0
        pace.restart(20)  # after an evaluation
        assert lap(24, 52.0) == 0.5


def test_durations():
    assert [progress.duration(s) for s in (75, 7500, 360_000, 3e12)] == [
        "1m15s",
        "2h05m",
        "4d04h",
        "34,722,222d05h",
    ]


def test_without_a_begin_token_a_document_starts_at_the_eos(
    folder, tmp_path, monkeypatch
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
        folder,
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


def test_a_checkpoint_of_a_newer_version_names_itself(whole, folder, tmp_path):
    copy(whole, tmp_path / "run", 3)
    path = tmp_path / "run/checkpoints/3/meta/data.json"
    meta = json.loads(path.read_text())
    meta["ladder_jax"] = "9.1.0"
    meta["config"]["model"]["experts"] = 8
    path.write_text(json.dumps(meta))
    message = (
        f"{tmp_path}/run was written by ladder_jax 9.1.0, and this version cannot read "
        "its configuration: model.experts is not a field"
    )
    with pytest.raises(ConfigError, match=message):
        training.train(tiny.make(folder, train_out=str(tmp_path / "run")), resume=True)
    with pytest.raises(ConfigError, match=message):
        ladder_jax.load(tmp_path / "run")


def test_a_signal_in_the_last_step_is_the_end(whole, folder, tmp_path):
    with at_step(2, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        done = training.train(
            tiny.make(
                folder,
                train_out=str(tmp_path / "run"),
                train_steps=20,
                train_log_every=50,
                train_eval_every=50,
                train_save_every=50,
            )
        )
    # The stopped run has no row that the whole run does not have.
    assert done["stopped"] and tiny.rows(tmp_path / "run") == []
    copy(whole, tmp_path / "end", 18)
    with at_step(1, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        done = training.train(
            tiny.make(folder, train_out=str(tmp_path / "end")), resume=True
        )
    assert done["stopped"] is None and "held_out_loss" in done
    assert_same_run(tmp_path / "end", whole)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import jax
from ladder_jax import config, training

recipe, out, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
place, choose = training.to_devices, random.Random(0)
# Slow steps, so that there is time between two saves.
training.to_devices = lambda *arguments: time.sleep(0.05) or place(*arguments)
saving = lambda: list((out / "checkpoints").glob("*tmp*"))
folders = lambda: (out / "checkpoints").glob("[0-9]*")
newest = lambda: max((int(f.name) for f in folders() if f.name.isdigit()), default=0)
where = {"during a save": 0, "between saves": 0}
while True:
    if not (child := os.fork()):
        try:
            jax.config.update("jax_num_cpu_devices", 8)
            training.train(config.from_recipe(recipe), resume=True)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    start, rarest = newest(), min(where, key=where.get)
    between = lambda: newest() > start and not saving()
    due = saving if rarest == "during a save" else between
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if sum(where.values()) < kills and due():
            break
        time.sleep(0.001)
    if ended[0]:
        missing = min(where.values()) < 1 and f"killed only {where}"
        sys.exit(os.waitstatus_to_exitcode(ended[1]) or missing)
    if rarest == "during a save":
        time.sleep(choose.uniform(0, 0.02))
    where["during a save" if saving() else "between saves"] += 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", where, newest(), file=sys.stderr)
"""


def test_killed_at_random_moments(whole, folder, tmp_path, environment):
    """Five SIGKILLs in one run, some in the middle of a save and some between saves."""
    recipe = tiny.recipe(folder, train_out=str(tmp_path / "run"))
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, recipe, tmp_path / "run", "5"],
        capture_output=True,
        text=True,
        env=os.environ | environment | {"XLA_FLAGS": ""},
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path / "run", whole)


def test_on_another_mesh_the_run_goes_on(whole, folder, tmp_path):
    copy(whole, tmp_path / "run", 12)
    cfg = tiny.make(
        folder, train_out=str(tmp_path / "run"), mesh_data=1, mesh_fsdp=1, mesh_tensor=8
    )
    training.train(cfg, resume=True)
    for left, right in zip(tiny.rows(tmp_path / "run"), tiny.rows(whole), strict=True):
        assert left == (
            right if right["step"] <= 12 else pytest.approx(right, rel=1e-4)
        )


def test_a_step_that_is_not_finite_stops_the_run(whole, folder, tmp_path, capfd):
    cfg = tiny.make(folder, train_out=str(tmp_path / "run"), train_log_every=20)
    with at_step(8, lambda batch: {**batch, "weights": batch["weights"] * np.nan}):
        with pytest.raises(
            FloatingPointError,
            match=r"^step 9 is not finite \(gradient_norm nan, loss nan, "
            r"parameter_norm nan\): stopped; the checkpoint of step 6 is good\. Try a ",
        ):
            training.train(cfg)
    assert saved_steps(tmp_path / "run/checkpoints") == [3, 6]
    assert [row["step"] for row in tiny.rows(tmp_path / "run")] == [3, 6, 7, 7]
    assert "nan" not in (tmp_path / "run/metrics.jsonl").read_text().lower()
    training.train(tiny.make(folder, train_out=str(tmp_path / "run")), resume=True)
    assert (
        arrays(tmp_path / "run", 20)[-1][1].tobytes()
        == arrays(whole, 20)[-1][1].tobytes()
    )


def test_a_full_disk_ends_the_run_and_the_rest_is_good(whole, folder, tmp_path, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = tiny.make(folder, train_out=str(tmp_path / "run"))

    def fill(_):
        deadline = time.monotonic() + 60
        while (
            saved_steps(tmp_path / "run/checkpoints") != [3, 6]
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)  # another thread writes them
        # No file can grow beyond this size.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    try:
        with (
            at_step(8, fill),
            pytest.raises(
                OSError, match=r"/9 could not be written: .*; those before it are as "
            ),
        ):
            training.train(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved_steps(tmp_path / "run/checkpoints") == [3, 6]
    training.train(cfg, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_resume_without_a_run_starts_it(folder, tmp_path, capfd):
    cfg = tiny.make(folder, train_out=str(tmp_path / "run"))
    with at_step(0, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        training.train(cfg, resume=True)
    assert "nothing to resume in" in capfd.readouterr().out
    with pytest.raises(
        ConfigError,
        match="already holds a run, at step 1: continue it with --resume, or",
    ):
        training.train(cfg)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            dict(model_ffn_dim=128),
            "model.ffn_dim was 64 in the run to resume and is 128 now: keep it, or",
        ),
        (
            dict(model_residual="standard"),
            "model.residual was 'ladder' in the run to resume and is 'standard' now",
        ),
        (dict(train_global_batch=16), "train.global_batch was 8 in the run"),
        (dict(train_seed=1), "train.seed was 0 in the run"),
        (dict(data_held_out_fraction=0.3), "data.held_out_fraction was 0.2 in the run"),
    ],
)
def test_what_a_resumed_run_may_not_change(whole, folder, changed, message):
    before = sorted(whole.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        training.train(tiny.make(folder, train_out=str(whole), **changed), resume=True)
    assert sorted(whole.rglob("*")) == before


def test_a_corpus_or_tokenizer_with_other_contents_is_not_the_same_run(
    whole, folder, tmp_path
):
    tiny.write_corpus(tmp_path / "corpus")
    meta = json.loads((whole / "checkpoints/20/meta/data.json").read_text())
    now = {**meta, "corpus": [1, 2]}
    with pytest.raises(
        ConfigError,
        match="data.source=.* has other contents now than in the run to resume: rest",
    ):
        training.check_resumed(meta, now)
    other = tokenizer.train(["one two three"] * 9, 270).to_json()
    with pytest.raises(
        ConfigError, match="data.tokenizer='bytes' has other contents now"
    ):
        training.check_resumed(meta, {**meta, "tokenizer": other})
    for residual in ("desync:2", "dtp:1"):
        own = json.loads(json.dumps(meta).replace('"ladder"', f'"{residual}"'))
        with pytest.raises(
            ConfigError,
            match=f"mesh.tensor was 2 in the run to resume and is 4 now: a {residual}",
        ):
            training.check_resumed(own, {**own, "tensor": 4})
    training.check_resumed(meta, {**meta, "tensor": 4})


def test_a_run_goes_on_after_it_and_its_corpus_moved(folder, whole, tmp_path):
    shutil.copytree(folder / "corpus", tmp_path / "moved/corpus")
    shutil.copytree(whole, tmp_path / "moved/run")
    # The corpus in other words; then a folder that also holds train.out and the cache.
    for source in ("moved/./corpus/", "moved"):
        moved = tiny.make(tmp_path / "moved", data_source=f"{tmp_path}/{source}")
        assert training.train(moved, resume=True)["step"] == 20
    (tmp_path / "moved/corpus/new.txt").write_text("one more document")
    with pytest.raises(ConfigError, match="data.source=.* has other contents now"):
        training.train(moved, resume=True)


def test_documents_with_as_many_tokens_but_other_contents_are_not_the_same_run(whole):
    meta = json.loads((whole / "checkpoints/20/meta/data.json").read_text())
    changed = {**meta, "documents": "another digest"}
    with pytest.raises(ConfigError, match="data.source=.* has other contents now"):
        training.check_resumed(meta, changed)
    del meta["documents"]  # a checkpoint from before there was a digest
    training.check_resumed(meta, changed)
    older = json.loads(json.dumps(meta))
    del older["config"]["model"]["qk_norm"]  # from before there was such a field
    training.check_resumed(older, meta)


def test_mistakes_leave_nothing_behind(folder, tmp_path):
    for changed, message in [
        (dict(data_source=str(tmp_path / "none")), "does not exist"),
        (dict(data_tokenizer=str(tmp_path / "none.json")), "cannot be read"),
        (dict(model_vocab_size=256), "smaller than the 259 tokens"),
        (dict(train_global_batch=6), "a batch of 6 sequences"),
        (dict(mesh_tensor=3), "has 12 devices, but there are 8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            training.train(
                tiny.make(folder, train_out=str(tmp_path / "run"), **changed)
            )
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError,
        match="train.out='.*file/run' is not accepted: .*/file is not a folder that",
    ):
        training.train(tiny.make(folder, train_out=str(tmp_path / "file/run")))


def test_tensorboard_that_is_not_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ConfigError, match=re.escape("pip install 'ladder_jax[tensorboard]'")
    ):
        training.train(
            tiny.make(folder, train_out=str(tmp_path / "run"), train_tensorboard=True)
        )
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- what a run leaves


def test_the_first_20_losses(whole):
    losses = [row["loss"] for row in tiny.rows(whole) if "loss" in row]
    assert losses == pytest.approx(GOLDEN, rel=3e-5), (
        "The first 20 losses of a small run have changed. If the change was meant to "
        "alter the numbers (initialisation, the model's math, the optimizer, the order "
        "of the data), say so in its commit and replace GOLDEN. If it was not, it has "
        "a bug: look at the first step that differs. The values now:\n"
        + ", ".join(f"{loss:.6f}" for loss in losses)
    )


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
        "loss",
        "gradient_norm",
        "parameter_norm",
        "learning_rate",
    }
    assert set(reports[1]) == set(reports[0]) | {"tokens_per_s", "mfu"}
    for row in reports[1:]:
        assert row["mfu"] == pytest.approx(
            row["tokens_per_s"]
            * training.flops_per_token(tiny.make(whole.parent).model, 32)
            / (8 * 1e12)
        )
    assert set(evaluations[0]) == {
        "step",
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
        if name != "step"
    }


def test_held_out_loss_is_that_of_the_reference(whole, folder):
    """Weighted over batches, padding left out, after the step that the row names."""
    import reference

    cfg = tiny.make(folder)
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


# ---------------------------------------------------------------- steps


def steps_of(cfg, shape, state, batches):
    """(results of every step, parameters at the end) of `cfg` from `state`."""
    mesh = helpers.make_mesh(*shape)
    optimizer = make_optimizer(cfg.optimizer, cfg.train.steps)
    place = lambda tree, like: jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding), tree, like
    )
    state = place(state, training.abstract_state(cfg, mesh, optimizer))
    batches = [
        jax.device_put(batch, sharding.named_shardings(mesh, sharding.TOKENS))
        for batch in batches
    ]
    step = (
        training.make_step(cfg, mesh, optimizer)
        .lower(state, batches[0])
        .compile({"xla_backend_optimization_level": 0})
    )
    results = []
    for batch in batches:
        state, result = step(state, batch)
        results.append({name: float(value) for name, value in result.items()})
    return results, jax.device_get(state.model)


@pytest.fixture(scope="module")
def state(folder, whole):
    """The state that the runs start from, on the host."""
    cfg = tiny.make(folder)
    return jax.device_get(
        training.init_state(
            cfg, sharding.make_mesh(cfg.mesh), make_optimizer(cfg.optimizer, 20)
        )
    )


@pytest.fixture(scope="module")
def batches(folder):
    """Three batches of 16 rows with a different number of zero weights in each row."""
    cfg = tiny.make(folder)
    iterator = train_iterator(
        prepare(cfg.data, tokenizer.load("bytes")), batch=16, length=32, seed=0
    )
    lengths = np.random.default_rng(0).integers(1, 33, (16, 1))
    return [
        {**batch, "weights": batch["weights"] * (np.arange(32) < lengths)}
        for batch, _ in zip(iterator, range(3))
    ]


@pytest.fixture(scope="module")
def one_device(folder, state, batches):
    return steps_of(clipped(folder), (1, 1, 1), state, batches)


def clipped(folder, **fields):
    """A config that clips gradients, which have a norm above 1."""
    fields = dict(train_global_batch=16, optimizer_clip_norm=0.5) | fields
    return tiny.make(folder, **fields)


@pytest.mark.parametrize(
    "shape, accumulate",
    [((2, 2, 2), 1), ((1, 1, 8), 1), ((2, 2, 2), 4), ((1, 1, 1), 2)],
)
def test_a_step_is_the_same_on_every_mesh_and_in_parts(
    folder, state, batches, one_device, shape, accumulate
):
    """Losses, norms and clipped updates; parts of different weights give one mean."""
    results, parameters = steps_of(
        clipped(folder, train_grad_accum_steps=accumulate), shape, state, batches
    )
    for result, expected in zip(results, one_device[0]):
        assert expected["gradient_norm"] > 1 and result == pytest.approx(
            expected, rel=2e-5
        )
    for left, right in zip(jax.tree.leaves(parameters), jax.tree.leaves(one_device[1])):
        np.testing.assert_allclose(left, right, atol=2e-5)


def test_a_step_updates_in_place(folder):
    cfg = tiny.make(folder)
    mesh = helpers.make_mesh(2, 2, 2)
    optimizer = make_optimizer(cfg.optimizer, 20)
    state = training.abstract_state(cfg, mesh, optimizer)
    tokens = sharding.named_shardings(mesh, sharding.TOKENS)
    batch = {
        name: jax.ShapeDtypeStruct(
            (8, 32), jnp.float32 if name == "weights" else jnp.int32, sharding=tokens
        )
        for name in training.BATCH_FIELDS
    }
    compiled = training.make_step(cfg, mesh, optimizer).lower(state, batch).compile()
    local = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    assert compiled.memory_analysis().alias_size_in_bytes >= local


def test_the_first_state_is_the_same_on_every_mesh(folder, state):
    cfg = tiny.make(folder)
    mesh = helpers.make_mesh()
    first = training.init_state(cfg, mesh, make_optimizer(cfg.optimizer, 20))
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(state)):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_parameters_that_overflow_are_seen_before_they_are_saved(
    folder, state, batches
):
    cfg = clipped(folder, optimizer_learning_rate=1e30, optimizer_warmup_steps=0)
    results, _ = steps_of(cfg, (1, 1, 1), state, batches[:1])
    assert math.isfinite(results[0]["loss"]) and math.isfinite(
        results[0]["gradient_norm"]
    )
    assert not math.isfinite(results[0]["parameter_norm"])


# ---------------------------------------------------------------- optimizer


@pytest.mark.parametrize(
    "fields, steps, expected",
    [
        (
            dict(lr_schedule="cosine", warmup_steps=10),
            110,
            {0: 0.1, 4: 0.5, 9: 1, 10: 1, 60: 0.55, 110: 0.1},
        ),
        (
            dict(lr_schedule="cosine", warmup_steps=0, final_lr_fraction=0.0),
            100,
            {0: 1, 50: 0.5, 100: 0},
        ),
        (
            dict(lr_schedule="cosine", warmup_steps=10, decay_steps=40),
            110,
            {10: 1, 30: 0.55, 50: 0.1, 109: 0.1},
        ),
        # The warm-up is longer than the run.
        (dict(lr_schedule="cosine", warmup_steps=200), 100, {0: 0.01, 99: 1}),
        (
            dict(lr_schedule="wsd", warmup_steps=10),
            100,
            {0: 0.1, 10: 1, 79: 1, 80: 1, 90: 0.55, 99: 0.145, 100: 0.1},
        ),
        (
            dict(lr_schedule="wsd", warmup_steps=10, decay_steps=50),
            100,
            {49: 1, 50: 1, 75: 0.55, 100: 0.1},
        ),
        (
            dict(lr_schedule="wsd", warmup_steps=90, decay_steps=50),
            100,
            {89: 1, 90: 1, 95: 0.55, 100: 0.1},
        ),
        # The run is too short to decay.
        (dict(lr_schedule="wsd", warmup_steps=1), 4, {0: 1, 1: 1, 3: 1}),
        (dict(lr_schedule="constant", warmup_steps=4), 100, {0: 0.25, 3: 1, 99: 1}),
        (
            dict(warmup_steps=10),
            3_000_000_000,
            {0: 0.1, 9: 1, 2**30: 0.55, 2**31 - 1: 0.1},
        ),
        (
            dict(lr_schedule="wsd", warmup_steps=10, decay_steps=4_000_000_000),
            3_000_000_000,
            {0: 0.1, 9: 1, 2**30: 0.55},
        ),
        (
            dict(lr_schedule="constant", warmup_steps=0, decay_steps=50),
            100,
            {0: 1, 99: 1},
        ),
    ],
)
def test_learning_rate(fields, steps, expected):
    rate = learning_rate(config.Optimizer(learning_rate=2.0, **fields), steps)
    assert {step: float(rate(step)) / 2 for step in expected} == pytest.approx(
        expected, abs=1e-6
    )
    assert float(rate(0)) > 0 or fields.get("final_lr_fraction") == 0


def test_only_matrices_decay():
    cfg = dataclasses.replace(
        tiny.make(Path("none")).model, qk_norm=True, qkv_bias=True
    )
    ones = lambda x: jnp.ones(x.shape, x.dtype)
    parameters = jax.tree.map(ones, model.abstract(cfg))
    optimizer = make_optimizer(
        config.Optimizer(
            learning_rate=0.5, weight_decay=0.1, warmup_steps=0, lr_schedule="constant"
        ),
        10,
    )
    updates = jax.jit(
        lambda p: optimizer.update(
            jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p
        )[0]
    )(parameters)
    names = sharding.parameter_names(parameters)
    seen = {}
    jax.tree.map(
        lambda name, update: seen.setdefault(name, set()).update(
            np.unique(update).tolist()
        ),
        names,
        updates,
    )
    assert {name for name, values in seen.items() if values == {0.0}} == {
        "norm",
        "attention.norm",
        "mlp.norm",
        "attention.q_norm",
        "attention.k_norm",
        "attention.bq",
        "attention.bk",
        "attention.bv",
    }
    assert {round(value, 6) for values in seen.values() for value in values} == {
        0.0,
        -0.05,
    }


def test_clipping_or_not_is_the_same_state():
    """So that a run can go on with another `clip_norm`."""
    parameters = {"embedding": jnp.ones((2, 2))}
    states = [
        make_optimizer(config.Optimizer(clip_norm=norm), 10).init(parameters)
        for norm in (None, 1.0)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
