"""The command `ladder-jax`: reads arguments, calls a job, and says what came of it in one line.

A user's mistake ends in one line on stderr and status 2; what else fails, in one line and status 1. For the traceback
behind such a line, set LADDER_JAX_TRACEBACK=1.
"""

import contextlib
import importlib.metadata
import io
import os
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ladder_jax import config as configuration
from ladder_jax.config import ConfigError
from ladder_jax.hardware import distributed, malloc


@dataclass(frozen=True)
class TrainArguments:
    """Trains the model of a recipe, a Python file that makes a `config`. Any of its fields can be overridden."""

    config: Annotated[
        configuration.Config, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands
    ]
    resume: bool = False
    """Continue the run in train.out from its newest checkpoint; where there is none yet, start it."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    distributed: bool = False
    """One process of several, started alike on every machine. TPU pods, Slurm and MPI tell each process its place;
    elsewhere the next three do."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where the others find it."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which one this is, from 0 on."""


@dataclass(frozen=True)
class GenerateArguments:
    """Writes the text that a model makes of a prompt, as it is made; or of a file of prompts, many at a time."""

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, its checkpoints folder, or one step's."""
    prompt: str = ""
    """The text to continue. If it is empty, the model starts a new document: from the tokenizer's begin token, or
    from its end token if it has no begin token."""
    prompts_file: str | None = None
    """JSONL: a prompt a line, with options of its own if it wants; those here are the defaults."""
    out: str = "out.jsonl"
    """Where the outputs of prompts_file go. What it holds already is not generated again."""
    max_tokens: int | None = None
    """200, or as many as the model has room for, by default."""
    temperature: float = 0.0
    """0: the likeliest token at every step."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    step: int | None = None
    """Of the checkpoint; the newest by default."""
    tensor: int | None = None
    """Devices to spread the model over."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    decode: Annotated[configuration.Decode, tyro.conf.arg(name="")] = (
        configuration.Decode(slots=16)
    )
    """How a file of prompts is decoded."""


@dataclass(frozen=True)
class TokenizerArguments:
    """Trains a byte-level BPE tokenizer on a corpus (its training documents alone)."""

    source: tyro.conf.Positional[str]
    """A folder, file or glob of text, or builtin."""
    vocab_size: int = 4096
    out: str = "tokenizer.json"
    text_field: str = "text"
    """The field of JSONL rows and Parquet columns that holds the text."""


@dataclass(frozen=True)
class PlanArguments:
    """Compiles the program of a recipe for chips that are not here, and shows what its communication hides behind."""

    recipe: tyro.conf.Positional[str]
    target: str
    """v5e:2x4, v6e:2x4, v5p:2x2x2, tpu7x:2x2x1 (TPU slices), h100:1x8 (nodes x GPUs), ..."""
    workload: Literal["decode", "prefill", "train"] = "decode"
    batch: int = 1
    """Rows, over all devices."""
    context: int | None = None
    """Tokens: of the cache (decode), of a prompt (prefill), of a sequence (train). 2048 by default."""
    schedule: str | None = None
    """Residual schedule; the recipe's by default."""
    reduction: str = "auto"
    """See mesh.reduction."""
    tensor: int | None = None
    """Devices that share a block's work; the recipe's by default."""
    compare: bool = False
    """Sets standard, parallel, ladder, hybrid, desync and no communication side by side."""
    plot: str | None = None
    """A PNG to draw the timeline to."""
    hlo: str | None = None
    """A file to write the scheduled program to."""
    json: bool = False
    """Prints one JSON object."""


def _join(chosen):
    """Joins the other processes where --distributed says so."""
    place = dict(
        coordinator=chosen.coordinator,
        processes=chosen.processes,
        process=chosen.process,
    )
    given = [name for name, value in place.items() if value is not None]
    if chosen.distributed:
        distributed.join(**place)
    elif given:
        raise ConfigError(
            f"{given[0]}={place[given[0]]!r} is not accepted without --distributed"
        )


def train(arguments):
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            _parse(
                TrainArguments,
                arguments,
                "train RECIPE",
                TrainArguments(configuration.Config()),
            )
        raise ConfigError(
            "train takes a recipe first, such as: ladder-jax train configs/demo.py"
        )
    default = TrainArguments(configuration.from_recipe(arguments[0]))
    chosen = _parse(TrainArguments, arguments[1:], f"train {arguments[0]}", default)
    distributed.emulate(chosen.devices)
    malloc.keep_freed_memory()
    _join(chosen)
    import jax

    from ladder_jax.train import train as run

    done = run(chosen.config, chosen.resume)
    if jax.process_index():
        return None
    if done["stopped"]:
        again = " ".join(
            ["ladder-jax train", *(a for a in arguments if a != "--resume"), "--resume"]
        )
        return f"stopped by {done['stopped']} at step {done['step']}, saved in {done['out']}: continue with {again}"
    plotted = f", loss curve {done['plot']}" if done["plot"] else ""
    held_out = (
        f"held-out {done['held_out_bits_per_byte']:.3f} bits per byte, "
        if "held_out_loss" in done
        else ""
    )
    return f"done: {done['step']} steps, {held_out}checkpoints in {done['out']}/checkpoints{plotted}"


def generate(arguments):
    chosen = _parse(GenerateArguments, arguments, "generate")
    distributed.emulate(chosen.devices)
    from ladder_jax.loading import load

    mesh = (
        configuration.Mesh(data=1, tensor=chosen.tensor)
        if chosen.tensor is not None
        else None
    )
    loaded = load(chosen.checkpoint, step=chosen.step, mesh=mesh)
    options = dict(
        max_tokens=chosen.max_tokens,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        seed=chosen.seed,
    )
    if chosen.prompts_file is not None:
        from ladder_jax.serve import offline
        from ladder_jax.serve.engine import Engine

        engine = Engine(
            loaded.model,
            loaded.config.model,
            loaded.mesh,
            chosen.decode,
            loaded.tokenizer,
        )
        print(engine.report(), file=sys.stderr)
        made, before, failed = offline.run(
            engine, chosen.prompts_file, chosen.out, options
        )
        already = f", {before} were there already" if before else ""
        return f"done: {made} outputs in {chosen.out}{already}" + (
            f", {failed} of them errors" if failed else ""
        )
    for text in loaded.generate(chosen.prompt, **options):
        print(text, end="", flush=True)
    print()


def tokenizer(arguments):
    chosen = _parse(TokenizerArguments, arguments, "tokenizer")
    from ladder_jax.data.corpus import documents
    from ladder_jax.data import tokenizer as tokenizers

    if chosen.vocab_size < 260:
        raise ConfigError(
            f"vocab_size={chosen.vocab_size} is not accepted: it must be 260 or more"
        )
    source = configuration.Data(source=chosen.source, text_field=chosen.text_field)
    made = tokenizers.train(documents(source), chosen.vocab_size)
    made.save(chosen.out)
    return f"done: {made.size} tokens in {chosen.out}: use it with --data.tokenizer {chosen.out}"


def plan(arguments):
    chosen = _parse(PlanArguments, arguments, "plan")
    from ladder_jax.hardware import aot

    aot.prepare()
    with aot.silence():
        from ladder_jax.planner import command

        return command.run(configuration.from_recipe(chosen.recipe), chosen)


def bench(arguments):
    names = ("train", "decode", "peers")
    if not arguments or arguments[0] not in names:
        raise ConfigError(f"bench takes what to measure first: {', '.join(names)}")
    import importlib

    job = importlib.import_module(f"ladder_jax.bench.{arguments[0]}")
    job.run(_parse(job.Arguments, arguments[1:], f"bench {arguments[0]}"))


COMMANDS = {
    "train": train,
    "generate": generate,
    "tokenizer": tokenizer,
    "plan": plan,
    "bench": bench,
}
USAGE = """usage: ladder-jax COMMAND ...

  train RECIPE           trains the model of a recipe, such as configs/demo.py
  generate CHECKPOINT    writes the text that a model makes of a prompt, or of a file of prompts
  tokenizer SOURCE       trains a tokenizer on a corpus
  plan RECIPE            shows what a program will do on chips that are not here
  bench WHAT             measures this project beside others: train, decode, peers

Each takes --help."""

SAYS = {  # how tyro says what is wrong, and how it reads here
    r"Missing value for argument '(\S+)'.*": r"\1 takes a value",
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)": r"\1 \2: it must be a whole number",
    r"Error parsing (\S+): could not convert string to float: (.*)": r"\1 \2: it must be a number",
    r"Error parsing (\S+): no type .* {None}\|(\w+) could be .*? from \[(.*?)\]\..*": r"\1 \3: it must be \2 or None",
    r"[Ii]nvalid choice (\S+) for argument '(\S+)'\. Expected one of \((.*)\)\.": r"\2 \1: it must be one of \3",
    r"Missing from [\w -]+: STR (.*) \(required\)": r"what comes first is missing: \1",
    r"Unrecognized options: (\S+?),? .*": r"\1 is not an option",
    r"Unrecognized options: (\S+)": r"\1 is not an option",
}


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
    parts = re.split(
        r"\n *│? *─+ *│? *\n", said.getvalue().partition("\n")[2]
    )  # the frame's title is left out
    message, *more = (
        " ".join(line.strip("│╰╯─ ") for line in part.splitlines()).strip()
        for part in parts
    )
    for pattern, reads in SAYS.items():
        if found := re.fullmatch(pattern, message):
            message = found.expand(reads)
            break
    if (
        close := re.findall(r"--[\w.-]+", more[0])
        if more and more[0].startswith("Perhaps")
        else []
    ):
        message += f": perhaps {' or '.join(close)}"
    checked = re.fullmatch(
        r"Error parsing config[.\w-]*: (.*)", message
    )  # a ConfigError, from inside tyro
    raise ConfigError(
        checked[1] if checked else f"{message} (see ladder-jax {name} --help)"
    )


def main():
    """Entry point of the command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"ladder-jax {importlib.metadata.version('ladder_jax')}")
        return
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(
            errors="backslashreplace"
        )  # a terminal that cannot show a character ends no run
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"it is not a command: {', '.join(COMMANDS)} are")
        if said := COMMANDS[arguments[0]](arguments[1:]):
            print(said, flush=True)
    except BrokenPipeError:  # who reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (
        ValueError,
        OSError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
        KeyboardInterrupt,
    ) as error:
        if os.environ.get("LADDER_JAX_TRACEBACK"):
            raise
        said = (
            "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else " ".join(str(error).split())
        )
        print(
            f"ladder-jax {arguments[0]}: {said or type(error).__name__}",
            file=sys.stderr,
        )
        sys.exit(
            2
            if isinstance(error, ConfigError)
            else 130
            if isinstance(error, KeyboardInterrupt)
            else 1
        )
