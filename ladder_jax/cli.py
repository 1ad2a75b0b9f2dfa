"""The command `ladder-jax`: reads arguments, calls a job, and prints its outcome.

Exit statuses, for shells and schedulers:
  0    done
  1    failed: no memory, a full disk, loss that is not finite, ...; one line says why
  2    a mistake in the arguments, the recipe or the data; one line says which
  3    `plan`: the program does not fit the memory of its devices
  75   a process of the run was lost or did not start, or a step did not end: the same
       command, perhaps on other machines, with --resume continues the run
  128+N  stopped by signal N (130: Ctrl-C, 143: SIGTERM, 129: the terminal closed).
       `train` has saved then, unless its last line says that there was nothing to save;
       the same command with --resume continues it
  141  the reader of the output went away (`| head`); `train` does not stop for that

LADDER_JAX_TRACEBACK=1 shows the traceback behind a line about a failure.
"""

import importlib
import importlib.metadata
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ladder_jax.addresses import local_path
from ladder_jax.arguments import ENVIRONMENT, FLAT, POSITIONAL, kinds_text, parse
from ladder_jax.config import (
    Config,
    ConfigError,
    Data,
    from_recipe,
    near_matches,
    require,
)
from ladder_jax.devices import emulate, join, require_devices
from ladder_jax.hardware import malloc
from ladder_jax.hardware.distributed import Hosts
from ladder_jax.hardware.roll_call import RETRY, Missing
from ladder_jax.hardware.watchdog import STEP_TIMEOUT
from ladder_jax.interrupts import InsistentInterrupt
from ladder_jax.planner.arguments import PlanArguments
from ladder_jax.standard_streams import (
    discard_unwritten,
    open_standard_streams,
    print_safely,
)


@dataclass(frozen=True)
class TrainArguments:
    """Trains the model of a recipe. A recipe is a Python file that defines a `config`;
    the defaults below are its values, and options replace them."""

    config: Config = field(default_factory=Config, metadata=FLAT)
    resume: bool = False
    """Continue the run in train.out from its newest checkpoint. Without a checkpoint,
    start the run."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    step_timeout: float = field(default=STEP_TIMEOUT, metadata=ENVIRONMENT)
    """Seconds after which a step that does not end, with its evaluation and save, ends
    the run with status 75. 0: never. The first step may take any time."""
    hosts: Hosts = field(default_factory=Hosts, metadata=FLAT)


@dataclass(frozen=True)
class TokenizerArguments:
    """Trains a byte-level BPE tokenizer on the training documents of a corpus."""

    source: str = field(metadata=POSITIONAL)
    """A folder, file or glob of text, or builtin."""
    vocab_size: int = 4096
    """Tokens, 260 or more."""
    out: str = "tokenizer.json"
    """The file to write."""
    text_field: str = "text"
    """The field of JSONL rows and Parquet columns that holds the text."""


@dataclass(frozen=True)
class InspectArguments:
    """Shows what a checkpoint holds, and which chips it fits on. Arrays are not
    loaded."""

    path: str = field(metadata=POSITIONAL)
    """A run's folder or checkpoint, a Hugging Face folder or name, or a GGUF file."""
    step: int | None = None
    """The step of a run's checkpoint. None: the newest."""
    json: bool = False
    """Print JSON."""


# ---------------------------------------------------------------- commands


def train(words: list[str]) -> int:
    """`ladder-jax train RECIPE ...`"""
    if words[:1] in (["-h"], ["--help"]):
        parse(TrainArguments, words, "train", first="RECIPE")
    if not words or words[0].startswith("-"):
        raise ConfigError(
            "missing argument: RECIPE, such as in ladder-jax train configs/demo.py"
        )
    recipe = words[0]
    default = TrainArguments(from_recipe(recipe))
    arguments = parse(TrainArguments, words[1:], f"train {recipe}", default)
    emulate(arguments.devices)
    malloc.keep_freed_memory()
    from ladder_jax import train_programs, training

    train_programs.run_long_steps_in_turn(arguments.config)
    with join(arguments.hosts, "ladder-jax train"):
        require_devices()
        import jax

        summary = training.train(
            arguments.config, arguments.resume, arguments.step_timeout
        )
        if jax.process_index() == 0:
            print_safely(outcome(summary, words))
    return 128 + signal.Signals[summary["stopped"]] if summary["stopped"] else 0


def outcome(summary: Mapping[str, Any], words: list[str]) -> str:
    """The last line of a training run: what it did, and the command to continue it."""
    step, out = summary["step"], summary["out"]
    if summary["stopped"]:
        again = [word for word in words if word not in ("--resume", "--no-resume")]
        command = shlex.join(["ladder-jax", "train", *again, "--resume"])
        if not summary["saved"]:
            return (
                f"stopped by {summary['stopped']} before step 1, nothing to save: "
                f"start again with {command}"
            )
        return (
            f"stopped by {summary['stopped']} at step {step}, saved in {out}: "
            f"continue with {command}"
        )
    parts = [f"{step} steps"]
    if "held_out_bits_per_byte" in summary:
        parts.append(f"held-out {summary['held_out_bits_per_byte']:.3f} bits per byte")
    for name, text in (("skipped_steps", "steps left out"), ("rollbacks", "rollbacks")):
        if summary.get(name):
            parts.append(f"{summary[name]} {text}")
    parts.append(f"checkpoints in {out}/checkpoints")
    if summary["plot"]:
        parts.append(f"loss curve {summary['plot']}")
    return f"done: {', '.join(parts)}"


def generate(words: list[str]) -> int:
    """`ladder-jax generate CHECKPOINT ...`"""
    from ladder_jax import generating

    arguments = parse(generating.Arguments, words, "generate")
    generating.check_one_prompt(arguments)
    emulate(arguments.devices)
    with join(arguments.hosts, "ladder-jax generate"):
        require_devices()
        return generating.run(arguments)


def tokenizer(words: list[str]) -> int:
    """`ladder-jax tokenizer SOURCE ...`"""
    arguments = parse(TokenizerArguments, words, "tokenizer")
    from ladder_jax.data.corpus import documents
    from ladder_jax.data.tokenizer import train as train_tokenizer

    size, out = arguments.vocab_size, str(local_path(arguments.out, "out"))
    require(size >= 260, "vocab_size", size, "260 or more")
    data_config = Data(source=arguments.source, text_field=arguments.text_field)
    bpe = train_tokenizer(documents(data_config), size)
    bpe.save(out)
    print(f"done: {bpe.size} tokens in {out}: use it with --data.tokenizer {out}")
    return 0


def tokenize(words: list[str]) -> int:
    """`ladder-jax tokenize RECIPE ...`"""
    from ladder_jax import tokenizing

    default, command, first = tokenizing.Arguments(), "tokenize", "[RECIPE]"
    if words and not words[0].startswith("-"):
        default = tokenizing.Arguments(from_recipe(words[0]))
        command, first, words = f"tokenize {words[0]}", "", words[1:]
    arguments = parse(tokenizing.Arguments, words, command, default, first)
    if first and not (arguments.list or arguments.remove):
        raise ConfigError(
            "missing argument: RECIPE, such as in ladder-jax tokenize configs/demo.py, "
            "or --list or --remove"
        )
    print_safely(tokenizing.run(arguments))
    return 0


def plan(words: list[str]) -> int:
    """`ladder-jax plan RECIPE ...`"""
    arguments = parse(PlanArguments, words, "plan")
    from ladder_jax.hardware import aot

    aot.prepare()
    with aot.silence():
        from ladder_jax.planner import command

        outcome = command.run(from_recipe(arguments.recipe), arguments)
    print(outcome.text, flush=True)
    return 0 if outcome.fits else NO_MEMORY


# The exit status of a plan that does not fit its devices' memory.
NO_MEMORY = 3

BENCH = "ladder_jax.bench"


def bench(words: list[str]) -> int:
    """`ladder-jax bench WHAT ...`: one of these."""
    names = "train decode serve peers conversion quality tokenize device".split()
    if words[:1] in (["-h"], ["--help"]):
        jobs = {name: importlib.import_module(f"{BENCH}.{name}") for name in names}
        print(kinds_text("bench", {name: job.Arguments for name, job in jobs.items()}))
        return 0
    if not words:
        raise ConfigError(f"missing argument: one of {', '.join(names)}")
    if words[0] not in names:
        raise ConfigError(unknown("benchmark", words[0], names))
    job = importlib.import_module(f"{BENCH}.{words[0]}")
    job.run(parse(job.Arguments, words[1:], f"bench {words[0]}"))
    return 0


def convert(words: list[str]) -> int:
    """`ladder-jax convert from-hf|to-hf|from-gguf|ladderize ...`"""
    from ladder_jax.convert import command

    names = tuple(command.KINDS)
    if words[:1] in (["-h"], ["--help"]):
        print(kinds_text("convert", command.KINDS))
        return 0
    if not words:
        raise ConfigError(f"missing argument: one of {', '.join(names)}")
    if words[0] not in names:
        raise ConfigError(unknown("conversion", words[0], names))
    arguments = parse(command.KINDS[words[0]], words[1:], f"convert {words[0]}")
    emulate(getattr(arguments, "devices", None))
    require_devices()
    print_safely(command.run(arguments))
    return 0


def inspect(words: list[str]) -> int:
    """`ladder-jax inspect PATH`"""
    arguments = parse(InspectArguments, words, "inspect")
    from ladder_jax import inspection

    report = inspection.inspect(arguments.path, arguments.step)
    print(inspection.dump(report) if arguments.json else inspection.text(report))
    return 0


def report(words: list[str]) -> int:
    """`ladder-jax report RUN ...`"""
    from ladder_jax.report import command  # it does not import JAX

    arguments = parse(command.Arguments, words, "report")
    if not arguments.plan:
        print_safely(command.run(arguments))
        return 0
    from ladder_jax.hardware import aot

    aot.prepare()
    with aot.silence():
        text = command.run(arguments)
    print_safely(text)
    return 0


def evaluate(words: list[str]) -> int:
    """`ladder-jax eval CHECKPOINT ...`"""
    job = importlib.import_module("ladder_jax.evaluation.command")
    arguments = parse(job.Arguments, words, "eval")
    emulate(arguments.devices)
    require_devices()
    print(job.run(arguments), flush=True)
    return 0


def serve(words: list[str]) -> int:
    """`ladder-jax serve CHECKPOINT ...`"""
    try:
        job = importlib.import_module("ladder_jax.server.command")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server needs {error.name}: pip install 'ladder_jax[serve]'"
        ) from None
    arguments = parse(job.Arguments, words, "serve")
    emulate(arguments.start.devices)
    if not arguments.start.distributed:  # else the processes must join first
        require_devices()
    return job.run(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "generate": generate,
    "serve": serve,
    "eval": evaluate,
    "tokenizer": tokenizer,
    "tokenize": tokenize,
    "plan": plan,
    "convert": convert,
    "inspect": inspect,
    "report": report,
    "bench": bench,
}
USAGE = """usage: ladder-jax COMMAND ...

  train RECIPE           trains the model of a recipe, such as configs/demo.py
  generate CHECKPOINT    continues a prompt, or each prompt of a file
  serve CHECKPOINT       answers HTTP requests by OpenAI's API
  eval CHECKPOINT        measures perplexity on documents, or runs lm-eval's tasks
  tokenizer SOURCE       trains a tokenizer on a corpus
  tokenize RECIPE        tokenises a corpus before a run, on one host or many
  plan RECIPE            predicts a program's speed on chips that this machine lacks
  convert WHAT           checkpoints of other tools, in and out: from-hf, to-hf, ...
  inspect PATH           shows what a checkpoint holds, without loading it
  report RUN ...         makes a page about runs: loss, speed, how they differ
  bench WHAT             measures: train, decode, peers, conversion, quality, ...

Each command has options: see ladder-jax COMMAND --help.

Exit status: 0 done; 1 failed; 2 a mistake in the arguments, the recipe or the data;
3 `plan`: the program does not fit the memory of its devices; 75 a host was lost or
hung: try again; 128 + N stopped by signal N (130 Ctrl-C, 143 SIGTERM). `train` has
saved then, and the same command with --resume continues it."""


# ---------------------------------------------------------------- the process


def main() -> None:
    """Entry point of the command: exits with a status that the module's text lists."""
    try:
        open_standard_streams()
        try:
            status = run(sys.argv[1:])
        except BrokenPipeError:
            status = 128 + signal.SIGPIPE
        finally:
            discard_unwritten()
        # The work is done, or its end is reported. What Python and its libraries do now
        # would answer a Ctrl-C with tracebacks.
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:  # before or after `run`
        if os.environ.get("LADDER_JAX_TRACEBACK"):
            raise
        print_safely("ladder-jax: interrupted", sys.stderr)
        status = 128 + signal.SIGINT
    sys.exit(status)


def run(words: list[str]) -> int:
    """Runs the command that `words` give, and returns its exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"ladder-jax {importlib.metadata.version('ladder_jax')}")
        return 0
    name = f"ladder-jax {words[0]}" if words[0] in COMMANDS else "ladder-jax"
    interrupt = InsistentInterrupt()
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(unknown("command", words[0], COMMANDS))
        # `train` and `serve` have handlers of their own while they train and serve.
        with interrupt:
            return COMMANDS[words[0]](words[1:])
    except (KeyboardInterrupt, Exception) as error:
        # An interrupt reaches Python code that C++ calls, too, and ends as its error.
        stopped = interrupt.pressed or isinstance(error, KeyboardInterrupt)
        if not (stopped or isinstance(error, EXPECTED)):
            raise
        if os.environ.get("LADDER_JAX_TRACEBACK"):
            raise
        if stopped:
            print_safely(f"{name}: interrupted", sys.stderr)
            return 128 + signal.SIGINT
        if isinstance(error, BrokenPipeError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print_safely(f"{name}: {text}", sys.stderr)
        if isinstance(error, Missing):
            return RETRY
        return 2 if isinstance(error, ConfigError) else 1


# The errors whose message is a line for the user.
EXPECTED = (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError)


def unknown(kind: str, word: str, known: Any) -> str:
    """The message about a `word` that is not among the `known` words of this kind."""
    near = near_matches(word, known)
    hint = f" (perhaps {' or '.join(near)})" if near else ""
    return f"unknown {kind} {word!r}; choose from {', '.join(known)}{hint}"
