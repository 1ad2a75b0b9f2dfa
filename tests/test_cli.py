"""The command: a mistake is one clear line, a terminal shows progress, several
processes are one run, and the exit status says how a run ended.
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

import jax
import pytest
import tiny
import tokenizers
from helpers import COMMAND, free_address, run_together
from tokenizers import models

from ladder_jax import cli
from ladder_jax.checkpoint import read_meta, saved_steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    tiny.write_corpus(path / "corpus")
    return path


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with tiny.compiled_once(tmp_path_factory.mktemp("compiled")) as settings:
        yield os.environ | settings | {"XLA_FLAGS": ""}


@pytest.fixture
def run(monkeypatch, capfd):
    """run(*arguments) -> (status, stdout, stderr) of the command, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ladder-jax", *map(str, arguments)])
        # The command's --devices changes both variables.
        monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        try:
            status = cli.main() or 0
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def recipe(folder, tmp_path):
    path = tiny.recipe(folder, train_out=str(tmp_path / "run"))
    return path.rename(tmp_path / "tiny.py")


@pytest.fixture(scope="module")
def trained(folder, environment):
    """(folder, stdout, text on the terminal) of a run of 20 steps."""
    path = tiny.recipe(
        folder,
        train_out=str(folder / "trained"),
        train_sample_tokens=20,
        train_log_every=5,
    )
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    child = subprocess.Popen(
        [*COMMAND, "train", path, "--devices", "8"],
        env=environment,
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
    return folder / "trained", out, terminal_text.decode()


# ---------------------------------------------------------------- mistakes


def wrong(run, *arguments, status=2):
    """The one line that the command prints for these wrong arguments."""
    actual_status, out, err = run(*arguments)
    assert (actual_status, out) == (status, ""), err
    assert err.endswith("\n") and err.count("\n") == 1, err
    start = "ladder-jax: "
    if arguments[0] in cli.COMMANDS:
        start = f"ladder-jax {arguments[0]}: "
    assert err.startswith(start)
    return err[len(start) : -1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "--model.dimm 3",
            "--model.dimm is not an option: perhaps --model.dim or --model.ffn-dim",
        ),
        ("--nothing", "--nothing is not an option (see"),
        ("extra", "unexpected argument 'extra'"),
        (
            "--train.batch 3",
            "--train.batch is now --train.global-batch (see ladder-jax train",
        ),
        (
            "--train.log-evry 3",
            "--train.log-evry is not an option: perhaps --train.log-e",
        ),
        ("--train.no-steps", "--train.no-steps is not an option"),
        (
            "--train.tensorboard=maybe",
            "--train.tensorboard='maybe' is not accepted: it must be True or False",
        ),
        (
            "--train.steps 2.5",
            "--train.steps='2.5' is not accepted: it must be a whole",
        ),
        (
            "--train.steps=",
            "--train.steps='' is not accepted: it must be a whole number",
        ),
        (
            "--train.sample-tokens 64",
            "train.sample_tokens=64 is not accepted: it must be less than model.max_l",
        ),
        (
            "--model.rope-scaling.factor -1",
            "model.rope_scaling.factor=-1.0 is not accepted: it must be greater than 0",
        ),
        ("--model.dim x", "--model.dim='x' is not accepted: it must be a whole number"),
        (
            "--optimizer.learning-rate x",
            "--optimizer.learning-rate='x' is not accepted: it must be a finite number",
        ),
        (
            "--optimizer.lr-schedule linear",
            "--optimizer.lr-schedule='linear' is not accepted: it must be one of "
            "'cosine', 'wsd', 'constant'",
        ),
        ("--train.steps", "--train.steps takes a value"),
        (
            "--devices x",
            "--devices='x' is not accepted: it must be a whole number or None",
        ),
        ("--devices 0", "devices=0 is not accepted: it must be 1 or more"),
        ("--train.steps 0", "train.steps=0 is not accepted: it must be greater than 0"),
        (
            "--model.kv-heads 3",
            "model.kv_heads=3 is not accepted: it must be a divisor of model.heads=8",
        ),
        (
            "--model.residual ladder:x",
            "model.residual='ladder:x' is not accepted: ladder:A,M takes "
            "whole numbers, not 'x'",
        ),
        (
            "--train.seq-len 100",
            "train.seq_len=100 is not accepted: it must be at most model.max_length=64",
        ),
        (
            "--train.seed -1",
            "train.seed=-1 is not accepted: it must be from 0 to 2 ** 32 - 1",
        ),
        (
            "--train.out gs://bucket/run",
            "train.out='gs://bucket/run' is not accepted: it must be a folder",
        ),
        (
            "--mesh.data 3 --mesh.fsdp 1 --mesh.tensor 1",
            "mesh data=3 x fsdp=1 x tensor=1 has 3 devices, but there are 8",
        ),
        (
            "--mesh.data -1 --mesh.fsdp 3",
            "mesh data=-1 x fsdp=3 x tensor=2 does not divide the 8 devices",
        ),
        (
            "--model.heads 6 --model.kv-heads 6 --mesh.tensor 4 --mesh.data 1",
            "model.heads=6 does not divide by mesh.tens",
        ),
        (
            "--model.kv-heads 1",
            "model.kv_heads=1 does not divide by mesh.tensor=2 (parameter "
            "attention.wk): choose a",
        ),
        ("--model.ffn-dim 63", "model.ffn_dim=63 does not divide by mesh.tensor=2"),
        (
            "--model.vocab-size 263",
            "model.vocab_size=263 does not divide by mesh.tensor=2: use "
            "--model.vocab-size 264,",
        ),
        ("--model.dim 33", "model.dim=33 does not divide by mesh.fsdp=2"),
        (
            "--train.global-batch 6",
            "a batch of 6 sequences (train.global_batch / train.grad_accum_steps) does "
            "not "
            "divide by mesh.data x mesh.",
        ),
        (
            "--model.vocab-size 256",
            "model.vocab_size=256 is smaller than the 259 tokens of "
            "data.tokenizer='bytes'",
        ),
        (
            "--data.source none",
            "data.source='none' does not exist: it must be 'builtin', or a "
            "folder, file or glob",
        ),
        ("--data.source empty", "data.source='empty' has no files"),
        ("--data.source blank.txt", "data.source='blank.txt' has no usable document"),
        (
            "--data.tokenizer none.json",
            "data.tokenizer='none.json' cannot be read (No such file or directory)",
        ),
        (
            "--data.tokenizer blank.txt",
            "data.tokenizer='blank.txt' is not accepted: this is not a "
            "Hugging Face tokenizer",
        ),
        (
            "--data.tokenizer large.json",
            "model.vocab_size=264 is smaller than the 301 tokens of "
            "data.tokenizer='large.js",
        ),
        (
            "--train.out blank.txt/run",
            "train.out='blank.txt/run' is not accepted: {tmp}/blank.txt is "
            "not a folder",
        ),
        ("--processes 2", "processes=2 is not accepted without --distributed"),
        (
            "--distributed --processes 2",
            "processes comes with coordinator and process: give all three",
        ),
        (
            "--distributed",
            "--distributed: no cluster tells this process its place: give "
            "--coordinator HOST:PORT",
        ),
    ],
)
def test_one_line_for_every_mistake(
    run, recipe, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    large = tokenizers.Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(300)}, "w0")
    )
    large.add_special_tokens(["</s>"])
    large.save("large.json")
    assert wrong(run, "train", recipe, *arguments.split()).startswith(
        message.replace("{tmp}", str(tmp_path))
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "recipe '{path}' does not exist"),
        (
            "x = 1\n",
            "recipe '{path}' defines no `config` of type ladder_jax.config.Config",
        ),
        ("config = 3\n", "recipe '{path}' defines no `config` of type"),
        (
            "x = 1\nconfig = = 2\n",
            "recipe '{path}', line 2: SyntaxError: invalid syntax",
        ),
        (
            "import nothing\n",
            "recipe '{path}', line 1: ModuleNotFoundError: No module named 'nothing'",
        ),
        (
            "def f():\n    return {}['a']\n\nf()\n",
            "recipe '{path}', line 2: KeyError: 'a'",
        ),
        (
            "from ladder_jax.config import *\n\n"
            "config = Config(\n    model=Model(dim=-1))\n",
            "recipe '{path}', line 4: model.dim=-1 is not accepted: it must be "
            "greater than 0",
        ),
        (
            "from ladder_jax.config import *\nconfig = Config(model=Model(dims=1))\n",
            "recipe '{path}', line 2: model.dims is not a field: it must be one of ",
        ),
        (
            "from ladder_jax.config import *\nconfig = Config(train=Train(batch=1))\n",
            "recipe '{path}', line 2: train.batch is now train.global_batch",
        ),
        (
            "\0",
            "recipe '{path}': SyntaxError: source code string cannot contain "
            "null bytes",
        ),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line(run, tmp_path, text, message):
    path = tmp_path / "recipe.py"
    if text is not None:
        path.write_text(text)
    line = wrong(run, "train", path)
    # Pythons differ in whether this error has a line, and which one.
    line = re.sub(", line [01](?=: SyntaxError: source)", "", line)
    assert line.startswith(message.format(path=path))


def test_commands_and_help(run, monkeypatch, recipe):
    choices = "choose from " + ", ".join(cli.COMMANDS)
    assert wrong(run, "fly") == f"unknown command 'fly'; {choices}"
    assert wrong(run, "trian") == f"unknown command 'trian'; {choices} (perhaps train)"
    assert wrong(run, "train") == (
        "missing argument: RECIPE, such as in ladder-jax train configs/demo.py"
    )
    assert wrong(run, "train", "--train.steps", 3).startswith("missing argument: RECI")
    assert wrong(run, "generate").startswith(
        "missing argument: CHECKPOINT (A run's folder, its checkpoints folder"
    )
    assert wrong(run, "plan", "recipe.py").startswith("missing argument: --target (TPU")
    kinds = "train, decode, peers, conversion, quality"
    assert wrong(run, "bench") == f"missing argument: one of {kinds}"
    assert wrong(run, "bench", "trane") == (
        f"unknown benchmark 'trane'; choose from {kinds} (perhaps train)"
    )
    assert run() == (2, "", cli.USAGE + "\n")
    assert run("--help") == (0, cli.USAGE + "\n", "")
    assert re.fullmatch(r"ladder-jax \d+\.\d+\.\d+\n", run("--version")[1])
    for arguments in (
        ("train", "--help"),
        ("train", recipe, "--help"),
        ("generate", "--help"),
        ("eval", "--help"),
        ("tokenizer", "-h"),
        ("plan", "--help"),
        ("bench", "--help"),
        ("bench", "train", "--help"),
        ("bench", "conversion", "--help"),
        ("inspect", "--help"),
        ("convert", "--help"),
        ("convert", "from-hf", "--help"),
        ("convert", "from-gguf", "--help"),
    ):
        status, out, err = run(*arguments)
        assert (status, err) == (0, ""), arguments
        assert out.startswith(f"usage: ladder-jax {arguments[0]}"), out
        assert max(map(len, out.splitlines())) <= 100
    assert "(default: 264)" in run("train", recipe, "--help")[1]  # the recipe's own


def test_an_error_of_the_program_has_status_1_and_a_traceback_on_request(
    run, monkeypatch, recipe
):
    """A mistake of the user's has status 2."""

    def broken(arguments):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory\nallocating 3 bytes"
        )

    monkeypatch.setitem(cli.COMMANDS, "train", broken)
    line = wrong(run, "train", recipe, status=1)
    assert line == "RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes"
    monkeypatch.setenv("LADDER_JAX_TRACEBACK", "1")
    with pytest.raises(jax.errors.JaxRuntimeError):
        run("train", recipe)
    monkeypatch.delenv("LADDER_JAX_TRACEBACK")

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert wrong(run, "train", recipe, status=130) == "interrupted"


# ------------------------------------------------------ a run from the command line


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
    steps = [row["step"] for row in tiny.rows(folder) if "loss" in row]
    assert steps == [3, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20]


def test_a_finished_run_can_be_resumed_but_not_started_again_or_changed(
    run, trained, folder
):
    out = trained[0]
    path = folder / "recipe.py"
    assert re.search(
        "already holds a run, at step 20: continue it with --resume, "
        "or choose another --train.out",
        wrong(run, "train", path),
    )
    assert wrong(run, "train", path, "--resume", "--model.ffn-dim", 128).startswith(
        "model.ffn_dim was 64 in the run"
    )
    status, stdout, err = run("train", path, "--resume", "--train.sample-tokens", 0)
    assert (status, err) == (0, "")
    assert f"\ndone: 20 steps, checkpoints in {out}/checkpoints, loss curve" in stdout


def test_a_checkpoint_of_other_shapes_is_one_line(run, folder, trained):
    """The config agrees, and only Orbax's description of the arrays shows the error."""
    path = tiny.recipe(folder, train_out=str(trained[0]))
    meta = trained[0] / "checkpoints/20/meta/data.json"
    text = meta.read_text()
    changed = re.sub('"ffn_dim": ?64', '"ffn_dim": 128', text)
    assert changed != text
    meta.write_text(changed)
    try:
        arguments = "train", path, "--resume", "--model.ffn-dim", 128
        status, _, err = run(*arguments)
    finally:
        meta.write_text(text)
    assert status == 1 and err.count("\n") == 1
    assert "is a checkpoint of another model or optimizer: model/layers/" in err


def test_ctrl_c_and_resume(folder, trained, tmp_path, environment):
    """A pipe gets each line at once. The last line has the command that continues."""
    path = tiny.recipe(folder, train_out=str(tmp_path / "run"))
    arguments = ["train", path, "--devices", "8", "--train.log-every", "5"]
    child = subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment,
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
        [*COMMAND, *again], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0 and ended.stderr == ""
    assert tiny.rows(tmp_path / "run") == tiny.rows(trained[0])


# ------------------------------------------------------ output that breaks, signals


# The terminal that is standard input becomes the controlling terminal of the command.
IN_TERMINAL = [
    sys.executable,
    "-c",
    "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from ladder_jax.cli import main; main()",
]
ENDLESS = ["--devices", "8", "--train.steps", "3e9", "--train.log-every", "1"]


@contextlib.contextmanager
def endless(folder, tmp_path, environment, command=COMMAND, **options):
    """A process that trains for ever, once it has written some rows; killed at exit."""
    path = tiny.recipe(folder, train_out=str(tmp_path / "run"))
    path = path.rename(tmp_path / "endless.py")
    child = subprocess.Popen(
        [*command, "train", path, *ENDLESS], env=environment, text=True, **options
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
    folder, tmp_path, environment
):
    """`ladder-jax train ... 2>&1 | tee log`: Ctrl-C ends `tee` first."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with endless(folder, tmp_path, environment, **pipes) as child:
        child.stdout.close()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=120) == 130
    assert_saved(tmp_path)


def test_a_terminal_that_closes_saves(folder, tmp_path, environment):
    """The kernel sends SIGHUP, and both streams fail from then on."""
    terminal, stream = pty.openpty()
    streams = dict(stdin=stream, stdout=stream, stderr=stream, start_new_session=True)
    with endless(folder, tmp_path, environment, IN_TERMINAL, **streams) as child:
        os.close(stream)
        os.close(terminal)
        child.send_signal(signal.SIGHUP)  # as shells do once more
        assert child.wait(timeout=120) == 129
    assert_saved(tmp_path)


def test_a_run_outlives_its_reader(folder, trained, tmp_path, environment):
    """`ladder-jax train ... | head -3`: the run goes on, and ends as without `head`."""
    path = tiny.recipe(folder, train_out=str(tmp_path / "run"))
    child = subprocess.Popen(
        [*COMMAND, "train", path, "--devices", "8"],
        env=environment,
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


def test_a_run_without_standard_streams(folder, trained, tmp_path, environment):
    """No file of the run takes the number of a stream: its checkpoints stay whole."""
    path = tiny.recipe(folder, train_out=str(tmp_path / "run"))
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    command = [*closed, *COMMAND, "train", path, "--devices", "8"]
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert tiny.rows(tmp_path / "run")[-1] == tiny.rows(trained[0])[-1]
    assert saved_steps(tmp_path / "run/checkpoints")[-1] == 20


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_cannot_be_written_changes_no_status(run, recipe, environment):
    """The status still says whether the command has failed."""
    for words, status in ((["train", "none.py"], 2), (["train", recipe], 0)):
        with open("/dev/full", "w") as full:
            ended = subprocess.run(
                [*COMMAND, *words, "--devices", "8", "--train.steps", "1"],
                env=environment,
                stdout=full,
                stderr=full,
            )
        assert ended.returncode == status


def test_the_last_line_says_what_is_saved_and_quotes_the_command():
    summary = dict(step=0, out="my runs/a", stopped="SIGTERM", saved=False)
    words = ["my recipe.py", "--train.out", "my runs/a", "--resume"]
    again = "ladder-jax train 'my recipe.py' --train.out 'my runs/a' --resume"
    assert cli.outcome(summary, words) == (
        f"stopped by SIGTERM before step 1, nothing to save: start again with {again}"
    )
    assert cli.outcome(summary | dict(step=7, saved=True), words) == (
        f"stopped by SIGTERM at step 7, saved in my runs/a: continue with {again}"
    )


# ---------------------------------------------------------------- devices


def test_a_platform_that_is_not_here_is_one_line(recipe, environment):
    environment = environment | {"JAX_PLATFORMS": "cuda"}
    command = [*COMMAND, "train", recipe]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(
        "ladder-jax train: JAX_PLATFORMS='cuda' is not accepted: it must name devices "
        "that JAX finds on this machine, such as cpu"
    )
    assert ended.stderr.count("\n") == 1


def test_devices_says_which_variables_it_overrides(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=dump")
    cli.emulate(8)
    assert capsys.readouterr().err == "--devices 8 replaces JAX_PLATFORMS=cuda by cpu\n"
    assert os.environ["XLA_FLAGS"].startswith("--xla_dump_to=dump --xla_force")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    cli.emulate(4)
    assert capsys.readouterr().err == (
        "--devices 4 replaces --xla_force_host_platform_device_count=8 in XLA_FLAGS\n"
    )
    cli.emulate(None)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- generate, tokenizer


def test_generate_writes_the_same_text_on_any_mesh_and_samples_by_the_seed(
    run, trained
):
    out = trained[0]
    status, text, err = run("generate", out, "--prompt", "abc", "--max-tokens", 20)
    assert (status, err) == (0, "") and len(text) == 21 and text.endswith("\n")
    options = ["--prompt", "abc", "--max-tokens", 20, "--tensor", 8]
    assert run("generate", out / "checkpoints/20", *options) == (0, text, "")
    sampled = [
        run("generate", out, "--temperature", 1, "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_wrong_row_of_a_prompts_file_costs_that_row_and_the_exit_status(
    run, trained, tmp_path
):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "abc", "top_k": -1}\n')
    options = ["--prompts-file", prompts, "--out", out, "--max-tokens", 5]
    status, text, _ = run("generate", trained[0], *options)
    assert (status, text) == (1, f"done: 2 outputs in {out}, 1 of them errors\n")
    rows = {row["index"]: row for row in map(json.loads, out.open())}
    assert len(rows[0]["tokens"]) == 5 and rows[1]["error"].startswith("line 2: top_k")
    prompts.write_text('{"prompt": "abc"}\n')
    options = ["--prompts-file", prompts, "--out", tmp_path / "good.jsonl"]
    assert run("generate", trained[0], *options, "--max-tokens", 5)[0] == 0


@pytest.mark.parametrize(
    "arguments, message, status",
    [
        (
            "{tmp}",
            "{tmp} holds no checkpoint: a run's folder, its checkpoints folder or the "
            "folder of one step is acc",
            2,
        ),
        ("{tmp}/none", "{tmp}/none does not exist", 2),
        (
            "{out} --step 4",
            "{out}/checkpoints holds no checkpoint of step 4, only [",
            2,
        ),
        (
            "{out} --max-tokens 100",
            "max_tokens=100 is not accepted: it must be from 0 to 63: "
            "model.max_length=64",
            2,
        ),
        ("{out} --temperature -1", "temperature=-1.0 is not accepted", 2),
        ("{out} --top-p 0", "top_p=0.0 is not accepted", 2),
        (
            "{out} --tensor 3",
            "model.vocab_size=264 does not divide|"
            "model.heads=8 does not divide by mesh.tensor=3",
            2,
        ),
        ("{out} --tensor 16", "the mesh needs 16 devices, but there are 8", 2),
        (
            "{out} --tensor 0",
            "mesh.tensor=0 is not accepted: it must be greater than 0, or -1",
            2,
        ),
        ("{out} --seed x", "--seed='x' is not accepted: it must be a whole number", 2),
    ],
)
def test_a_mistake_in_generate_is_one_line(
    run, trained, tmp_path, arguments, message, status
):
    places = dict(tmp=tmp_path, out=trained[0])
    line = wrong(run, "generate", *arguments.format(**places).split(), status=status)
    assert line.startswith(tuple(message.format(**places).split("|")))


def test_generate_writes_each_token_at_once_and_its_reader_may_stop_reading(
    trained, environment
):
    child = subprocess.Popen(
        [*COMMAND, "generate", trained[0], "--prompt", "abc", "--max-tokens", "60"],
        env=environment | {"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert len(child.stdout.read(1)) == 1
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(timeout=60) in (0, 141)


def test_a_tokenizer_is_trained_and_fits_a_run(run, folder, recipe, tmp_path):
    path = tmp_path / "small.json"
    out = f"done: 264 tokens in {path}: use it with --data.tokenizer {path}\n"
    options = ["--vocab-size", 264, "--out", path]
    assert run("tokenizer", folder / "corpus", *options) == (0, out, "")
    assert wrong(run, "tokenizer", folder / "corpus", "--vocab-size", 9).startswith(
        "vocab_size=9 is not accepted"
    )
    assert wrong(run, "tokenizer", tmp_path / "none").startswith(
        f"data.source='{tmp_path}/none' does not exist"
    )
    assert wrong(
        run, "tokenizer", folder / "corpus", "--out", f"{path}/x", status=1
    ).startswith(f"out='{path}/x' cann")
    training = ["train", recipe, "--data.tokenizer", path, "--train.steps", 1]
    status, _, err = run(*training)
    assert (status, err) == (0, "")
    path.write_text(path.read_text().replace("<|pad|>", "<|pat|>"))
    assert wrong(run, *training, "--resume") == (
        f"data.tokenizer={str(path)!r} has other contents now than in the run to "
        "resume: restore them, or start a new run in another train.out"
    )


# ---------------------------------------------------------------- several processes


def together(arguments, environment, act=lambda children: None):
    """(stdout, stderr, status) of each of two processes of one run, with four devices
    each.
    """
    command = [*COMMAND, "train", *arguments, "--devices", "4", "--distributed"]
    command += ["--coordinator", free_address(), "--processes", "2"]
    ended = run_together(
        [[*command, "--process", number] for number in range(2)], environment, act
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
def test_two_processes_are_one_run(folder, trained, tmp_path, environment, mesh):
    """Two processes have the losses of one. A signal to one of them stops both, and
    both resume.
    """
    path = tiny.recipe(
        folder,
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

    first, second = together([path], environment, stop)
    assert first[2] == second[2] == 143, (first, second)
    (step,) = re.findall(r"stopped by SIGTERM at step (\d+), saved", first[0])
    assert int(step) % 5 == 0 and second[0] == ""
    first, second = together([path, "--resume"], environment)
    assert first[2] == second[2] == 0, (first, second)
    assert f"resumed at step {step} of 20" in first[0] and "done: 20 steps" in first[0]
    rows, expected_rows = tiny.rows(tmp_path / "run"), tiny.rows(trained[0])
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    meta = json.loads((tmp_path / "run/checkpoints/20/meta/data.json").read_text())
    assert meta["tensor"] == mesh.get("mesh_tensor", 2)
