"""A run that stops on some number of processes goes on on another one."""

import itertools

import pytest
import tiny
from helpers import COMMAND, code_environment, free_address, run_together

DEVICES = 8


def train(path, processes, *words):
    """Runs the recipe `path` on so many processes, which have DEVICES devices."""
    command = [*COMMAND, "train", path, *words]
    command += ["--devices", DEVICES // processes]
    if processes > 1:
        command += ["--distributed", "--coordinator", free_address()]
        command += ["--processes", processes]
    one = [] if processes == 1 else ["--process"]
    commands = [
        [*command, *itertools.chain(*([name, i] for name in one))]
        for i in range(processes)
    ]
    ended = run_together(commands, code_environment())
    assert [status for *_, status in ended] == [0] * processes, ended
    return ended[0][0]


# Every change of the number of processes between 1, 2 and 4.
COUNTS = (1, 2, 4, 1, 4, 2, 1)
EACH = 2  # steps


@pytest.mark.slow
def test_any_number_of_processes_goes_on_with_a_run(tmp_path):
    tiny.write_corpus(tmp_path / "corpus")
    path = tiny.recipe(
        tmp_path, optimizer_lr_schedule="constant", optimizer_warmup_steps=0
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    last = EACH * len(COUNTS)
    train(path, 1, "--train.out", whole, "--train.steps", last)
    for number, count in enumerate(COUNTS):
        steps = EACH * (number + 1)
        words = ["--train.out", run, "--train.steps", steps]
        out = train(path, count, *words, *(["--resume"] if number else []))
        assert number == 0 or f"resumed at step {steps - EACH} of {steps}" in out
    losses = lambda out: {r["step"]: r["loss"] for r in tiny.rows(out) if "loss" in r}
    assert len(losses(run)) == last
    # Other rows would change a loss by a hundredth. The sums of several processes are
    # rounded in another order.
    assert losses(run) == pytest.approx(losses(whole), rel=2e-5)
