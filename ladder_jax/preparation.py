"""Checks a training run before it starts: its configuration, data and folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ladder_jax import initial, mirror, schedule, sharding
from ladder_jax.addresses import is_address
from ladder_jax.checkpoint import read_meta, require_plain_name, saved_steps
from ladder_jax.config import Config, ConfigError, Data, Model, from_meta, to_dict
from ladder_jax.data import corpus as corpora
from ladder_jax.data import token_cache
from ladder_jax.data import tokenizer as tokenizers
from ladder_jax.data.remote import with_local_source
from ladder_jax.hardware import group as groups
from ladder_jax.metrics import require_tensorboard
from ladder_jax.say import Say


class Job(NamedTuple):
    """A run after `prepare` has checked its configuration, data and folder."""

    config: Config  # with the model of train.init_from
    parent: Model | None  # the shape of distill.parent
    mesh: jax.sharding.Mesh
    tokenizer: tokenizers.Tokenizer
    corpus: corpora.Corpus
    out: Path
    meta: dict[str, Any]  # JSON that goes into every checkpoint
    saved: bool  # whether there is a checkpoint to resume from


def prepare(config: Config, resume: bool, say: Say) -> Job:
    """Checks the whole configuration. The only thing that it writes is the token cache.

    Raises ConfigError for the first mistake.
    """
    mesh = sharding.make_mesh(config.mesh)
    out = mirror.work_folder(config.train)
    saved = saved_steps(out / "checkpoints")
    config, tokenizer, origin = initial.resolve(config, out, bool(saved and resume))
    check_anneal(config)
    check_vocabulary(config, mesh, tokenizer)
    rows = config.train.global_batch // config.train.grad_accum_steps
    sharding.check_fits(config.model, mesh, rows)
    sharding.data_shard(mesh)
    if config.train.tensorboard:
        require_tensorboard()
    check_writable(out, config.train.out)
    require_plain_name(out, "train.out")
    if saved and not resume:
        raise ConfigError(
            f"{out} already holds a run, at step {saved[-1]}: "
            "continue it with --resume, or choose another --train.out"
        )
    meta = dict(
        config=to_dict(config),
        tensor=mesh.shape[sharding.TENSOR],
        tokenizer=tokenizer.to_json(),
    )
    before = read_meta(out) if saved else meta
    check_resumed(before, meta, out)
    parent = initial.parent_model(config, mesh, tokenizer)
    corpus = prepare_corpus(config.data, tokenizer).cut(config.train.seq_len)
    for line in (origin, corpus.report):
        if line:
            say(line)
    meta["corpus"] = [corpus.train.tokens, corpus.held_out.tokens]
    meta["documents"] = corpus.digest
    check_resumed(meta | before, meta, out)
    return Job(config, parent, mesh, tokenizer, corpus, out, meta, bool(saved))


def check_anneal(config: Config) -> None:
    """Raises ConfigError where distill.anneal_steps has no delay to anneal."""
    notation, layers = config.model.residual, config.model.layers
    blocks = [b for layer in schedule.parse(notation, layers).layers for b in layer]
    if config.distill.anneal_steps and not any(block.delay for block in blocks):
        raise ConfigError(
            f"distill.anneal_steps={config.distill.anneal_steps} is not accepted with "
            f"model.residual={notation!r}, which has no delay: it must be 0"
        )


def check_vocabulary(
    config: Config, mesh: jax.sharding.Mesh, tokenizer: tokenizers.Tokenizer
) -> None:
    """Raises ConfigError where model.vocab_size does not fit tokenizer or mesh."""
    size, tensor = config.model.vocab_size, mesh.shape[sharding.TENSOR]
    if size < tokenizer.size:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the {tokenizer.size} tokens of "
            f"data.tokenizer={config.data.tokenizer!r}: it must be at least that"
        )
    if size % tensor:
        # No text contains the ids from the tokenizer's size on: the model learns not to
        # predict them, and sampling never draws them.
        raise ConfigError(
            f"model.vocab_size={size} does not divide by mesh.tensor={tensor}: use "
            f"--model.vocab-size {size + -size % tensor}, which pads the embedding "
            "with ids that the tokenizer does not use"
        )


def check_writable(out: Path, value: str) -> None:
    """Raises ConfigError where train.out=`value`, the folder `out`, is not writable."""
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(
            f"train.out={value!r} is not accepted: {parent} is not a folder that can "
            "be written to"
        )


# The fields that a resumed run may not change. None: every field of the section.
FROZEN: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "data": ("format", "text_field", "train_on", "held_out_fraction"),
    "train": ("global_batch", "seq_len", "seed"),
}


def check_resumed(
    saved: Mapping[str, Any], now: Mapping[str, Any], where: object = "the run"
) -> None:
    """Raises ConfigError where a resumed run would differ from the saved run.

    Args:
      saved: a checkpoint's meta (checkpoint.read_meta).
      now: the meta that this run would save.
      where: names the checkpoint.
    """

    def same(name: str, old: object, new: object, advice: str) -> None:
        if old != new:
            raise ConfigError(
                f"{name} was {old!r} in the run to resume and is {new!r} now: {advice}"
            )

    before, after = from_meta(saved, where), from_meta(now, where)
    advice = "keep it, or start a new run in another train.out"
    for section, names in FROZEN.items():
        old, new = getattr(before, section), getattr(after, section)
        for name in names or to_dict(new):
            same(f"{section}.{name}", getattr(old, name), getattr(new, name), advice)
    residual = after.model.residual
    if schedule.parse(residual, after.model.layers).local:
        advice = f"a {residual} model keeps it for life"
        same("mesh.tensor", saved["tensor"], now["tensor"], advice)
    # The files may have moved. An old checkpoint has no digest of the documents.
    for field, contents in (
        ("tokenizer", "tokenizer"),
        ("source", "corpus"),
        ("source", "documents"),
    ):
        if contents not in saved or contents not in now:
            continue
        old, new = saved[contents], now[contents]
        if contents == "tokenizer":  # what belongs to prompts alone may change
            old, new = (tokenizers.from_json(x).documents_json() for x in (old, new))
        if old != new:
            value = getattr(after.data, field)
            raise ConfigError(
                f"data.{field}={value!r} has other contents now than in the run to "
                "resume: restore them, or start a new run in another train.out"
            )


def prepare_corpus(
    data_config: Data, tokenizer: tokenizers.Tokenizer
) -> corpora.Corpus:
    """The corpus. All processes share the work, where there are no tokens yet."""
    group = groups.current()
    if group is None:
        return corpora.prepare(data_config, tokenizer)
    if is_address(data_config.source):
        group.first("a copy of data.source", lambda: with_local_source(data_config))
    workers = max(token_cache.cores() // group.on_this_host(), 1)
    say = None if group.number == 0 else lambda _: None
    return group.together(
        "the tokens of data.source",
        lambda: corpora.prepare(data_config, tokenizer, workers, say),
    )
