"""A run with bad data leaves steps out, goes back, goes on, and does so every time."""

import contextlib
import itertools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
import tiny
from helpers import code_environment, free_address, run_together
from train_runs import ALWAYS, arrays, copy, documented, written

from ladder_jax import config, identity, rollback, train_programs, training
from ladder_jax.checkpoint import read_meta, saved_steps
from ladder_jax.data import batches as data
from ladder_jax.optimizer import make_optimizer
from ladder_jax.saving import Checkpoints
from ladder_jax.say import say
from ladder_jax.step_inputs import StepInputs

pytestmark = pytest.mark.usefixtures("fast_compiler")


@contextlib.contextmanager
def changed_rows(job, change):
    """Calls change(number of the row, its weights) for every training row."""
    read, tokens = data.Rows.__getitem__, job.corpus.train.tokens

    def changed(self, index):
        row = read(self, index)
        if not isinstance(index, slice) and self._side.tokens == tokens:
            change(index, row["weights"])
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Rows, "__getitem__", changed)
        yield


@pytest.fixture(scope="module")
def job(tiny_folder):
    return training.prepare(tiny.make(tiny_folder), False, say)


@pytest.fixture(scope="module")
def rows_of(job):
    """The numbers of the rows of each training batch."""

    def mark(index, weights):
        weights[:] = index

    with changed_rows(job, mark):
        first = itertools.islice(training.make_batches(job)[0], 40)
        return [batch["weights"][:, 0].astype(int).tolist() for batch in first]


@pytest.fixture(scope="module")
def bad_batches(job, rows_of):
    """bad_batches(numbers): inside, a row of each of these batches, from 0, is NaN."""

    def change(numbers):
        bad = {rows_of[number][0] for number in numbers}

        def spoil(index, weights):
            if index in bad:
                weights[:] = np.nan

        return changed_rows(job, spoil)

    return change


def read(out):
    """The rows of metrics.jsonl; ValueError where a number is not JSON's."""

    def refuse(name):
        raise ValueError(name)

    lines = (out / "metrics.jsonl").read_text().splitlines()
    clock = {"tokens_per_s", "mfu", "save_s", "evaluation_s", "time"}
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def assert_equal_trees(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.array_equal(a, b)


def test_a_rollback_is_the_checkpoint_and_the_data_after_the_bad_batch(
    tiny_folder, tmp_path, job, bad_batches, capfd
):
    """Beside a loop that restores the checkpoint and takes the batches from there."""
    cfg = tiny.make(tiny_folder, train_out=str(tmp_path / "run"))
    with bad_batches([8]):
        done = training.train(cfg)
        assert (done["step"], done["rollbacks"]) == (20, 1)
        said = capfd.readouterr().out
        # Step 9 has batch 8.
        assert (
            "step 9 is not finite (gradient_norm nan, loss nan, parameter_norm nan): "
            "back to the checkpoint of step 6, and on with other data (rollback 1 of "
            "2; steps lost: 3)" in said
        )
        found = read(tmp_path / "run")
        [row] = [row for row in found if "rollbacks" in row]
        assert row == dict(step=6, rollbacks=1, abandoned_steps=3)
        assert [r["step"] for r in found if "loss" in r] == list(range(1, 21))

        optimizer = make_optimizer(cfg.optimizer, 20)
        abstract = train_programs.abstract_state(cfg, job.mesh, optimizer).saved()
        batches, _ = training.make_batches(job)
        with Checkpoints(tmp_path / "run/checkpoints", 20) as checkpoints:
            _, parts, _ = checkpoints.restore(abstract, None, step=6)
        state = train_programs.State(**parts)
        step, losses = train_programs.make_step(cfg, job.mesh, optimizer), []
        for batch in itertools.islice(batches, 9, 9 + 14):
            state, results = step(state, training.to_devices(job.mesh, batch))
            losses.append(float(results["loss"]))
    assert losses == [r["loss"] for r in found if "loss" in r and r["step"] > 6]
    with Checkpoints(tmp_path / "run/checkpoints", 20) as checkpoints:
        _, parts, _ = checkpoints.restore(abstract, None, step=20)
    assert_equal_trees(parts, state.saved())


@pytest.fixture(scope="module")
def survivor(tiny_folder, bad_batches):
    """A run that leaves out step 3, goes back from step 10 to 9, and ends.

    It saves step 9 between two bad steps. Step 11 has been taken when the run learns
    of step 10.
    """
    out = tiny_folder / "survivor"
    cfg = tiny.make(tiny_folder, train_out=str(out), train_skip_steps=2)
    with bad_batches([2, 8, 9]):
        done = training.train(cfg)
    assert (done["step"], done["rollbacks"], done["skipped_steps"]) == (20, 1, 2)
    return out


def test_every_row_of_a_survivor_is_json(survivor):
    assert written(survivor) == documented(*ALWAYS, "train.skip_steps", "rollback")
    rows = [row for row in read(survivor) if "held_out_loss" not in row]
    [back] = [row for row in rows if "rollbacks" in row]
    assert back == dict(step=9, rollbacks=1, abandoned_steps=2)
    assert [row["step"] for row in rows if "loss" not in row] == [3, 9, 9]
    skipped = {row["step"]: row.get("skipped_steps") for row in rows}
    assert [skipped[step] for step in (2, 3, 8, 20)] == [0, 1, 1, 2]
    # The optimizer has not counted the steps that were left out.
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    assert rates[4] == pytest.approx(3e-3 * 3 / 5) == rates[3 - 1] * 3 / 2


@pytest.mark.parametrize("last", [3, 9, 12])
def test_a_survivor_that_is_killed_and_resumed_is_the_same(
    survivor, tiny_folder, tmp_path, bad_batches, last
):
    """Killed before the rollback, at the checkpoint that it went back to, and later.

    After a kill at step 9, the checkpoint is the one that was saved before it.
    """
    copy(survivor, tmp_path / "run", last)
    cfg = tiny.make(tiny_folder, train_out=str(tmp_path / "run"), train_skip_steps=2)
    with bad_batches([2, 8, 9]):
        done = training.train(cfg, resume=True)
    assert (done["rollbacks"], done["skipped_steps"]) == (1, 2)
    assert read(tmp_path / "run") == read(survivor)
    for (path, left), (_, right) in zip(
        arrays(tmp_path / "run", 20), arrays(survivor, 20), strict=True
    ):
        assert np.array_equal(left, right), path
    ends = [read_meta(run)["data"] for run in (tmp_path / "run", survivor)]
    assert ends[0] == ends[1] and ends[0]["next_index"] > 20


def test_a_run_whose_data_stays_bad_ends_with_one_line(
    tiny_folder, tmp_path, bad_batches
):
    cfg = tiny.make(tiny_folder, train_out=str(tmp_path / "run"))
    with (
        bad_batches(range(7, 40)),
        pytest.raises(FloatingPointError, match="^step 7 is not finite") as error,
    ):
        training.train(cfg)
    assert (
        "stopped after 2 rollbacks (train.rollbacks); the checkpoint of step 6 is good."
        in str(error.value)
    )
    assert saved_steps(tmp_path / "run/checkpoints") == [3, 6]
    assert [row["rollbacks"] for row in read(tmp_path / "run") if "rollbacks" in row]
    shutil.rmtree(tmp_path / "run")
    with (
        bad_batches(range(40)),
        pytest.raises(FloatingPointError, match="stopped, before any checkpoint"),
    ):
        training.train(cfg)


def test_a_step_that_was_left_out_may_not_hide_bad_parameters():
    results = dict(loss=np.float32(1), parameter_norm=np.float32("inf"))
    options = config.Train(skip_steps=3)
    for in_a_row in (0, 1):
        measured = training.Measured(4, results | dict(bad_in_a_row=np.int32(in_a_row)))
        with pytest.raises(rollback.BadStep, match="step 4 is not finite"):
            rollback.check(measured, options)


def test_the_annealed_delay_goes_back_too(tiny_folder, job):
    cfg = tiny.make(tiny_folder, distill_anneal_steps=4)
    inputs = StepInputs(cfg, job.mesh, None, None)
    inputs.after_step()
    saved = json.loads(json.dumps(inputs.state()))
    expected = inputs.for_step(1)
    for _ in range(4):
        inputs.after_step()
    assert not inputs.annealing and inputs.for_step(1) == ()
    inputs.restore(saved["anneal"])
    assert inputs.annealing and inputs.for_step(1) == expected


BAD_ROWS = """
import json, sys
from ladder_jax import cli
from ladder_jax.data import batches

bad, tokens = json.loads(sys.argv.pop(1))
read = batches.Rows.__getitem__

def spoiled(self, index):
    row = read(self, index)
    if self._side.tokens == tokens and index in bad:
        row["weights"][:] = float("nan")
    return row

batches.Rows.__getitem__ = spoiled
cli.main()
"""


@pytest.mark.slow
def test_two_processes_decide_the_same(survivor, tiny_folder, tmp_path, job, rows_of):
    """Each bad row is read by one of them alone; both skip, go back and end."""
    recipe = tiny.recipe(
        tiny_folder, train_out=str(tmp_path / "run"), train_skip_steps=2
    )
    bad = [rows_of[number][place] for number, place in ((2, 0), (8, 7), (9, 0))]
    command = [sys.executable, "-c", BAD_ROWS]
    command += [json.dumps([bad, job.corpus.train.tokens]), "train", recipe]
    command += ["--devices", "4", "--distributed", "--coordinator", free_address()]
    command += ["--processes", "2", "--process"]
    ended = run_together(
        [[*command, number] for number in range(2)], code_environment(fast=False)
    )
    assert [status for *_, status in ended] == [0, 0], ended
    assert "back to the checkpoint of step 9" in ended[0][0]
    ours, theirs = read(tmp_path / "run"), read(survivor)
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, rel=1e-4)
    [start] = identity.read(tmp_path / "run")
    assert start["processes"] == 2 == len(start["hosts"])
