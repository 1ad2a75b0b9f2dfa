"""The command: a mistake is one clear line, and the exit status says whose it was."""

import os
import re
import subprocess

import jax
import pytest
import tokenizers
from helpers import COMMAND, code_environment
from tokenizers import models

from ladder_jax import cli, devices

pytestmark = pytest.mark.usefixtures("fast_compiler")


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
            "--train.work-dir gs://bucket/run",
            "train.work_dir='gs://bucket/run' is not accepted: it must be a folder",
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
            "data.tokenizer='none.json' does not exist",
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
    wrong, recipe, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    large = tokenizers.Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(300)}, "w0")
    )
    large.add_special_tokens(["</s>"])
    large.save("large.json")
    assert wrong("train", recipe, *arguments.split()).startswith(
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
def test_a_recipe_that_cannot_be_read_is_one_line(wrong, tmp_path, text, message):
    path = tmp_path / "recipe.py"
    if text is not None:
        path.write_text(text)
    line = wrong("train", path)
    # Pythons differ in whether this error has a line, and which one.
    line = re.sub(", line [01](?=: SyntaxError: source)", "", line)
    assert line.startswith(message.format(path=path))


def test_commands_and_help(command, wrong, monkeypatch, recipe):
    choices = "choose from " + ", ".join(cli.COMMANDS)
    assert wrong("fly") == f"unknown command 'fly'; {choices}"
    assert wrong("trian") == f"unknown command 'trian'; {choices} (perhaps train)"
    assert wrong("train") == (
        "missing argument: RECIPE, such as in ladder-jax train configs/demo.py"
    )
    assert wrong("train", "--train.steps", 3).startswith("missing argument: RECI")
    assert wrong("generate").startswith(
        "missing argument: CHECKPOINT (A run's folder, its checkpoints folder"
    )
    assert wrong("plan", "recipe.py").startswith("missing argument: --target (TPU")
    kinds = "train, decode, serve, peers, conversion, quality, tokenize, device"
    assert wrong("bench") == f"missing argument: one of {kinds}"
    assert wrong("bench", "trane") == (
        f"unknown benchmark 'trane'; choose from {kinds} (perhaps train)"
    )
    assert command() == (2, "", cli.USAGE + "\n")
    assert command("--help") == (0, cli.USAGE + "\n", "")
    assert re.fullmatch(r"ladder-jax \d+\.\d+\.\d+\n", command("--version")[1])
    monkeypatch.chdir(recipe.parent)  # the first line names the file
    for arguments in (
        ("train", "--help"),
        ("train", recipe.name, "--help"),
        ("generate", "--help"),
        ("eval", "--help"),
        ("tokenizer", "-h"),
        ("tokenize", "--help"),
        ("plan", "--help"),
        ("bench", "--help"),
        ("bench", "train", "--help"),
        ("bench", "conversion", "--help"),
        ("inspect", "--help"),
        ("convert", "--help"),
        ("convert", "from-hf", "--help"),
        ("convert", "from-gguf", "--help"),
    ):
        status, out, err = command(*arguments)
        assert (status, err) == (0, ""), arguments
        assert out.startswith(f"usage: ladder-jax {arguments[0]}"), out
        assert max(map(len, out.splitlines())) <= 100
    assert "(default: 264)" in command("train", recipe, "--help")[1]  # the recipe's own


def test_an_error_of_the_program_has_status_1_and_a_traceback_on_request(
    command, wrong, monkeypatch, recipe
):
    """A mistake of the user's has status 2."""

    def broken(arguments):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory\nallocating 3 bytes"
        )

    monkeypatch.setitem(cli.COMMANDS, "train", broken)
    line = wrong("train", recipe, status=1)
    assert line == "RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes"
    monkeypatch.setenv("LADDER_JAX_TRACEBACK", "1")
    with pytest.raises(jax.errors.JaxRuntimeError):
        command("train", recipe)
    monkeypatch.delenv("LADDER_JAX_TRACEBACK")

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert wrong("train", recipe, status=130) == "interrupted"


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


def test_a_platform_that_is_not_here_is_one_line(recipe):
    environment = code_environment() | {"JAX_PLATFORMS": "cuda"}
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
    devices.emulate(8)
    assert capsys.readouterr().err == "--devices 8 replaces JAX_PLATFORMS=cuda by cpu\n"
    assert os.environ["XLA_FLAGS"].startswith("--xla_dump_to=dump --xla_force")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    devices.emulate(4)
    assert capsys.readouterr().err == (
        "--devices 4 replaces --xla_force_host_platform_device_count=8 in XLA_FLAGS\n"
    )
    devices.emulate(None)
    assert capsys.readouterr().err == ""
