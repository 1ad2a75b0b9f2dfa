"""A run that a signal, a kill, a full disk or a bad step stops continues bit for bit as
if it had not stopped.
"""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from helpers import code_environment
from train_runs import arrays, assert_same_run, at_step, copy, watched

from ladder_jax import training
from ladder_jax.checkpoint import saved_steps

pytestmark = pytest.mark.usefixtures("fast_compiler")


@pytest.mark.parametrize("name, step", [("SIGTERM", 5), ("SIGINT", 12)])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    whole, tiny_folder, tmp_path, name, step, capfd
):
    cfg = tiny.make(tiny_folder, train_out=str(tmp_path / "run"))
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
    tiny_folder, tmp_path, monkeypatch
):
    make_evaluation = training.make_evaluation

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_evaluation(*arguments)

    monkeypatch.setattr(training, "make_evaluation", interrupted)
    done = training.train(tiny.make(tiny_folder, train_out=str(tmp_path / "run")))
    assert (done["step"], done["stopped"], done["saved"]) == (0, "SIGTERM", False)
    assert saved_steps(tmp_path / "run/checkpoints") == []


def test_a_signal_right_after_resuming_keeps_what_was_saved(
    whole, tiny_folder, tmp_path, monkeypatch
):
    copy(whole, tmp_path / "run", 9)
    make_evaluation = training.make_evaluation

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return make_evaluation(*arguments)

    monkeypatch.setattr(training, "make_evaluation", interrupted)
    done = training.train(
        tiny.make(tiny_folder, train_out=str(tmp_path / "run")), resume=True
    )
    assert (done["step"], done["stopped"], done["saved"]) == (9, "SIGHUP", True)
    assert saved_steps(tmp_path / "run/checkpoints") == [3, 6, 9]


def test_a_run_of_3_billion_steps_ends_when_it_is_stopped(tiny_folder, tmp_path):
    """No schedule or order is an array over the steps of the run."""
    cfg = tiny.make(
        tiny_folder,
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


def test_a_signal_in_the_last_step_is_the_end(whole, tiny_folder, tmp_path):
    with at_step(2, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        done = training.train(
            tiny.make(
                tiny_folder,
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
            tiny.make(tiny_folder, train_out=str(tmp_path / "end")), resume=True
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


def test_killed_at_random_moments(whole, tiny_folder, tmp_path):
    """Five SIGKILLs in one run, some in the middle of a save and some between saves."""
    recipe = tiny.recipe(tiny_folder, train_out=str(tmp_path / "run"))
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, recipe, tmp_path / "run", "5"],
        capture_output=True,
        text=True,
        env=code_environment(),
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path / "run", whole)


def test_a_step_that_is_not_finite_stops_the_run(whole, tiny_folder, tmp_path, capfd):
    cfg = tiny.make(
        tiny_folder,
        train_out=str(tmp_path / "run"),
        train_log_every=20,
        train_rollbacks=0,
    )
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
    training.train(tiny.make(tiny_folder, train_out=str(tmp_path / "run")), resume=True)
    assert (
        arrays(tmp_path / "run", 20)[-1][1].tobytes()
        == arrays(whole, 20)[-1][1].tobytes()
    )


def test_a_full_disk_ends_the_run_and_the_rest_is_good(
    whole, tiny_folder, tmp_path, capfd
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = tiny.make(tiny_folder, train_out=str(tmp_path / "run"))

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
