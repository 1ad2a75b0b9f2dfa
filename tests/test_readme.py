"""The README's commands: every one parses as the program would parse it, and names files that exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from ladder_jax import cli
from ladder_jax.config import from_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.split()[:1] and line.split()[0].endswith("ladder-jax")
]
KINDS = {
    "train": cli.TrainArguments,
    "generate": cli.GenerateArguments,
    "tokenizer": cli.TokenizerArguments,
    "plan": cli.PlanArguments,
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, arguments = words[1], words[2:]
    if command == "train":
        default = cli.TrainArguments(from_recipe(arguments[0]))
        assert cli.parse(
            KINDS[command], arguments[1:], command, default
        ).config.train.out.startswith("runs/")
    elif command == "bench":
        job = importlib.import_module(f"ladder_jax.bench.{arguments[0]}")
        assert cli.parse(job.Arguments, arguments[1:], command)
    else:
        assert cli.parse(KINDS[command], arguments, command)


def test_links_and_targets():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {name for name in re.findall(r"`?make ([a-z-]+)`?", README)} <= set(targets)
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / "ladder_jax" / name).exists(), name
