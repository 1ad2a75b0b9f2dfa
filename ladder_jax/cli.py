"""The command `ladder-jax`: reads arguments, calls a job, and says what came of it in one line.

A user's mistake ends in one line on stderr and status 2; what else fails, in one line and status 1. For the traceback
behind such a line, set LADDER_JAX_TRACEBACK=1.
"""
import contextlib
import io
import itertools
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ladder_jax import config as configuration
from ladder_jax.config import ConfigError


@dataclass(frozen=True)
class TrainArguments:
    """Trains the model of a recipe. Any of its fields can be overridden."""
    config: Annotated[configuration.Config, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    resume: bool = False
    """Continue the run in train.out from its newest checkpoint."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    distributed: bool = False
    """One process of several: find the others as jax.distributed.initialize does (on TPU pods, under Slurm or MPI)."""


@dataclass(frozen=True)
class GenerateArguments:
    """Writes the text that a model makes of a prompt, as it is made."""
    checkpoint: tyro.conf.Positional[str]
    """A run's folder, its checkpoints folder, or one step's."""
    prompt: str = ""
    max_tokens: int = 200
    temperature: float = 0.0
    """0: the likeliest token at every step."""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    step: int | None = None
    """Of the checkpoint; the newest by default."""
    tensor: int | None = None
    """Devices to spread the model over."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""


@dataclass(frozen=True)
class TokenizerArguments:
    """Trains a byte-level BPE tokenizer on a corpus (its training documents alone)."""
    source: tyro.conf.Positional[str]
    """A folder, file or glob of text, or builtin."""
    vocab_size: int = 4096
    out: str = "tokenizer.json"
    text_field: str = "text"
    """The field of JSONL rows and Parquet columns that holds the text."""


def recipe(path):
    """The `config` of a recipe, a Python file."""
    if not Path(path).is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise ConfigError(f"recipe {path!r} does not exist" + (f": there are {known}" if known else ""))
    made = runpy.run_path(path).get("config")
    if not isinstance(made, configuration.Config):
        raise ConfigError(f"recipe {path!r} defines no `config` of type ladder_jax.config.Config")
    return made


def _emulate(devices):
    """Must come before JAX starts."""
    if devices is not None:
        if devices < 1:
            raise ConfigError(f"devices={devices} is not accepted: it must be 1 or more")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        os.environ["JAX_PLATFORMS"] = "cpu"


def train(arguments):
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            _parse(TrainArguments, arguments, "train RECIPE", TrainArguments(configuration.Config()))
        raise ConfigError("train takes a recipe first, such as: ladder-jax train configs/demo.py")
    chosen = _parse(TrainArguments, arguments[1:], f"train {arguments[0]}", TrainArguments(recipe(arguments[0])))
    _emulate(chosen.devices)
    import jax

    from ladder_jax.train import train as run
    if chosen.distributed:
        jax.distributed.initialize()
    done = run(chosen.config, chosen.resume)
    again = f"ladder-jax train {arguments[0]} --resume"
    if done["stopped"]:
        return f"stopped by {done['stopped']} at step {done['step']}, saved in {done['out']}: continue with {again}"
    plotted = f", loss curve {done['plot']}" if done["plot"] else ""
    held_out = f"held-out {done['held_out_bits_per_byte']:.3f} bits per byte, " if "held_out_loss" in done else ""
    return f"done: {done['step']} steps, {held_out}checkpoints in {done['out']}/checkpoints{plotted}"


def generate(arguments):
    chosen = _parse(GenerateArguments, arguments, "generate")
    _emulate(chosen.devices)
    from ladder_jax.generate import load
    mesh = configuration.Mesh(data=1, tensor=chosen.tensor) if chosen.tensor is not None else None
    loaded = load(chosen.checkpoint, step=chosen.step, mesh=mesh)
    for text in loaded.generate(chosen.prompt, max_tokens=chosen.max_tokens, temperature=chosen.temperature,
                                top_k=chosen.top_k, top_p=chosen.top_p, seed=chosen.seed):
        print(text, end="", flush=True)
    print()


def tokenizer(arguments):
    chosen = _parse(TokenizerArguments, arguments, "tokenizer")
    from ladder_jax import data
    from ladder_jax import tokenizer as tokenizers
    if chosen.vocab_size < 260:
        raise ConfigError(f"vocab_size={chosen.vocab_size} is not accepted: it must be 260 or more")
    source = configuration.Data(source=chosen.source, text_field=chosen.text_field)
    made = tokenizers.train(data.documents(source), chosen.vocab_size)
    made.save(chosen.out)
    return f"done: {made.size} tokens in {chosen.out}: use it with --data.tokenizer {chosen.out}"


COMMANDS = {"train": train, "generate": generate, "tokenizer": tokenizer}


def _parse(kind, arguments, name, default=None):
    """`arguments` as a `kind`; what tyro says of a mistake, in a frame of several lines, becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            defaults = {} if default is None else dict(default=default)
            return tyro.cli(kind, prog=f"ladder-jax {name}", args=arguments, **defaults)
    except SystemExit as stopped:
        if not stopped.code:
            raise
    lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
    message = itertools.takewhile(lambda line: line.strip("─╰╯"), lines)
    raise ConfigError(f"{' '.join(message)} (see ladder-jax {name} --help)")


def main():
    """Entry point of the command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS:
        asked = arguments and arguments[0] in ("-h", "--help")
        print(f"usage: ladder-jax COMMAND ...   (COMMAND: {', '.join(COMMANDS)}; each takes --help)",
              file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    try:
        said = COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, OSError, ArithmeticError, KeyboardInterrupt) as error:
        if os.environ.get("LADDER_JAX_TRACEBACK"):
            raise
        print(f"ladder-jax {arguments[0]}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    if said:
        print(said)
