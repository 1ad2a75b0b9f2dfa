"""What tests of training runs share: to watch, stop, copy and compare runs."""

import contextlib
import json
import re
import shutil

import helpers
import jax
import numpy as np
import pytest
import tiny
from orbax.checkpoint import v1 as ocp

from ladder_jax import model, training
from ladder_jax.checkpoint import read_meta, saved_steps

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


def assert_golden(out, steps):
    """The losses of a run of tiny.make are GOLDEN; it reported those of `steps`."""
    losses = {row["step"]: row["loss"] for row in tiny.rows(out) if "loss" in row}
    expected = {step: GOLDEN[step - 1] for step in steps}
    assert losses == pytest.approx(expected, rel=3e-5), (
        "The first 20 losses of a small run have changed. If the change was meant to "
        "alter the numbers (initialisation, the model's math, the optimizer, the order "
        "of the data), say so in its commit and replace GOLDEN. If it was not, it has "
        "a bug: look at the first step that differs. The values now:\n"
        + ", ".join(f"{loss:.6f}" for loss in losses.values())
    )


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
    assert read_meta(out, step)["data"] == read_meta(whole, step)["data"]


def copy(whole, out, last):
    """A run that was killed after its checkpoint of step `last`."""
    shutil.copytree(whole, out)
    for step in saved_steps(out / "checkpoints"):
        if step > last:
            shutil.rmtree(out / "checkpoints" / str(step))


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


# The groups of names in docs/runs.md that every run writes.
ALWAYS = ("all", "report", "evaluation")


def documented(*groups):
    """The names of metrics that docs/runs.md says are in rows of these groups."""
    text = (helpers.ROOT / "docs/runs.md").read_text().split("## Metrics")[1]
    rows = re.findall(r"^\| `(\w+)` \| ([\w.]+) \|", text, re.M)
    known = {group for _, group in rows}
    assert len(rows) > 15 and set(groups) <= known, known
    return {name for name, group in rows if group in groups}


def written(out):
    """The names in a run's metrics.jsonl."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)}
