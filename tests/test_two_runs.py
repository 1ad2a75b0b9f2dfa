"""Two `ladder-jax train` in one train.out: one is refused, and harms nothing."""

import os
import re
import signal
import subprocess
import time

import pytest
import tiny
from helpers import COMMAND, code_environment, free_address, run_together
from train_runs import assert_golden

from ladder_jax.checkpoint import saved_steps

STEPS = range(1, 21)
REFUSALS = (
    "writes there. Choose another one or end that process",
    "already holds a run",  # the other one is further, or done
    "another job wrote checkpoints to",
)


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """A run of 20 steps on one device for each process; it is tmp_path/run."""

    def write(processes):
        mesh = dict(mesh_data=1, mesh_fsdp=processes, mesh_tensor=1)
        options = dict(train_out=str(tmp_path / "run"), train_keep_checkpoints=2)
        return tiny.recipe(tiny_folder, **mesh, **options, train_sample_tokens=0)

    return write


def commands(path, processes, *words):
    """The commands of the processes of one run."""
    command = [*COMMAND, "train", path, "--devices", 1, *words]
    if processes == 1:
        return [command]
    command += ["--distributed", "--coordinator", free_address()]
    command += ["--processes", processes, "--process"]
    return [[*command, number] for number in range(processes)]


def check_two(path, processes, out, *words):
    """Of two runs that start at the same time, one is refused and one completes."""
    both = [*commands(path, processes, *words), *commands(path, processes, *words)]
    ended = run_together(both, code_environment())
    statuses = [status for *_, status in ended]
    runs = [statuses[:processes], statuses[processes:]]
    assert sorted(runs) == [[0] * processes, [2] * processes], ended
    for _, text, status in ended:
        if status == 2:
            lines = [line for line in text.splitlines() if "ladder-jax train: " in line]
            assert len(lines) == 1 and str(out) in lines[0], text
            assert any(refusal in lines[0] for refusal in REFUSALS), text
    assert_golden(out, STEPS)
    assert saved_steps(out / "checkpoints") == [18, 20]
    assert not (out / "lease.json").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_of_two_new_runs_one_is_refused(recipe, tmp_path, processes):
    check_two(recipe(processes), processes, tmp_path / "run")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_of_two_resumed_runs_one_is_refused(recipe, tmp_path, processes):
    """The run before them was killed, and holds the lease in the folder."""
    path, out = recipe(processes), tmp_path / "run"
    children = [
        subprocess.Popen(
            [*map(str, command)],
            env=code_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in commands(path, processes)
    ]
    end = time.monotonic() + 300
    while not saved_steps(out / "checkpoints"):
        assert time.monotonic() < end and children[0].poll() is None
        time.sleep(0.01)
    for child in children:
        child.kill()
    for child in children:
        assert child.wait() == -signal.SIGKILL
    holder = (out / "lease.json").read_text()
    assert re.search(rf'"pid": {children[0].pid}\b', holder), holder
    assert os.listdir(out / "checkpoints")
    check_two(path, processes, out, "--resume")
