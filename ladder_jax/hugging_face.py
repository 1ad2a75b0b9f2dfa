"""Hugging Face checkpoints in notebooks: `load_hf` and `save_hf`."""

from collections.abc import Sequence
from pathlib import Path

import jax

from ladder_jax import sharding
from ladder_jax.checkpoint import read_meta
from ladder_jax.config import Mesh, from_meta, require, to_bytes
from ladder_jax.convert import from_hf, to_hf
from ladder_jax.convert.needs import BYTES
from ladder_jax.convert.safetensors_source import open_source
from ladder_jax.convert.weights import InMemory, OnDisk, Weights
from ladder_jax.data.tokenizer import from_json
from ladder_jax.loading import Loaded

DTYPES = tuple(BYTES)


def load_hf(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    devices: Sequence[jax.Device] | None = None,
    residual: str | None = None,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    tokenizer: str | None = None,
) -> Loaded:
    """Returns a Hugging Face checkpoint as a model on a mesh; nothing is written.

    Args:
      path: a folder with config.json, safetensors and tokenizer.json, or a name on the
        Hugging Face Hub such as org/model.
      mesh: a config.Mesh to shard the model over (default: one device).
      devices: the devices (default: as many of jax.devices() as the mesh needs).
      residual: a residual schedule (default: the checkpoint's own, mostly standard).
        The weights stay as they are: with another schedule the model needs training.
      dtype: of the parameters, float32 or bfloat16.
      compute_dtype: of the computation (default: float32 for float32 weights, else
        bfloat16).
      tokenizer: as data.tokenizer, in place of the checkpoint's own.

    Raises ConfigError, one line, where the checkpoint is damaged, its family or a
    feature of it is not supported, or it does not fit the mesh.
    """
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    accepted = f"None or one of {', '.join(DTYPES)}"
    require(compute_dtype in (None, *DTYPES), "compute_dtype", compute_dtype, accepted)
    job = from_hf.prepare(
        open_source(path),
        residual=residual,
        compute_dtype=compute_dtype,
        tokenizer=tokenizer,
    )
    mesh_config = mesh or Mesh(data=1)
    sizes = mesh_config.data, mesh_config.fsdp, mesh_config.tensor
    if devices is None and -1 not in sizes:
        devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    device_mesh = sharding.make_mesh(mesh_config, devices)
    sharding.check_fits(job.model, device_mesh)
    config = from_hf.config_of(job, Path("runs") / Path(str(path)).name)
    model = from_hf.place(job, device_mesh, dtype)
    return Loaded(model, config, job.tokenizer, device_mesh)


def save_hf(
    what: Loaded | str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    shard_size: str = "5GB",
) -> Path:
    """Writes a model as a folder that transformers loads; returns its path.

    A checkpoint is read tensor by tensor. If its export is cut off, the same call goes
    on after the files that are whole.

    Args:
      what: a model of `load` or `load_hf`, or the path of a checkpoint.
      out: the folder, which must not exist.
      step: the step of a checkpoint (default: the newest).
      dtype: of the weights, float32 or bfloat16.
      shard_size: the largest size of a file, such as 5GB.

    Raises ConfigError where no class can compute the model, or `out` exists.
    """
    require(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    shard_bytes = to_bytes(shard_size, "shard_size")
    weights: Weights
    if isinstance(what, tuple):
        model_config, tokenizer = what.config.model, what.tokenizer
        weights = InMemory(what.model)
    else:
        meta = read_meta(what, step)
        model_config = from_meta(meta, what).model
        to_hf.check(model_config, out)
        tokenizer = from_json(meta["tokenizer"])
        weights = OnDisk(what, model_config, step)
    return to_hf.write_hf(
        weights,
        model_config,
        tokenizer,
        out,
        dtype=dtype,
        shard_bytes=shard_bytes,
    )
