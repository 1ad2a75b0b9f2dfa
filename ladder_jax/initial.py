"""What a run takes from other runs' checkpoints: first weights, tokenizer, parent."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax import model, schedule, sharding
from ladder_jax.checkpoint import load_model, read_meta
from ladder_jax.config import Config, ConfigError, Model, from_meta, to_dict
from ladder_jax.data import tokenizer as tokenizers
from ladder_jax.data.tokenizer import Tokenizer

DEFAULTS = Config()
# Fields of model that may differ from the checkpoint's: no parameter depends on them.
FREE = ("residual", "dtype", "max_length", "rope_theta", "rope_scaling", "init_std")


class Origin(NamedTuple):
    """The configuration of a run whose first weights come from a checkpoint."""

    config: Config  # with the checkpoint's model where the run's own has its defaults
    tokenizer: Tokenizer
    report: str | None  # a line about the checkpoint; None: random weights


def resolve(config: Config, out: Path, saved: bool) -> Origin:
    """Takes model and tokenizer from train.init_from; raises ConfigError on a misfit.

    A run that has `saved` a checkpoint into its folder `out` takes them from there: the
    checkpoint that it started from may be gone.
    """
    path = config.train.init_from
    if not path:
        return Origin(config, tokenizers.load(config.data.tokenizer), None)
    where = out if saved else path
    meta = _meta(where, "train.out" if saved else "train.init_from")
    there = from_meta(meta, where).model
    if config.model == DEFAULTS.model:
        config = dataclasses.replace(config, model=there)
    _check_model(config.model, there, str(where))
    tokenizer = _tokenizer(config, meta, str(where))
    changes = [
        f"model.{name} is {getattr(config.model, name)!r} here and "
        f"{getattr(there, name)!r} there"
        for name in FREE
        if getattr(config.model, name) != getattr(there, name)
    ]
    report = f"starts with the weights and the tokenizer of {path}"
    return Origin(config, tokenizer, "; ".join([report, *changes]))


def _meta(path: object, name: str) -> dict[str, Any]:
    try:
        return read_meta(str(path))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _check_model(here: Model, there: Model, where: str) -> None:
    """Raises ConfigError unless parameters of a model `there` fit the model `here`."""
    for name, value in to_dict(here).items():
        old = to_dict(there)[name]
        if name not in FREE and value != old:
            raise ConfigError(
                f"model.{name}={value!r} is not accepted: the checkpoint {where} has "
                f"{old!r}. Leave the whole section model at its defaults to take the "
                "checkpoint's"
            )
    blocks = [
        len(schedule.parse(m.residual, m.layers).layers[0]) for m in (here, there)
    ]
    if blocks[0] != blocks[1]:
        raise ConfigError(
            f"model.residual={here.residual!r} is not accepted: the checkpoint {where} "
            f"has {there.residual!r}, and a layer of parallel has one norm, where "
            "others have two"
        )


def _tokenizer(config: Config, meta: dict[str, Any], where: str) -> Tokenizer:
    """The checkpoint's tokenizer; ConfigError if data.tokenizer names another one."""
    there = tokenizers.from_json(meta["tokenizer"])
    name = config.data.tokenizer
    if name == DEFAULTS.data.tokenizer:
        return there
    here = tokenizers.load(name)
    if here.tokenizer_json() != there.tokenizer_json():
        raise ConfigError(
            f"data.tokenizer={name!r} is not the tokenizer of the checkpoint {where}: "
            "leave it at its default to take the checkpoint's"
        )
    return here


def load_weights(config: Config, mesh: jax.sharding.Mesh) -> model.Transformer:
    """The parameters of train.init_from on `mesh`, in float32."""
    shapes = sharding.abstract(model.abstract(config.model), mesh)
    return load_model(config.train.init_from, shapes)


# ---------------------------------------------------------------- the parent


def parent_model(
    config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer
) -> Model | None:
    """The shape of distill.parent, which computes in the run's dtype; None: no parent.

    Raises ConfigError where the parent does not fit the run.
    """
    path = config.distill.parent
    if not path:
        return None
    meta = _meta(path, "distill.parent")
    parent = from_meta(meta, path).model

    def need(ok: bool, reason: str) -> None:
        if not ok:
            raise ConfigError(f"distill.parent={path!r} is not accepted: {reason}")

    for name, value in (("vocab_size", config.model.vocab_size),):
        size = getattr(parent, name)
        need(size == value, f"it has model.{name}={size}, and this model has {value}")
    there = tokenizers.from_json(meta["tokenizer"])
    need(
        there.tokenizer_json() == tokenizer.tokenizer_json(),
        "its tokenizer is another one than this run's",
    )
    length = config.train.seq_len
    need(
        parent.max_length >= length,
        f"it has model.max_length={parent.max_length}, and train.seq_len is {length}",
    )
    need(
        config.distill.top_k < config.model.vocab_size,
        f"distill.top_k={config.distill.top_k} must be below "
        f"model.vocab_size={config.model.vocab_size}",
    )
    is_local = schedule.parse(parent.residual, parent.layers).local
    tensor, trained = mesh.shape[sharding.TENSOR], meta.get("tensor", 1)
    need(
        not is_local or tensor == trained,
        f"it is a {parent.residual} model of mesh.tensor={trained}, and mesh.tensor is "
        f"{tensor}",
    )
    sharding.check_fits(parent, mesh)
    return dataclasses.replace(parent, dtype=config.model.dtype)


def load_parent(path: str, parent: Model, mesh: jax.sharding.Mesh) -> model.Transformer:
    """The parent's parameters on `mesh`; all but norms in the compute dtype.

    A step reads them and never writes them, so that float32 would be a waste.
    """
    shapes = model.abstract(parent)

    def cast(role: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if role == "norm" else jnp.dtype(parent.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype)

    shapes = jax.tree.map(cast, sharding.parameter_roles(shapes), shapes)
    return load_model(path, sharding.abstract(shapes, mesh))
