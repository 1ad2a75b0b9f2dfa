"""The speed that a run reports: of steps alone, and never faster than they are."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
import tiny

from ladder_jax import progress, train_programs, training

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_no_step_is_reported_faster_than_it_is(tiny_folder, tmp_path, monkeypatch):
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
        cfg = tiny.make(tiny_folder, train_out=str(out), train_log_every=log_every)
        training.train(cfg)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows = [dict(step=0), *map(json.loads, lines)]
        # A time may be taken late, and the next one in time: the interval between them
        # is too short, but the one before it is too long.
        reported = [
            (row["step"] - before["step"], 8 * 32 / row["tokens_per_s"])
            for before, row in zip(rows, rows[1:])
            if "tokens_per_s" in row
        ]
        assert len(reported) >= 5
        steps, seconds = map(sum, zip(*((n, n * each) for n, each in reported)))
        assert seconds >= 0.05 * steps, reported


def test_steps_with_an_evaluation_and_a_save_are_not_faster_than_they_are(
    tiny_folder, tmp_path, monkeypatch
):
    """The row before the evaluation, and the one after it, at steps of 50 ms or more.

    Each such row is measured from the end of the last evaluation or save, where the
    host waits, so that no other row can make its time too short.
    """
    make_step, make_evaluation = training.make_step, training.make_evaluation

    def slow(make, seconds):
        def made(*arguments):
            program = make(*arguments)

            def call(*inputs):
                time.sleep(seconds)
                return jax.block_until_ready(program(*inputs))

            return call

        return made

    monkeypatch.setattr(training, "make_step", slow(make_step, 0.05))
    monkeypatch.setattr(training, "make_evaluation", slow(make_evaluation, 0.2))
    cfg = tiny.make(
        tiny_folder,
        train_out=str(tmp_path / "run"),
        train_steps=9,
        train_log_every=1000,
        train_eval_every=2,
        train_save_every=3,
    )
    training.train(cfg)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9]
    for row in rows:
        seconds = 8 * 32 / row["tokens_per_s"]
        assert seconds >= 0.05
        flops = train_programs.flops_per_step(cfg)
        assert row["mfu"] == pytest.approx(flops / seconds / (8 * 1e12))


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
