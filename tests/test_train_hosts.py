"""`ladder-jax train` and `generate` with several processes that stop or fail."""

import json
import re
import signal

import helpers
import pytest
import tiny
from workers import Workers, who

from ladder_jax.checkpoint import saved_steps
from ladder_jax.data.tokenizer import ByteTokenizer

TEXT = ByteTokenizer()
PROCESS = "N = int(sys.argv[sys.argv.index('--process') + 1])\n"
# A process in which something happens after so many steps.
AFTER_STEP = (
    """
import os, resource, signal, sys, time
from ladder_jax import training
"""
    + PROCESS
    + """
place, steps = training.to_devices, 0

def watched(*arguments):
    global steps
    steps += 1
    happen(steps)
    return place(*arguments)

training.to_devices = watched
"""
)
FULL_DISK = (
    AFTER_STEP
    + """
def happen(step):
    if N == 1 and step == 2:  # no file of this process can grow beyond this size
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
"""
)


STEPS = (
    AFTER_STEP
    + """
def happen(step):
    if N == 1 and step == 30:
        print("stepping", flush=True)
"""
)


def write_recipe(folder, **fields):
    """A run of two processes with one device each, which takes very many steps."""
    tiny.write_corpus(folder / "corpus")
    mesh = dict(mesh_data=1, mesh_fsdp=1, mesh_tensor=2)
    options = dict(train_steps=10**6, train_save_every=10**6, train_eval_every=10**6)
    return tiny.recipe(folder, **mesh | options | fields)


def test_a_signal_stops_after_the_same_step_and_a_full_disk_ends_all(tmp_path):
    recipe = write_recipe(tmp_path, train_log_every=10**6)
    out = tmp_path / "run"
    with Workers(tmp_path / "1", STEPS, arguments=["train", recipe]) as workers:
        workers.wait_for(lambda: "stepping" in workers.text(1, "out"))
        workers.processes[1].send_signal(signal.SIGTERM)
        assert workers.statuses(60) == [143, 143], workers.text(0)
        said = workers.text(0, "out")
    assert "2 processes; mesh axes across them: tensor. Warning: mesh.tensor " in said
    (step,) = re.findall(r"stopped by SIGTERM at step (\d+), saved", said)
    assert saved_steps(out / "checkpoints") == [int(step)]

    # A save that one host cannot write, in the background.
    words = ["train", recipe, "--resume", "--train.save-every", 3]
    with Workers(tmp_path / "2", FULL_DISK, arguments=words) as workers:
        assert workers.statuses(120) == [1, 1], workers.text(0)
        line = f"ladder-jax train: {who(workers, 1)} failed: checkpoint {out}"
        for number in range(2):
            last = workers.last(number)
            assert last.startswith(line), last
            assert "could not be written" in last and "are as they were" in last
    assert not (out / "lease.json").exists()


def test_generation_on_two_hosts_writes_each_row_once(tmp_path):
    run = helpers.write_engine_checkpoint(tmp_path / "run")
    prompts = [dict(prompt=[5 * i + j for j in range(4)]) for i in range(6)]
    helpers.write_rows(tmp_path / "prompts", prompts)
    words = ["generate", run, "--prompts-file", tmp_path / "prompts", "--max-tokens", 5]
    words += ["--no-fit-shapes", "--slots", 4, "--ignore-eos", "--out"]
    with Workers(tmp_path / "2", "", arguments=[*words, tmp_path / "2.out"]) as workers:
        assert workers.statuses(200) == [0, 0], workers.text(0) + workers.text(1)
        assert workers.text(0, "out") == f"done: 6 outputs in {tmp_path / '2.out'}\n"
        assert workers.text(1, "out") == ""
    rows = [json.loads(line) for line in (tmp_path / "2.out").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(6))
    for row in rows:
        prompt = prompts[row["index"]]["prompt"]
        expected = helpers.tokens_alone(prompt, max_tokens=5, vocabulary=TEXT.size)
        assert row["tokens"] == expected


def test_a_run_that_does_not_come_together_may_be_started_again(tmp_path):
    """Process 0 never starts."""
    command = [*helpers.COMMAND, "train", write_recipe(tmp_path), "--distributed"]
    command += ["--coordinator", helpers.free_address(), "--processes", 2]
    command += ["--process", 1, "--join-timeout", 1]
    [(_, text, status)] = helpers.run_together([command], helpers.code_environment())
    assert status == 75
    assert text.splitlines()[-1].endswith("did not start within 1 s")


LATE = (
    AFTER_STEP
    + """
from ladder_jax.data import corpus
prepare = corpus.prepare

def slow(*arguments):
    N == 0 and time.sleep(35)
    return prepare(*arguments)

def happen(step):
    N == 1 and step == 1 and time.sleep(35)

corpus.prepare = slow
"""
)


@pytest.mark.slow
def test_processes_may_be_late_by_more_than_gloos_30_seconds(tmp_path):
    recipe = write_recipe(tmp_path, train_steps=3)
    with Workers(tmp_path / "1", LATE, arguments=["train", recipe]) as workers:
        assert workers.statuses(300) == [0, 0], workers.text(0) + workers.text(1)
        line = "waiting for process 0: the tokens of data.source (30 s; gives up after "
        assert line in workers.text(1)
