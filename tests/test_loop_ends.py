"""An exception in the loop, or in a thread that serves it, ends the process at once.

The threads of Grain, of Orbax and of the lease run on in each case.
"""

import re
import subprocess
import sys
import time

import pytest
import tiny
from helpers import code_environment

# Runs `ladder-jax train RECIPE --devices 8`, in which KIND fails. It prints the time.
FAILING = """
import os, sys, time
from ladder_jax import cli, metrics, training
from ladder_jax.data import batches

kind, sys.argv[1:] = sys.argv[1], sys.argv[2:]

def fail(error):
    os.write(2, b"failed at %f\\n" % time.time())  # whole, from any thread
    raise error

def failing(function, error, after):
    calls = []
    def call(*arguments, **options):
        calls.append(None)
        if len(calls) > after:
            fail(error)
        return function(*arguments, **options)
    return call

make_step = training.make_step
if kind == "step":
    error = RuntimeError("the device is gone")
    training.make_step = lambda *a: failing(make_step(*a), error, 4)
if kind == "loader":
    error = OSError("the file of the corpus is gone")
    batches.Rows.__getitem__ = failing(batches.Rows.__getitem__, error, 100)
if kind == "metrics":
    error = OSError("the disk is gone")
    metrics.Metrics.write = failing(metrics.Metrics.write, error, 5)
cli.main()
"""
KINDS = {
    "step": "the device is gone",
    "loader": "the file of the corpus is gone",
    "metrics": "the disk is gone",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_process_ends_with_status_1_and_one_line(tiny_folder, tmp_path, kind):
    recipe = tiny.recipe(tiny_folder, train_out=str(tmp_path / "run"))
    ended = subprocess.run(
        [sys.executable, "-c", FAILING, kind, "train", recipe, "--devices", "8"],
        capture_output=True,
        text=True,
        env=code_environment(),
        timeout=300,
    )
    seconds = time.time() - float(re.search(r"failed at ([\d.]+)", ended.stderr)[1])
    lines = [line for line in ended.stderr.splitlines() if "failed at" not in line]
    assert ended.returncode == 1
    assert lines == [f"ladder-jax train: {KINDS[kind]}"]
    assert seconds < 60  # on an idle machine 2
    assert not (tmp_path / "run/lease.json").exists()
