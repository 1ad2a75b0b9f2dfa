"""`ladder-jax train` as a process: its output on a terminal, in a pipe and nowhere,
signals, and several processes that are one run.
"""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest
import tiny
from helpers import COMMAND, code_environment, free_address, run_together
from train_runs import assert_golden

from ladder_jax.checkpoint import read_meta, saved_steps


@pytest.fixture(scope="module")
def trained(tiny_folder):
    """(folder, stdout, text on the terminal) of a run of 20 steps, of trained.py."""
    path = tiny.recipe(
        tiny_folder,
        train_out=str(tiny_folder / "trained"),
        train_sample_tokens=20,
        train_log_every=5,
    ).rename(tiny_folder / "trained.py")
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    child = subprocess.Popen(
        [*COMMAND, "train", path, "--devices", "8"],
        env=code_environment(fast=False),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    os.close(stderr)
    terminal_text = b""
    while True:
        try:
            terminal_text += os.read(terminal, 1 << 16)
        except OSError:  # the child has closed its end
            break
    out = child.communicate(timeout=300)[0]
    assert child.returncode == 0, terminal_text
    return tiny_folder / "trained", out, terminal_text.decode()


def test_a_run_at_a_terminal_shows_its_progress_there(trained):
    folder, stdout, terminal_text = trained
    lines = stdout.splitlines()
    assert re.match(
        r"data.source='.*corpus': train 31 documents, .* tokens; held out 9 documents",
        lines[0],
    )
    assert lines[1] == (
        "37,536 parameters, ladder residual, float32, "
        "mesh data=2 x fsdp=2 x tensor=2 of cpu"
    )
    assert re.fullmatch(
        r"step 5/20  loss 5\.\d{4}  grad norm \d\.\d{3}  lr 3.00e-03  "
        r"[\d,]+ tok/s  MFU \d+\.\d%  "
        r"\d+m\d\ds left  \(last save \d+\.\ds\)",
        next(line for line in lines if line.startswith("step 5/20")),
    )
    assert re.search(
        r"\nstep 20/20  held-out loss 3\.\d{4}, 5\.\d{3} bits per byte  "
        r"\(evaluated in \d+\.\ds\)\n---- the model writes:\n",
        stdout,
    )
    assert re.fullmatch(
        r"done: 20 steps, held-out 5\.\d\d\d bits per byte, "
        rf"checkpoints in {folder}/checkpoints, "
        rf"loss curve {folder}/loss.png",
        lines[-1],
    )
    assert "20/20" in terminal_text
    assert re.search("step/s|s/step", terminal_text)  # a fast or a slow machine
    assert not re.search("warning|error|traceback", terminal_text.lower())
    # Those of the compiler that users have; in test_train.py, of a faster one.
    assert_golden(folder, [3, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20])


def test_a_finished_run_can_be_resumed_but_not_started_again_or_changed(
    command, wrong, trained, tiny_folder
):
    out = trained[0]
    path = tiny_folder / "trained.py"
    assert re.search(
        "already holds a run, at step 20: continue it with --resume, "
        "or choose another --train.out",
        wrong("train", path),
    )
    assert wrong("train", path, "--resume", "--model.ffn-dim", 128).startswith(
        "model.ffn_dim was 64 in the run"
    )
    status, stdout, err = command("train", path, "--resume", "--train.sample-tokens", 0)
    assert (status, err) == (0, "")
    assert f"\ndone: 20 steps, checkpoints in {out}/checkpoints, loss curve" in stdout


def test_a_checkpoint_of_other_shapes_is_one_line(command, tiny_folder, trained):
    """The config agrees, and only Orbax's description of the arrays shows the error."""
    path = tiny.recipe(tiny_folder, train_out=str(trained[0]))
    meta = trained[0] / "checkpoints/20/meta/data.json"
    text = meta.read_text()
    changed = re.sub('"ffn_dim": ?64', '"ffn_dim": 128', text)
    assert changed != text
    meta.write_text(changed)
    try:
        arguments = "train", path, "--resume", "--model.ffn-dim", 128
        status, _, err = command(*arguments)
    finally:
        meta.write_text(text)
    assert status == 1 and err.count("\n") == 1
    assert "is a checkpoint of another model or optimizer: model/layers/" in err


def test_ctrl_c_and_resume(tiny_folder, trained, tmp_path):
    """A pipe gets each line at once. The last line has the command that continues."""
    path = tiny.recipe(tiny_folder, train_out=str(tmp_path / "run"))
    arguments = ["train", path, "--devices", "8", "--train.log-every", "5"]
    child = subprocess.Popen(
        [*COMMAND, *arguments],
        env=code_environment(fast=False),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first_lines = ""
    while "step 6/20" not in first_lines:
        first_lines += child.stdout.readline()
    child.send_signal(signal.SIGINT)
    rest, err = child.communicate(timeout=120)
    assert (
        child.returncode == 130
        and err == "\nSIGINT: stopping after this step; repeat it to stop at once\n"
    )
    again = re.fullmatch(
        rf"stopped by SIGINT at step \d+, saved in {tmp_path}/run: "
        r"continue with ladder-jax (.*)",
        rest.splitlines()[-1],
    )[1].split()
    assert again == [*map(str, arguments), "--resume"]
    ended = subprocess.run(
        [*COMMAND, *again],
        env=code_environment(fast=False),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0 and ended.stderr == ""
    assert tiny.rows(tmp_path / "run") == tiny.rows(trained[0])


# ---------------------------------------------------------------- signals, bad output

# The terminal that is standard input becomes the controlling terminal of the command.
IN_TERMINAL = [
    sys.executable,
    "-c",
    "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from ladder_jax.cli import main; main()",
]
ENDLESS = ["--devices", "8", "--train.steps", "3e9", "--train.log-every", "1"]


@contextlib.contextmanager
def endless(tiny_folder, tmp_path, command=COMMAND, **options):
    """A process that trains for ever, once it has written some rows; killed at exit."""
    path = tiny.recipe(tiny_folder, train_out=str(tmp_path / "run"))
    path = path.rename(tmp_path / "endless.py")
    child = subprocess.Popen(
        [*command, "train", path, *ENDLESS],
        env=code_environment(),
        text=True,
        **options,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < 4:
            assert child.poll() is None, "the run ended before its fourth row"
            time.sleep(0.05)
        yield child
    finally:
        child.kill()
        child.wait()


def assert_saved(tmp_path):
    """The newest checkpoint is of the last step that the run reported."""
    out = tmp_path / "run"
    step = max(row["step"] for row in tiny.rows(out))
    assert saved_steps(out / "checkpoints")[-1] == step
    assert read_meta(out)["config"]["train"]["steps"] == 3_000_000_000


def test_ctrl_c_saves_although_the_reader_of_the_output_dies_of_it_too(
    tiny_folder, tmp_path
):
    """`ladder-jax train ... 2>&1 | tee log`: Ctrl-C ends `tee` first."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with endless(tiny_folder, tmp_path, **pipes) as child:
        child.stdout.close()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=120) == 130
    assert_saved(tmp_path)


def test_a_terminal_that_closes_saves(tiny_folder, tmp_path):
    """The kernel sends SIGHUP, and both streams fail from then on."""
    terminal, stream = pty.openpty()
    streams = dict(stdin=stream, stdout=stream, stderr=stream, start_new_session=True)
    with endless(tiny_folder, tmp_path, IN_TERMINAL, **streams) as child:
        os.close(stream)
        os.close(terminal)
        child.send_signal(signal.SIGHUP)  # as shells do once more
        assert child.wait(timeout=120) == 129
    assert_saved(tmp_path)


def test_a_run_outlives_its_reader(tiny_folder, trained, tmp_path):
    """`ladder-jax train ... | head -3`: the run goes on, and ends as without `head`."""
    path = tiny.recipe(tiny_folder, train_out=str(tmp_path / "run"))
    child = subprocess.Popen(
        [*COMMAND, "train", path, "--devices", "8"],
        env=code_environment(fast=False),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(timeout=120) == 0
    assert tiny.rows(tmp_path / "run")[-1] == tiny.rows(trained[0])[-1]
    assert saved_steps(tmp_path / "run/checkpoints")[-1] == 20


def test_a_run_without_standard_streams(tiny_folder, trained, tmp_path):
    """No file of the run takes the number of a stream: its checkpoints stay whole."""
    path = tiny.recipe(tiny_folder, train_out=str(tmp_path / "run"))
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    command = [*closed, *COMMAND, "train", path, "--devices", "8"]
    environment = code_environment(fast=False)
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert tiny.rows(tmp_path / "run")[-1] == tiny.rows(trained[0])[-1]
    assert saved_steps(tmp_path / "run/checkpoints")[-1] == 20


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_cannot_be_written_changes_no_status(recipe):
    """The status still says whether the command has failed."""
    for words, status in ((["train", "none.py"], 2), (["train", recipe], 0)):
        with open("/dev/full", "w") as full:
            ended = subprocess.run(
                [*COMMAND, *words, "--devices", "8", "--train.steps", "1"],
                env=code_environment(),
                stdout=full,
                stderr=full,
            )
        assert ended.returncode == status


# ---------------------------------------------------------------- several processes


def together(arguments, act=lambda children: None):
    """(stdout, stderr, status) of each of two processes of one run, with four devices
    each.
    """
    command = [*COMMAND, "train", *arguments, "--devices", "4", "--distributed"]
    command += ["--coordinator", free_address(), "--processes", "2"]
    ended = run_together(
        [[*command, "--process", number] for number in range(2)],
        code_environment(fast=False),
        act,
    )
    # Gloo, the library of collectives for CPUs, writes lines of its own.
    return [
        (re.sub(r"(?m)^\[Gloo\].*\n", "", out), err, status)
        for out, err, status in ended
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(), dict(mesh_data=1, mesh_fsdp=1, mesh_tensor=8)]
)
def test_two_processes_are_one_run(tiny_folder, trained, tmp_path, mesh):
    """Two processes have the losses of one. A signal to one of them stops both, and
    both resume.
    """
    path = tiny.recipe(
        tiny_folder,
        train_out=str(tmp_path / "run"),
        train_log_every=5,
        train_sample_tokens=5,
        **mesh,
    )

    def stop(children):
        while (
            time.sleep(0.05)
            or not (tmp_path / "run/metrics.jsonl").exists()
            or len(tiny.rows(tmp_path / "run")) < 2
        ):
            assert children[0].poll() is None, children[0].communicate()
        children[1].send_signal(signal.SIGTERM)

    first, second = together([path], stop)
    assert first[2] == second[2] == 143, (first, second)
    (step,) = re.findall(r"stopped by SIGTERM at step (\d+), saved", first[0])
    assert second[0] == ""
    first, second = together([path, "--resume"])
    assert first[2] == second[2] == 0, (first, second)
    assert f"resumed at step {step} of 20" in first[0] and "done: 20 steps" in first[0]
    rows, expected_rows = tiny.rows(tmp_path / "run"), tiny.rows(trained[0])
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    meta = json.loads((tmp_path / "run/checkpoints/20/meta/data.json").read_text())
    assert meta["tensor"] == mesh.get("mesh_tensor", 2)
