"""The command `ladder-jax convert`: checkpoints of other tools, in and out."""

from dataclasses import dataclass, field
from typing import Literal

import jax

from ladder_jax import checkpoint, sharding
from ladder_jax.arguments import POSITIONAL
from ladder_jax.config import ConfigError, Mesh, Model, from_meta, require, to_bytes
from ladder_jax.convert import folder, from_hf, ladderize, to_hf
from ladder_jax.convert.needs import Available, export_needs
from ladder_jax.convert.safetensors_source import open_source
from ladder_jax.convert.source import TensorSource
from ladder_jax.convert.weights import OnDisk
from ladder_jax.data.tokenizer import from_json
from ladder_jax.hardware.memory import host_memory
from ladder_jax.say import say

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class FromHf:
    """Imports a Hugging Face checkpoint: writes a run's folder, which generate, train
    and the engine read."""

    source: str = field(metadata=POSITIONAL)
    """A folder with config.json, or a name on the Hugging Face Hub such as
    org/model."""
    out: str = field(metadata=POSITIONAL)
    """The run's folder to write."""
    residual: str | None = None
    """The residual schedule. None: the checkpoint's own, mostly standard. The weights
    stay as they are: with another schedule the model needs training."""
    dtype: Dtype = "float32"
    """The dtype of the stored parameters."""
    compute_dtype: Dtype | None = None
    """The dtype of the computation (model.dtype). None: float32 for float32 weights,
    else bfloat16."""
    tokenizer: str | None = None
    """A tokenizer.json or tokenizer.model, or a folder with one, in place of the
    checkpoint's own."""
    tensor: int = 1
    """Devices along the mesh's tensor axis while converting."""
    fsdp: int | None = None
    """Devices along the mesh's fsdp axis. None: as many as there are."""
    devices: int | None = None
    """Emulate this many devices on the CPU."""
    dry_run: bool = False
    """Check everything, print what the conversion needs, and write nothing."""


@dataclass(frozen=True)
class FromGguf(FromHf):
    """Imports a GGUF file of a Llama-like model: writes a run's folder."""

    source: str = field(metadata=POSITIONAL)
    """A .gguf file."""


@dataclass(frozen=True)
class ToHf:
    """Exports a checkpoint as a folder that transformers loads. The host reads it
    tensor by tensor. The same command goes on with an export that was cut off."""

    checkpoint: str = field(metadata=POSITIONAL)
    """A run's folder, its checkpoints folder, or the folder of one step."""
    out: str = field(metadata=POSITIONAL)
    """The folder to write."""
    dtype: Dtype = "float32"
    """The dtype of the weights; bfloat16 rounds them."""
    shard_size: str = "5GB"
    """The largest size of a file; larger models get several and an index."""
    step: int | None = None
    """The step of the checkpoint. None: the newest."""
    dry_run: bool = False
    """Check everything, print what the conversion needs, and write nothing."""


KINDS: dict[str, type] = {
    "from-hf": FromHf,
    "to-hf": ToHf,
    "from-gguf": FromGguf,
    "ladderize": ladderize.Ladderize,
}


def run(arguments: FromHf | ToHf | ladderize.Ladderize) -> str:
    """Converts. Returns the last line of output."""
    if isinstance(arguments, ladderize.Ladderize):
        return ladderize.run(arguments)
    if isinstance(arguments, ToHf):
        return _export(arguments)
    return _import(arguments, _open(arguments))


def _open(arguments: FromHf) -> TensorSource:
    if not isinstance(arguments, FromGguf):
        return open_source(arguments.source)
    from ladder_jax.convert.gguf_source import open_gguf

    return open_gguf(arguments.source)


def _import(arguments: FromHf, source: TensorSource) -> str:
    job = from_hf.prepare(
        source,
        residual=arguments.residual,
        compute_dtype=arguments.compute_dtype,
        tokenizer=arguments.tokenizer,
    )
    mesh = mesh_for(job.model, arguments.tensor, arguments.fsdp)
    for note in job.imported.notes:
        say(note)
    if arguments.dry_run:
        from_hf.check(job, arguments.out, mesh, arguments.dtype, say)
        return "done: nothing is written (dry run)"
    path = from_hf.write_run(job, arguments.out, mesh, arguments.dtype, say)
    return f"done: {arguments.out}: try ladder-jax generate {path} --prompt ..."


def _export(arguments: ToHf) -> str:
    meta = checkpoint.read_meta(arguments.checkpoint, arguments.step)
    config = from_meta(meta, arguments.checkpoint)
    shard_bytes = to_bytes(arguments.shard_size, "shard_size")
    require(shard_bytes > 0, "shard_size", arguments.shard_size, "greater than 0")
    path = folder.absolute(arguments.out)
    to_hf.check(config.model, path)
    weights = OnDisk(arguments.checkpoint, config.model, arguments.step)
    needs = export_needs(config.model, arguments.dtype, weights.memory(shard_bytes))
    say(needs.text())
    needs.check(Available(folder.free_disk(path), host_memory()))
    if arguments.dry_run:
        return "done: nothing is written (dry run)"
    to_hf.write_hf(
        weights,
        config.model,
        from_json(meta["tokenizer"]),
        path,
        dtype=arguments.dtype,
        shard_bytes=shard_bytes,
        say=say,
    )
    return f"done: {arguments.out}: AutoModelForCausalLM.from_pretrained loads it"


def mesh_for(model: Model, tensor: int, fsdp: int | None) -> jax.sharding.Mesh:
    """A mesh for one conversion, over as many devices as divide the model."""
    require(tensor > 0, "tensor", tensor, "greater than 0")
    require(fsdp is None or fsdp > 0, "fsdp", fsdp, "greater than 0")
    count = jax.device_count()
    if tensor * (fsdp or 1) > count:
        raise ConfigError(
            f"tensor={tensor} x fsdp={fsdp or 1} needs more devices than the {count} "
            "there are"
        )
    sizes = [fsdp] if fsdp else range(count // tensor, 0, -1)
    for number in sizes:
        mesh_config = Mesh(data=1, fsdp=number, tensor=tensor)
        mesh = sharding.make_mesh(mesh_config, jax.devices()[: number * tensor])
        try:
            sharding.check_fits(model, mesh)
            return mesh
        except ConfigError:
            if number in (fsdp, 1):
                raise
    raise AssertionError("a mesh of one device divides every model")
