"""Ctrl-C ends every command with status 130 and one line, whenever it comes."""

import contextlib
import gc
import importlib.util
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time

import absl.logging
import foreign_folder as foreign
import helpers
import pytest
import tiny

from ladder_jax import checkpoint, cli, interrupts, storage


@pytest.fixture(autouse=True)
def handler():
    """Ctrl-C as in a terminal; the test's own timer and handlers are there again."""
    received = signal.signal(signal.SIGINT, signal.default_int_handler)
    alarm = signal.getsignal(signal.SIGALRM)
    hook, thread_hook = sys.unraisablehook, threading.excepthook
    yield
    sys.unraisablehook, threading.excepthook = hook, thread_hook
    for logger in interrupts._reporters():
        logger.removeFilter(interrupts._drop)
    assert signal.getsignal(signal.SIGALRM) is alarm
    signal.signal(signal.SIGINT, received)


def press():
    signal.raise_signal(signal.SIGINT)


def work(seconds=20.0):
    """Python code that an interrupt should end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


# ---------------------------------------------------------------- the mechanism


def test_an_interrupt_waits_for_callbacks_of_the_garbage_collection():
    seen = []

    def inner():
        press()
        seen.append("the callback has returned")

    def callback(phase, info):
        if phase == "start" and not seen:
            inner()

    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.InsistentInterrupt():
            gc.collect()
            seen.append("the collection, too")
            work()
    finally:
        gc.callbacks.remove(callback)
    assert len(seen) == 2
    # JAX has one, where an exception may end the process.
    assert "_xla_gc_callback" in {c.__name__ for c in gc.callbacks}


def lose():
    """Python ignores an exception in such a method."""

    class Lossy:
        def __del__(self):
            press()

    Lossy()


def swallow():
    try:
        press()
    except BaseException:
        pass


@pytest.mark.parametrize("way", [lose, swallow])
def test_an_interrupt_that_gets_lost_comes_again(way, capfd):
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts.InsistentInterrupt():
        way()
        work()
    assert 0.5 < time.monotonic() - start < 15
    work(1.5)  # nothing comes after the end
    assert capfd.readouterr().err == ""  # and Python says nothing about the lost one


def logged():
    """As a thread of Orbax does whose work an interrupt broke."""
    absl.logging.exception("broken")


def raised():
    raise RuntimeError("broken")


@pytest.mark.parametrize("pressed", [True, False])
@pytest.mark.parametrize("way", [logged, raised])
def test_threads_do_not_report_what_an_interrupt_broke(
    way, pressed, capfd, monkeypatch
):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda lost: seen.append(lost))
    monkeypatch.setattr(absl.logging.get_absl_logger(), "callHandlers", seen.append)
    thread = threading.Thread(target=way)
    with contextlib.suppress(KeyboardInterrupt), interrupts.InsistentInterrupt():
        if pressed:
            press()
    with interrupts.InsistentInterrupt():
        thread.start()
        thread.join()
    assert bool(seen) != pressed
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seconds, ends", [(5.0, True), (0.0, False)])
def test_an_interrupt_waits_for_an_import(tmp_path, monkeypatch, seconds, ends):
    """It waits up to IMPORT_SECONDS."""
    (tmp_path / "slow_to_import.py").write_text(
        "import signal, sys\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "sys.imported_to_its_end = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "imported_to_its_end", False, raising=False)
    monkeypatch.delitem(sys.modules, "slow_to_import", raising=False)
    monkeypatch.setattr(interrupts, "IMPORT_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt), interrupts.InsistentInterrupt():
        import slow_to_import  # noqa: F401

        work(5)
    assert sys.imported_to_its_end == ends


def test_cleanup_that_takes_long_is_not_disturbed():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.InsistentInterrupt():
        try:
            press()
        finally:
            work(2.5)
            done.append("cleanup")
    assert done


def test_a_second_interrupt_ends_cleanup():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.InsistentInterrupt():
        try:
            press()
        finally:
            press()
            done.append("cleanup")
    assert not done


def test_other_errors_are_reported_and_handlers_restored(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: seen.append(lost.exc_type))
    hook, before = sys.unraisablehook, signal.getsignal(signal.SIGINT)

    class Broken:
        def __del__(self):
            raise ValueError("of another kind")

    with interrupts.InsistentInterrupt():
        Broken()
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) is before and sys.unraisablehook is hook
    assert seen == [ValueError]


def test_where_ctrl_c_is_ignored_it_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.InsistentInterrupt() as interrupt:
        press()
    assert not interrupt.pressed
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


# ---------------------------------------------------------------- the command line


def test_an_error_that_an_interrupt_became_is_the_interrupt(monkeypatch, capsys):
    def translated(words):
        try:
            press()
        except KeyboardInterrupt as error:  # as C++ does, between Python and Python
            raise RuntimeError(
                "INTERNAL: CpuCallback error: KeyboardInterrupt"
            ) from error

    monkeypatch.setitem(cli.COMMANDS, "inspect", translated)
    assert cli.run(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "ladder-jax inspect: interrupted\n"


@pytest.mark.parametrize("name", ["inspect", "serve", "train"])
def test_a_command_ends_at_ctrl_c(monkeypatch, capsys, name):
    """Also one that has handlers of its own later, as `serve` and `train`."""
    before = signal.getsignal(signal.SIGINT)

    def press(words):
        with contextlib.suppress(KeyboardInterrupt):  # as a library may do
            signal.raise_signal(signal.SIGINT)
        time.sleep(10)

    monkeypatch.setitem(cli.COMMANDS, name, press)
    started = time.monotonic()
    assert cli.run([name]) == 130
    assert time.monotonic() - started < 8
    assert capsys.readouterr().err == f"ladder-jax {name}: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("pressed", [True, False])
def test_an_interrupt_is_no_reason_to_take_another_checkpoint(
    tmp_path, monkeypatch, caplog, pressed
):
    """Libraries make another error of it, with or without the interrupt as a cause."""
    error = OSError("the file cannot be read")
    if not pressed:
        error.__cause__ = interrupts.Interrupted(interrupts.InsistentInterrupt())

    def read(path):
        with checkpoint._reading("arrays"):
            if pressed:
                swallow()
            raise error

    with pytest.raises(KeyboardInterrupt), interrupts.InsistentInterrupt():
        checkpoint.newest([tmp_path / "2", tmp_path / "1"], read)
    assert not caplog.records


def test_an_interrupt_is_no_reason_to_ask_a_store_again():
    tries, said = [], []

    def ask():
        tries.append(1)
        swallow()
        raise OSError("the connection is lost")

    with pytest.raises(KeyboardInterrupt), interrupts.InsistentInterrupt():
        storage.tried(ask, "s3://bucket", said.append)
    assert len(tries) == 1 and not said


# ---------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The files that the commands below read."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_corpus(folder / "corpus")
    tiny.recipe(folder, train_out="run", train_steps=30, mesh_data=1, mesh_fsdp=1)
    foreign.write(folder / "hub", hidden_size=64, intermediate_size=128)
    tiny.write_run(folder / "run")
    (folder / "long.txt").write_text("some words " * 3000)
    helpers.write_rows(
        folder / "prompts.jsonl",
        [dict(prompt=f"The {number}", max_tokens=40) for number in range(24)],
    )
    return folder


def words_of(folder):
    """The commands, by what they are called here."""
    run = folder / "run"
    prompts = folder / "prompts.jsonl"
    return {
        "generate": ["generate", run, "--prompt", "The ", "--max-tokens", 200],
        "prompts": ["generate", run, "--prompts-file", prompts, "--out", "o.jsonl"],
        "eval": ["eval", run, "--data", folder / "long.txt", "--stride", 8],
        "tokenizer": ["tokenizer", "builtin", "--vocab-size", 512, "--out", "t.json"],
        "tokenize": [
            *("tokenize", folder / "recipe.py", "--data.source", "builtin"),
            *("--data.token-cache", "cache"),
        ],
        "inspect": ["inspect", run],
        "from-hf": ["convert", "from-hf", folder / "hub", "out"],
        "to-hf": ["convert", "to-hf", run, "out", "--shard-size", "20kB"],
        "ladderize": ["convert", "ladderize", run, "out", "--layers", "auto:1"],
        "train": ["train", folder / "recipe.py", "--mesh.tensor", 1],
        "bench decode": [
            *"bench decode --workload uniform --load saturated --json d.json".split()
        ],
        "bench train": [
            *"bench train --alone --sizes tiny --rounds 40 --seconds 0.2".split()
        ],
        "plan": ["plan", helpers.ROOT / "configs/demo.py", "--target", "v5e:2x4"],
    }


NAMES = tuple(words_of(helpers.ROOT))
# What the files may hold that a run leaves, whole or interrupted.
KEPT = re.compile(
    r"\.out\.part/(model-.*\.safetensors|(ex|im)port\.json|unfinished/.*)"
    r"|run/.*|o\.jsonl|cache/tokens-.*"
)
# What prometheus_client prints if its import is interrupted.
GENERATED = r"Error in generated code:\n(?: *(?:def|return) .*\n|\s*\n)*"


def interrupt(tmp_path, inputs, name, moments):
    """Interrupts a command at these moments, and checks what it says and leaves."""
    if name == "plan" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("plan compiles with libtpu")
    words = list(map(str, words_of(inputs)[name]))
    script = [sys.executable, helpers.ROOT / "tests" / "interrupted.py"]
    done = subprocess.run(
        list(map(str, [*script, tmp_path / "cwd", ",".join(moments), *words])),
        env=helpers.code_environment(),
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-2000:]
    whole, *others = json.loads(done.stdout)
    assert whole["status"] == 0, whole["err"]
    line = f"ladder-jax {words[0]}: interrupted\n"
    for moment, result in zip(moments, others):
        said = re.sub(GENERATED, "", result["err"])
        where = f"{name} at {moment}: {result['status']} {said[-2000:]}"
        for text in ("Traceback", "Exception ignored", "Fatal", "Error"):
            assert text not in said, where
        if name == "train":  # it saves: tests/test_train.py
            assert result["status"] in (0, 130), where
        elif result["status"] == 130:
            assert said.endswith(line), where
            assert said.count("interrupted") == 1, where
            check_files(result["files"], whole["files"], where)
        else:  # it had ended, and Python was about to
            assert result["status"] in (0, -signal.SIGINT), where
            assert names(result["files"]) == names(whole["files"]), where
    return [result["status"] for result in others]


def names(files):
    """The names of files; TensorStore draws those of the arrays' data at random."""
    return {re.sub(r"/d/[0-9a-f]{32}$", "/d/data", name) for name in files}


def check_files(files, whole, where):
    """Nothing is half-written."""
    for name in names(files):
        assert name in names(whole) or KEPT.fullmatch(name), f"{where}: {name}"
    for name, text in files.items():
        if name == "o.jsonl":
            assert text == "" or text.endswith("\n"), where
            assert all("text" in json.loads(line) for line in text.splitlines()), where
    out = {name for name in names(files) if name.startswith("out/")}
    assert not out or out == names(whole), where
    for name in ("t.json", "d.json"):
        if name in files:
            json.loads(files[name])


@pytest.mark.parametrize("name", ["generate", "from-hf", "to-hf"])
def test_ctrl_c_in_some_commands(tmp_path, inputs, name):
    interrupt(tmp_path, inputs, name, ["0.5"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_in_every_command_at_many_moments(tmp_path, inputs, name):
    moments = [f"{(i + random.random()) / 12:.3f}" for i in range(12)]
    statuses = interrupt(tmp_path, inputs, name, moments)
    assert statuses.count(130) >= 6, statuses
