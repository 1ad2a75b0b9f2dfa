"""The command `ladder-jax generate`: a prompt, a conversation, or a file of prompts."""

import sys
from dataclasses import dataclass, field
from typing import Any

from ladder_jax.arguments import BARE, FLAT, POSITIONAL
from ladder_jax.config import Decode, Mesh, require
from ladder_jax.hardware.distributed import Hosts


@dataclass(frozen=True)
class Arguments:
    """Prints a model's continuation of a prompt, token by token. With --prompts-file,
    decodes many prompts together and writes the outputs to a file."""

    checkpoint: str = field(metadata=POSITIONAL)
    """A run's folder, its checkpoints folder, or the folder of one step."""
    prompt: str = ""
    """The text to continue. Empty: a new document, from the tokenizer's begin token, or
    from its end token if it has no begin token."""
    chat: str | None = field(default=None, metadata={BARE: ""})
    """A question to answer, by the tokenizer's chat template. Without a text: the lines
    of stdin are the turns of a conversation."""
    system: str = ""
    """The system message of --chat."""
    prompts_file: str | None = None
    """A JSONL file with one prompt, or messages, a line. A line may set options of its
    own; the options of the command line are its defaults."""
    out: str = "out.jsonl"
    """The file for the outputs of --prompts-file. Outputs that it already holds are not
    generated again."""
    max_tokens: int | None = None
    """The most tokens to generate. None: 200, or fewer if the model's max_length is
    reached first."""
    min_tokens: int = 0
    """The fewest tokens to generate before the end token or a stop string can end the
    output."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn. 0: always the most probable token."""
    top_k: int = 0
    """Draw from this many most probable tokens. 0: from all tokens."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this probability."""
    seed: int = 0
    """Seeds the random draws. With --prompts-file, each row gets a seed of its own from
    this one."""
    stop: tuple[str, ...] = ()
    """Generation stops at the first of these strings, which the output leaves out."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids of tokens at which generation stops. By default, the tokenizer's
    end token; with --chat, also the end of a turn."""
    ignore_eos: bool = False
    """Do not stop at the tokenizer's end token, nor at the end of a turn."""
    step: int | None = None
    """The step of the checkpoint. None: the newest."""
    tensor: int | None = None
    """Devices to shard the model over. None: 1; for desync and dtp, as in training."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    hosts: Hosts = field(default_factory=Hosts, metadata=FLAT)
    decode: Decode = field(
        default_factory=lambda: Decode(slots=16, burst_ms=0), metadata=FLAT
    )


def run(arguments: Arguments) -> int:
    """Runs the command, once the processes have joined, and returns its exit status."""
    import jax

    from ladder_jax.loading import load

    tensor = arguments.tensor
    if tensor is None and jax.process_count() > 1:
        tensor = jax.device_count()
    mesh_config = None if tensor is None else Mesh(data=1, tensor=tensor)
    loaded = load(
        arguments.checkpoint,
        step=arguments.step,
        mesh=mesh_config,
        weights_dtype=arguments.decode.weights_dtype,
    )
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    options = {name: getattr(arguments, name) for name in names}
    options["stop_token_ids"] = arguments.stop_token_ids or None
    # Outputs of --prompts-file that lack newer options can be continued.
    newer = {name: getattr(arguments, name) for name in ("min_tokens", "ignore_eos")}
    options |= {name: value for name, value in newer.items() if value}
    if arguments.prompts_file is not None:
        return generate_file(arguments.prompts_file, arguments, loaded, options)
    if arguments.chat is not None:
        from ladder_jax.chat import converse, typed_lines

        questions = [arguments.chat] if arguments.chat else typed_lines()
        converse(loaded, questions, options, system=arguments.system)
        return 0
    for text in loaded.generate(arguments.prompt, **options):
        print(text, end="", flush=True)
    print(flush=True)
    return 0


def check_one_prompt(arguments: Arguments) -> None:
    """Raises ConfigError where options say more than one thing to generate from."""
    if arguments.hosts.distributed:
        value = arguments.prompts_file
        require(value, "prompts-file", value, "a file with --distributed")
    if arguments.chat is None:
        require(
            not arguments.system, "system", arguments.system, "empty without --chat"
        )
        return
    for name in ("prompt", "prompts_file"):
        value = getattr(arguments, name)
        require(not value, name.replace("_", "-"), value, "left out with --chat")


def generate_file(
    path: str, arguments: Arguments, loaded: Any, options: dict[str, Any]
) -> int:
    """Decodes a file of prompts with the engine. Returns 1 if a row failed, or 0."""
    from ladder_jax.serve import offline
    from ladder_jax.serve.engine import Engine

    engine = Engine(
        loaded.model,
        loaded.config.model,
        loaded.mesh,
        arguments.decode,
        loaded.tokenizer,
    )
    import jax

    leads = jax.process_index() == 0
    if leads:
        print(engine.report(), file=sys.stderr)
    count, before, failed = offline.run(
        engine, path, arguments.out, options, model=loaded.model
    )
    text = f"done: {count} outputs in {arguments.out}"
    text += f", {before} were there already" if before else ""
    text += f", {failed} of them errors" if failed else ""
    if leads:
        print(text, flush=True)
    return 1 if failed else 0
