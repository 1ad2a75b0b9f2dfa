"""launch/local.sh and launch/again.sh, with real processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from helpers import COMMAND, ROOT, code_environment

LOCAL, AGAIN = ROOT / "launch" / "local.sh", ROOT / "launch" / "again.sh"

# A process of a run. Process 1 does what its first argument says; the others wait for
# a signal, and say which they got.
PROCESS = """\
import os, signal, sys, time
what, number = sys.argv[1], int(sys.argv[-1])
def end(signal_number, frame):
    print("saved after", signal.Signals(signal_number).name, flush=True)
    sys.exit(128 + signal_number)
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), end)
if what == "deaf" and number != 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("begins", *sys.argv[2:], os.environ.get("JAX_LOCAL_DEVICE_IDS"), flush=True)
if what == "ends":
    print("a line of stderr", file=sys.stderr)
    print("no newline", end="")
    sys.exit(0)
while not all(os.path.exists(f"{os.environ['PLACE']}/{i}") for i in range(3)):
    open(f"{os.environ['PLACE']}/{number}", "w")
    time.sleep(0.05)
if number == 1 and what in ("fails", "deaf"):
    sys.exit(7)
if number == 1 and what == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("waits", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """Starts local.sh with three processes that do `what`."""
    (tmp_path / "process.py").write_text(PROCESS)
    started = []

    def run(what, *words, **variables):
        child = subprocess.Popen(
            [*words, LOCAL, "3", "--", sys.executable, tmp_path / "process.py", what],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PLACE": str(tmp_path), **variables},
        )
        started.append(child)
        return child

    yield run
    for child in started:
        if child.poll() is None:
            child.terminate()


def read_until(child, text, count=1):
    """The lines of a child, up to the one that holds `text` for the `count`th time."""
    lines = []
    for line in child.stdout:
        lines.append(line.rstrip("\n"))
        if sum(text in line for line in lines) == count:
            return lines
    raise AssertionError(f"no {text!r} in {lines}")


def test_each_process_has_its_number_its_gpu_and_a_label(start):
    child = start("ends")
    lines = child.communicate(timeout=120)[0].splitlines()
    assert child.returncode == 0
    for i in range(3):
        own = [line for line in lines if line.startswith(f"[{i}] ")]
        assert len(own) == 3 and {f"[{i}] a line of stderr"} < set(own)
        (options,) = [line for line in own if "begins" in line]
        assert re.fullmatch(
            rf"\[{i}\] begins --distributed --coordinator 127.0.0.1:\d+ "
            rf"--processes 3 --process {i} {i}",
            options,
        )
    assert sum("no newline" in line for line in lines) == 3


@pytest.mark.parametrize(
    "what, status", [("fails", 7), ("is killed", 128 + signal.SIGKILL)]
)
def test_a_process_that_fails_ends_the_others(start, what, status):
    child = start(what)
    text = child.communicate(timeout=120)[0]
    assert child.returncode == status
    assert f"process 1 ended with status {status}: ending the others" in text
    for i in (0, 2):
        assert f"[{i}] saved after SIGTERM" in text
    assert "Killed" not in text  # bash reports it with the whole command


def test_a_process_that_ignores_sigterm_is_killed(start):
    child = start("deaf", GRACE="1")
    child.communicate(timeout=120)
    assert child.returncode == 7


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("words", [[], [AGAIN]], ids=["alone", "in again.sh"])
def test_a_signal_reaches_every_process(start, name, words):
    child = start("waits", *words)
    read_until(child, "waits", 3)
    child.send_signal(getattr(signal, name))
    text = child.communicate(timeout=120)[0]
    assert child.returncode == 128 + getattr(signal, name)
    assert sorted(text.splitlines()) == [f"[{i}] saved after {name}" for i in range(3)]


def test_the_processes_of_several_machines_have_numbers_of_one_run(start):
    children = [
        start("ends", NODES="2", NODE=str(node), COORDINATOR="here:1")
        for node in range(2)
    ]
    text = "".join(child.communicate(timeout=120)[0] for child in children)
    numbers = re.findall(r"here:1 --processes 6 --process (\d) (\d)", text)
    assert sorted(numbers) == [(str(i), str(i % 3)) for i in range(6)]


@pytest.mark.parametrize(
    "words, variables, message",
    [
        ([], {}, "usage: launch/local.sh N -- COMMAND"),
        (["2", "true"], {}, "usage: "),
        (["0", "--", "true"], {}, "usage: "),
        (["2", "--", "true"], {"NODES": "2"}, "COORDINATOR: HOST:PORT"),
    ],
)
def test_local_says_what_is_missing(words, variables, message):
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [LOCAL, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- again.sh


def run_again(folder: Path, *statuses: int, **variables):
    """Runs a command that ends with one of `statuses` after the other."""
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    command = (
        'read -r status <statuses; sed -i 1d statuses; [ "$status" != 137 ] || '
        'kill -KILL $$; exit "$status"'
    )
    done = subprocess.run(
        [AGAIN, "bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PAUSE": "0", **variables},
        timeout=120,
    )
    left = len((folder / "statuses").read_text().splitlines())
    return done.returncode, len(statuses) - left, done.stderr


@pytest.mark.parametrize("last", [0, 1, 2, 74])
def test_a_command_runs_again_while_that_can_help(tmp_path, last):
    status, runs, _ = run_again(tmp_path, 75, 137, 143, 130, last, 0)
    assert (status, runs) == (last, 5)


def test_restarts_have_a_limit(tmp_path):
    status, runs, text = run_again(tmp_path, 75, 75, 75, 75, RESTARTS="2")
    assert (status, runs) == (75, 3)
    assert "status 75, after 2 restarts: giving up" in text


def test_a_signal_ends_the_pause(tmp_path):
    child = subprocess.Popen(
        [AGAIN, "bash", "-c", "exit 75"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PAUSE": "600"},
    )
    assert "again in 600 s" in child.stderr.readline()
    time.sleep(0.2)  # until it sleeps; a signal before that ends it, too
    child.terminate()
    child.communicate(timeout=120)
    assert child.returncode == 75


def processes(*last: str, of: str) -> list[int]:
    """The processes whose command ends with the words `last` and holds `of`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words = path.read_text().split("\0")[:-1]
            if words[-len(last) :] == [*last] and any(of in word for word in words):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_run_whose_process_was_killed_goes_on_to_its_end(tiny_folder, tmp_path):
    """Two processes train; one is killed; again.sh starts both, and they resume."""
    recipe = tiny.recipe(
        tiny_folder,
        train_out=str(tmp_path / "run"),
        train_steps=300,
        train_save_every=20,
        train_sample_tokens=0,
        mesh_data=1,
        mesh_fsdp=1,
        mesh_tensor=2,
    )
    options = ["--train.out", tmp_path / "run", "--devices", "1", "--resume"]
    words = [AGAIN, LOCAL, "2", "--", *COMMAND, "train", recipe, *options]
    child = subprocess.Popen(
        [*map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=code_environment() | {"PAUSE": "1", "GRACE": "10"},
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    end = time.monotonic() + 500
    while not (checkpoints / "20").exists():
        assert child.poll() is None and time.monotonic() < end, child.stdout.read()
        time.sleep(0.1)
    (process,) = processes("--process", "1", of=str(tmp_path))
    os.kill(process, signal.SIGKILL)
    text = child.communicate(timeout=500)[0]
    assert child.returncode == 0, text
    assert "again.sh: status 137: again" in text and "[0] resumed at step" in text
    assert (checkpoints / "300").exists()
