"""`ladder-jax convert ladderize`: a pretrained model as a ladder or hybrid model.

The parameters of schedules with two blocks a layer are the same, so that only the
configuration changes: the new checkpoint's files of parameters are links to the old
one's. The model then needs training (distill.py): it has never read a stale stream.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax import checkpoint, model, schedule, sharding
from ladder_jax.arguments import POSITIONAL
from ladder_jax.config import (
    Config,
    ConfigError,
    Data,
    Mesh,
    from_meta,
    require,
    short_repr,
    to_dict,
)
from ladder_jax.convert import damage, folder
from ladder_jax.data import corpus as corpora
from ladder_jax.data.batches import held_out_batches
from ladder_jax.data.tokenizer import Tokenizer, from_json
from ladder_jax.say import say

FORMS = (
    "last:K (the last K layers), layers such as 3,5-9, auto:K (the K layers that cost "
    "the least on held-out text) or all"
)


@dataclass(frozen=True)
class Ladderize:
    """Turns a checkpoint into a ladder or hybrid one: the same parameters under another
    residual schedule, in a new run's folder. It then needs training: see
    docs/conversion.md."""

    checkpoint: str = field(metadata=POSITIONAL)
    """A run's folder, its checkpoints folder, or the folder of one step."""
    out: str = field(metadata=POSITIONAL)
    """The run's folder to write."""
    layers: str | None = None
    """The layers to make ladder: last:K, layers such as 3,5-9 (from 0), all, or auto:K.
    auto measures what each layer costs on held-out text, and takes the K cheapest."""
    residual: str | None = None
    """In place of --layers: a whole residual schedule, such as ladder:1,2 or
    delays:0,1,1,..."""
    data: str = "builtin"
    """The text of auto:K: builtin (Python's own documentation), or a folder, file or
    glob. Only documents are used that training on the same text holds out."""
    text_field: str = "text"
    """The field of JSONL rows and Parquet columns that holds the text."""
    tokens: int = 16384
    """How many tokens of that text auto:K measures on."""
    length: int | None = None
    """The tokens of a sequence of that text. None: 512, or the model's max_length if
    that is less."""
    held_out_fraction: float = 0.02
    """The share of the documents that is held out: data.held_out_fraction of the
    training that follows."""
    greedy: bool = False
    """Let auto:K measure again after each layer that it takes: better for many layers,
    and K times as slow."""
    token_cache: str = "~/.cache/ladder_jax"
    """The folder that stores the text's tokens."""
    step: int | None = None
    """The step of the checkpoint. None: the newest."""
    tensor: int = 1
    """Devices along the mesh's tensor axis while auto:K measures."""
    fsdp: int = 1
    """Devices along the mesh's fsdp axis while auto:K measures."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""


class Source(NamedTuple):
    """A checkpoint to convert."""

    folder: Path  # of its step
    meta: dict[str, Any]
    config: Config


def run(arguments: Ladderize) -> str:
    """Writes the new checkpoint. Returns the last line of output."""
    both = (arguments.layers is None) == (arguments.residual is None)
    if both:
        raise ConfigError("give one of --layers and --residual")
    out = folder.absolute(arguments.out)
    folder.require_new(out)
    path, meta = checkpoint.find(arguments.checkpoint, arguments.step)
    config = from_meta(meta, arguments.checkpoint)
    source = Source(Path(str(path)), meta, config)
    check_source(config, arguments.checkpoint)
    from_json(meta["tokenizer"])
    checkpoint.open_model(path, model.abstract(config.model))
    if source.folder.resolve() in out.resolve().parents:
        raise ConfigError(
            f"out={arguments.out!r} is not accepted: it is inside of the checkpoint"
        )
    notation = arguments.residual or choose(arguments, source)
    notation = checked(notation, config.model.layers)
    write(source, notation, out)
    return (
        f"done: {arguments.out} has {config.model.layers} layers, residual "
        f"{notation}: train it with --train.init-from {arguments.out} "
        f"--distill.parent {arguments.checkpoint}"
    )


def check_source(config: Config, where: str) -> None:
    """Raises ConfigError unless the checkpoint has two blocks a layer, one stream."""
    notation = config.model.residual
    plan = schedule.parse(notation, config.model.layers)
    if plan.local or len(plan.layers[0]) != 2:
        reason = "one norm a layer" if not plan.local else "a stream for every shard"
        raise ConfigError(
            f"checkpoint={where!r} is not accepted: its model.residual={notation!r} "
            f"has {reason}; it must be standard, ladder, hybrid or delays"
        )


def checked(notation: str, layers: int) -> str:
    """`notation`; ConfigError where it is no schedule of the same parameters."""
    try:
        plan = schedule.parse(notation, layers)
    except ValueError as error:
        raise ConfigError(f"residual={notation!r} is not accepted: {error}") from None
    if plan.local or len(plan.layers[0]) != 2:
        raise ConfigError(
            f"residual={notation!r} is not accepted: it must be a schedule of the same "
            "parameters and one stream: standard, ladder, hybrid or delays"
        )
    return notation


def choose(arguments: Ladderize, source: Source) -> str:
    """The notation of the schedule that --layers names."""
    count, text = source.config.model.layers, arguments.layers or ""
    kind, _, argument = text.partition(":")
    if kind == "auto":
        number = _count(text, argument, count)
        return notation_of(measured(arguments, source, number), count)
    if text == "all":
        return "ladder"
    if kind == "last":
        return f"hybrid:last{_count(text, argument, count)}"
    try:
        plan = schedule.parse(f"hybrid:{text}", count)
    except ValueError as error:
        require(False, "layers", text, f"{FORMS}: {error}")
    chosen = [i for i, blocks in enumerate(plan.layers) if blocks[0].delay]
    return notation_of(chosen, count)


def _count(text: str, argument: str, layers: int) -> int:
    is_number = argument.isdecimal() and 1 <= int(argument) <= layers
    require(is_number, "layers", text, f"{FORMS}; K from 1 to {layers}")
    return int(argument)


def notation_of(ladder_layers: Iterable[int], count: int) -> str:
    """The shortest notation of a model of `count` layers, some of which are ladder."""
    chosen = sorted(ladder_layers)
    if len(chosen) == count:
        return "ladder"
    if chosen == list(range(count - len(chosen), count)):
        return f"hybrid:last{len(chosen)}"
    ranges: list[list[int]] = []
    for layer in chosen:
        if ranges and ranges[-1][-1] == layer - 1:
            ranges[-1][1:] = [layer]
        else:
            ranges.append([layer])
    return "hybrid:" + ",".join("-".join(map(str, ends)) for ends in ranges)


# ---------------------------------------------------------------- auto:K


def measured(arguments: Ladderize, source: Source, number: int) -> list[int]:
    """The layers that auto:K takes. Prints what each layer costs."""
    require(arguments.tokens > 0, "tokens", arguments.tokens, "greater than 0")
    longest = source.config.model.max_length
    length = arguments.length or min(512, longest)
    require(
        0 < length <= longest, "length", length, f"from 1 to model.max_length={longest}"
    )
    model_config = dataclasses.replace(source.config.model, residual="ladder")
    mesh_config = Mesh(data=1, fsdp=arguments.fsdp, tensor=arguments.tensor)
    mesh = _mesh(mesh_config)
    sharding.check_fits(model_config, mesh)
    tokenizer = from_json(source.meta["tokenizer"])
    batches = _batches(arguments, tokenizer, length, mesh.shape[sharding.FSDP])
    shapes = sharding.abstract(model.abstract(model_config), mesh)
    parameters = checkpoint.load_model(str(source.folder), shapes)
    loss = damage.hybrid_loss(parameters, model_config, mesh, batches)
    standard, damages = damage.measure(loss, model_config.layers)
    if arguments.greedy:
        chosen = damage.cheapest_together(loss, model_config.layers, number, say)
    else:
        chosen = damage.cheapest(damages, number)
    say(damage.table(standard, damages, chosen))
    together = loss(chosen) - standard
    say(f"the {number} layers together add {together:+.4f}")
    return chosen


def _mesh(mesh_config: Mesh) -> Any:
    import jax

    devices = jax.devices()
    size = mesh_config.fsdp * mesh_config.tensor
    require(size <= len(devices), "tensor x fsdp", size, f"at most {len(devices)}")
    return sharding.make_mesh(mesh_config, devices[:size])


def _batches(
    arguments: Ladderize, tokenizer: Tokenizer, length: int, multiple: int
) -> list[Any]:
    """Rows of held-out text with about `arguments.tokens` tokens; prints the amount."""
    data = Data(
        source=arguments.data,
        text_field=arguments.text_field,
        token_cache=arguments.token_cache,
        held_out_fraction=arguments.held_out_fraction,
    )
    corpus = corpora.prepare(data, tokenizer).cut(length)
    rows = max(round(arguments.tokens / length), 1)
    batch = -(-min(rows, 8) // multiple) * multiple
    batches = held_out_batches(corpus, batch=batch, length=length)
    used = [batches[i] for i in range(min(-(-rows // batch), len(batches)))]
    tokens = int(sum(b["weights"].sum() for b in used))
    say(f"measuring on {tokens:,} held-out tokens of data {short_repr(arguments.data)}")
    return used


# ---------------------------------------------------------------- the files


def write(source: Source, notation: str, out: Path) -> None:
    """Writes `source`'s parameters under the schedule `notation` as a new run's folder.

    Files of parameters are hard links, or copies where the file system has no links.
    The folder appears when it is complete.
    """
    model_config = dataclasses.replace(source.config.model, residual=notation)
    config = dataclasses.replace(source.config, model=model_config)
    origin = dict(checkpoint=str(source.folder), residual=source.config.model.residual)
    meta = source.meta | dict(
        config=to_dict(config), parts=["model"], converted_from=origin, tensor=1
    )
    # What training stored beside the parameters is of the old model.
    for name in ("corpus", "documents", "anneal", "data"):
        meta.pop(name, None)
    with folder.new_folder(out) as part:
        step = part / "checkpoints" / "0"
        shutil.copytree(
            source.folder,
            step,
            ignore=_leave_out(source.folder),
            copy_function=_link,
        )
        path = step / "meta" / "data.json"
        path.unlink()  # of the old checkpoint, if it is a link
        path.write_text(json.dumps(meta))


def _leave_out(step: Path) -> Any:
    """What `shutil.copytree` leaves out: the optimizer and the data's position."""

    def names(current: str, entries: list[str]) -> set[str]:
        return {"optimizer", "data"} & set(entries) if Path(current) == step else set()

    return names


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
