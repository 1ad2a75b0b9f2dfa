"""Imports a checkpoint of another tool: weights onto a mesh, tokenizer, run folder.

Weights stream tensor by tensor: a tensor is read, each device gets its shard of it, and
the tensor's memory is free again before the next one is read.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ladder_jax import model as models
from ladder_jax import sharding
from ladder_jax.checkpoint import require_plain_name
from ladder_jax.checkpoint_arrays import named
from ladder_jax.config import Config, ConfigError, Model, Train, short_repr, to_dict
from ladder_jax.config import Data as DataConfig
from ladder_jax.convert import folder, layout
from ladder_jax.convert.families import Imported, read_config
from ladder_jax.convert.layout import Tensor
from ladder_jax.convert.needs import available, needs_of
from ladder_jax.convert.parts import Parts
from ladder_jax.convert.source import TensorSource, require_unchanged
from ladder_jax.convert.tensor_names import check_names
from ladder_jax.data import tokenizer as tokenizers
from ladder_jax.data.chat_template import check_template
from ladder_jax.data.post_processor import set_bos
from ladder_jax.data.tokenizer_files import write_special
from ladder_jax.say import Say

TOKENIZER = "tokenizer"  # the folder of the tokenizer's files, in the run's folder


class Import(NamedTuple):
    """A checkpoint of another tool, checked and ready to be read."""

    source: TensorSource
    imported: Imported
    tokenizer: tokenizers.Tokenizer

    @property
    def model(self) -> Model:
        return self.imported.model


# ---------------------------------------------------------------- checks


def prepare(
    source: TensorSource,
    *,
    residual: str | None = None,
    compute_dtype: str | None = None,
    tokenizer: str | None = None,
) -> Import:
    """Checks everything that can be checked without reading the weights.

    Args:
      source: the checkpoint.
      residual: a residual schedule for the model; None: the checkpoint's own.
      compute_dtype: model.dtype; None: float32 for float32 weights, else bfloat16.
      tokenizer: as data.tokenizer, in place of the checkpoint's own.

    Raises ConfigError, one line, for the first thing that is not accepted.
    """
    imported = read_config(source.config, f"{source.name}/config.json")
    infos = source.tensors
    imported = check_names(
        imported, infos, source.name, lambda a, b: _equal(source, a, b)
    )
    fields: dict[str, Any] = {} if residual is None else {"residual": residual}
    is_wide = {info.dtype.itemsize for info in infos.values()} <= {4, 8}
    fields["dtype"] = compute_dtype or ("float32" if is_wide else "bfloat16")
    model = dataclasses.replace(imported.model, **fields)
    shares_norms = model.residual == "parallel" != imported.model.residual
    if shares_norms:
        raise ConfigError(
            "residual='parallel' is not accepted: its layers have one norm, and the "
            f"layers of {source.name} have two"
        )
    imported = imported._replace(model=model)
    return Import(source, imported, tokenizer_of(source, model, tokenizer))


def _equal(source: TensorSource, name: str, other: str) -> bool:
    """Whether two tensors have the same values. One of them is held at a time."""
    return _digest(source.read(name)) == _digest(source.read(other))


def _digest(array: np.ndarray) -> str:
    """A digest of an array's values, whatever its dtype."""
    digest = hashlib.sha256()
    for row in array:  # a tensor of float64 would be as large as four of bfloat16
        digest.update((row.astype(np.float64) + 0.0).tobytes())  # -0.0 is 0.0, too
    return digest.hexdigest()


def tokenizer_of(
    source: TensorSource, model: Model, spec: str | None
) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint, or the user's. It must fit the vocabulary."""
    name = f"the tokenizer of {source.name}"
    if spec is not None:
        name = f"tokenizer={short_repr(spec)}"
        tokenizer = tokenizers.load(spec)
    else:

        def read(name: str) -> str | None:
            # A source's config need not be a file.
            return source.text(name) if name != "config.json" else _ids_of(source)

        try:
            tokenizer = tokenizers.from_files(read, name)
        except ConfigError as error:
            raise ConfigError(
                f"{name} is not accepted: {error} (--tokenizer names another)"
            ) from None
    try:
        check_template(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{name} is not accepted: {error}") from None
    if tokenizer.size > model.vocab_size:
        raise ConfigError(
            f"{name} has {tokenizer.size} ids, but the embedding of {source.name} has "
            f"{model.vocab_size} rows: some of its tokens have none"
        )
    return tokenizer


def _ids_of(source: TensorSource) -> str:
    return json.dumps({"eos_token_id": source.config.get("eos_token_id")})


# ---------------------------------------------------------------- weights


def place(job: Import, mesh: Mesh, dtype: str = "float32") -> models.Transformer:
    """Reads the weights onto a mesh. Returns the model, its parameters in `dtype`.

    The host holds one tensor of the checkpoint at a time; a device holds its shards,
    and its part of that tensor.
    """
    files = job.source.files()
    shapes = models.abstract(job.model)
    placer = _placer(job, mesh, dtype)
    placed: dict[str, jax.Array] = {}
    for tensor in job.imported.tensors:
        placed |= placer(tensor)
    require_unchanged(job.source, files)
    names = jax.tree.leaves(sharding.parameter_names(shapes))
    leaves = [placed[name] for name in names]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _placer(
    job: Import, mesh: Mesh, dtype: str
) -> Callable[[Tensor], dict[str, jax.Array]]:
    """The function that reads the parameters which a tensor holds onto a mesh."""
    shapes = models.abstract(job.model)
    names = jax.tree.leaves(sharding.parameter_names(shapes))
    specs = dict(zip(names, jax.tree.leaves(sharding.parameter_specs(shapes))))
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return lambda tensor: _place(job, tensor, mesh, specs, numpy_dtype)


def _place(
    job: Import, tensor: Tensor, mesh: Mesh, specs: dict[str, P], dtype: np.dtype
) -> dict[str, jax.Array]:
    """The parameters that a tensor holds, of all layers where it is one of a layer."""
    model = job.model
    layers = model.layers if tensor.stacked else 1
    placed: dict[str, jax.Array] = {}
    for layer in range(layers):
        foreign = tensor.name.format(layer)
        array = job.source.read(foreign)
        name = f"{job.source.name}: {foreign}"
        for part, view in layout.to_ours(array, tensor, model).items():
            spec = specs[part]
            if not tensor.stacked:
                placed[part] = _put(
                    view, tensor, name, NamedSharding(mesh, spec), dtype
                )
                continue
            stack_sharding = NamedSharding(mesh, spec)
            if layer == 0:
                shape = (layers, *view.shape)
                placed[part] = jnp.zeros(shape, dtype, device=stack_sharding)
            one = _put(view, tensor, name, NamedSharding(mesh, P(*spec[1:])), dtype)
            placed[part] = _writer(stack_sharding)(placed[part], one, layer)
        # Without this, the host would read ahead of the devices, and hold what it read.
        jax.block_until_ready(list(placed.values()))
    return placed


@functools.lru_cache(maxsize=64)
def _writer(where: NamedSharding) -> Callable[..., jax.Array]:
    """The compiled function that writes one layer into a stack, in place."""

    def write(stack: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(stack, one, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=where)


def _put(
    view: np.ndarray,
    tensor: Tensor,
    name: str,
    where: NamedSharding,
    dtype: np.dtype,
) -> jax.Array:
    """A parameter on its devices; the host copies one shard at a time.

    name: of the tensor that it comes from, in messages.
    """

    def shard(index: Any) -> np.ndarray:
        part = view[index]
        if (tensor.scale, tensor.offset) != (1.0, 0.0):
            part = part.astype(np.float32) * np.float32(tensor.scale)
            part += np.float32(tensor.offset)
        # A copy: on a CPU, JAX keeps NumPy's memory, which would be the whole tensor.
        with np.errstate(over="ignore"):
            copy = np.array(part, dtype, order="C")
        if not _is_finite(copy):
            raise ConfigError(
                f"{name} holds NaN, infinity, or a number that {dtype} cannot hold: "
                "the model would compute nothing but NaN"
            )
        return copy

    return jax.make_array_from_callback(view.shape, where, shard)


def _is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; looked at some values at a time."""
    flat = array.reshape(-1)
    step = 1 << 20  # temporary memory: a byte each
    parts = (flat[i : i + step] for i in range(0, flat.size, step))
    return all(bool(np.isfinite(part).all()) for part in parts)


# ---------------------------------------------------------------- a run's folder


def write_run(job: Import, out: str | Path, mesh: Mesh, dtype: str, say: Say) -> Path:
    """Writes the run folder `out`: a checkpoint of step 0, and the tokenizer's files.

    Parameters are read and saved one after another: a device holds its part of one of
    them. The folder appears when it is complete. An import that is cut off leaves the
    parameters that are whole, and the same import goes on after them.

    Raises ConfigError where disk or memory do not suffice, before anything is read or
    written.
    """
    path = check(job, out, mesh, dtype, say)
    config = config_of(job, path)
    meta = dict(
        config=to_dict(config),
        tensor=mesh.shape[sharding.TENSOR],
        tokenizer=job.tokenizer.to_json(),
        source=job.source.name,
    )
    files = job.source.files()
    parts = Parts([meta, files, dtype, dict(mesh.shape)], job.model)
    names = _checkpoint_names(job.model)
    placer = _placer(job, mesh, dtype)
    with folder.new_folder(path, parts) as part:
        if line := folder.kept_text(parts, len(parts.saved), len(names), "parameters"):
            say(line)
        for tensor in job.imported.tensors:
            if not {names[name] for name in tensor.parts} <= set(parts.saved):
                try:
                    arrays = placer(tensor)
                    require_unchanged(job.source, files)
                except ConfigError:  # another source is needed
                    parts.forget()
                    raise
                parts.save(part, {names[name]: x for name, x in arrays.items()})
                del arrays
        (part / TOKENIZER).mkdir()
        write_tokenizer_files(job.tokenizer, part / TOKENIZER)
        parts.end(part, meta)
    return path


def _checkpoint_names(model: Model) -> dict[str, str]:
    """The names of parameters in a checkpoint by those of sharding.PARAMETERS."""
    shapes = models.abstract(model)
    names = jax.tree.leaves(sharding.parameter_names(shapes))
    return dict(zip(names, named(shapes)))


def check(job: Import, out: str | Path, mesh: Mesh, dtype: str, say: Say) -> Path:
    """Checks what `write_run` needs, and says it. Returns the absolute path of `out`.

    Raises ConfigError as `write_run` does.
    """
    path = folder.absolute(out)
    require_plain_name(path, "out")
    folder.require_new(path)
    sharding.check_fits(job.model, mesh)
    groups = [tensor.parts for tensor in job.imported.tensors]
    needs = needs_of(job.model, dtype, mesh, groups)
    say(needs.text())
    needs.check(available(path, mesh))
    return path


def config_of(job: Import, out: Path) -> Config:
    """The configuration of an imported model: its model, and defaults that fit it."""
    length = min(Train().seq_len, job.model.max_length)
    is_bytes = isinstance(job.tokenizer, tokenizers.ByteTokenizer)
    return Config(
        model=job.model,
        data=DataConfig(tokenizer="bytes" if is_bytes else str(out / TOKENIZER)),
        train=Train(out=str(out), seq_len=length),
    )


def write_tokenizer_files(
    tokenizer: tokenizers.Tokenizer, path: Path, *, for_others: bool = False
) -> None:
    """Writes tokenizer.json and the files beside it into a folder.

    for_others: whether other programs will read it. They ignore add_bos_token, so
    tokenizer.json says it itself.
    """
    special, text = tokenizer.special, tokenizer.tokenizer_json()
    if for_others and special.add_bos is not None and "bos" in special.names:
        text = set_bos(text, special.names["bos"], special.add_bos)
    files = write_special(special) | {"tokenizer.json": text}
    for name, content in files.items():
        (path / name).write_text(content, encoding="utf-8")
