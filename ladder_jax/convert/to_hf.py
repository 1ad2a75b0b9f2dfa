"""Exports a model as a Hugging Face folder, tensor by tensor.

A model that a class of transformers computes is written for that class. Other residual
schedules are written with a modeling file of their own (`exported/`), and never under
the name of a class that computes something else.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ladder_jax import model as models
from ladder_jax import sharding
from ladder_jax.config import ConfigError, Model
from ladder_jax.convert import export_config, folder, ladder_llama, layout
from ladder_jax.convert.from_hf import write_tokenizer_files
from ladder_jax.convert.layout import Tensor
from ladder_jax.convert.needs import free_disk, size
from ladder_jax.convert.safetensors_file import (
    bytes_of,
    total_bytes,
    write_file,
)
from ladder_jax.convert.safetensors_source import INDEX, SINGLE
from ladder_jax.convert.source import TensorInfo
from ladder_jax.data.tokenizer import Tokenizer

Say = Callable[[str], None]


def write_hf(
    model: models.Transformer,
    config: Model,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5 * 1000**3,
    say: Say = lambda line: None,
) -> Path:
    """Writes a folder that transformers loads. It appears when it is complete.

    Args:
      model: the parameters, on any mesh.
      config: of the model.
      tokenizer: its tokenizer.
      out: the folder, which must not exist.
      dtype: float32 or bfloat16; parameters are rounded to it.
      shard_bytes: the largest size of a file, where no tensor alone is larger.
      say: is told what is written.

    Raises ConfigError where no class of transformers can compute the model, or the disk
    does not suffice.
    """
    path = folder.absolute(out)
    folder.require_new(path)
    config, values = _config(config, tokenizer, dtype)
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rows = layout.tensors(config)
    infos: dict[str, TensorInfo] = {}
    where: dict[str, tuple[Tensor, int]] = {}
    for tensor in rows:
        shape = layout.foreign_shape(tensor, config)
        for layer in range(config.layers if tensor.stacked else 1):
            name = tensor.name.format(layer)
            infos[name] = TensorInfo(shape, numpy_dtype)
            where[name] = tensor, layer
    require_disk(total_bytes(infos.values()), free_disk(path))
    parameters = _by_name(model)

    def read(name: str) -> np.ndarray:
        tensor, layer = where[name]
        arrays = [
            _read(parameters, part, layer if tensor.stacked else None, config)
            for part in tensor.parts
        ]
        return layout.to_foreign(arrays, tensor)

    with folder.new_folder(path) as part:
        _write_weights(part, infos, read, shard_bytes)
        write_tokenizer_files(tokenizer, part, for_others=True)
        if values["model_type"] == ladder_llama.MODEL_TYPE:
            values = ladder_llama.write_ladder_llama(part, values)
        files = {
            "config.json": export_config.dump(values),
            "generation_config.json": export_config.dump(
                export_config.special_ids(tokenizer)
            ),
        }
        for name, content in files.items():
            (part / name).write_text(content, encoding="utf-8")
    say(f"{values['model_type']}: {len(infos)} tensors, {_total(infos)} in {dtype}")
    return path


def check(config: Model, out: str | Path) -> None:
    """Raises ConfigError where a model cannot be exported, or `out` cannot be made."""
    folder.require_new(folder.absolute(out))
    export_config.require_exportable(config)


def _config(
    config: Model, tokenizer: Tokenizer, dtype: str
) -> tuple[Model, dict[str, Any]]:
    """(the model as it is written, its config.json)."""
    export_config.require_exportable(config)
    export = export_config.export_of(config)
    if export is None:
        return config, export_config.own_config(config, tokenizer, dtype)
    values = export_config.standard_config(export, config, tokenizer, dtype)
    if export.model_type == "qwen3" and config.qkv_bias:
        # The class has both biases or none: out_bias is written as zeros.
        config = dataclasses.replace(config, out_bias=True)
    return config, values


def _by_name(model: models.Transformer) -> dict[str, jax.Array]:
    names = jax.tree.leaves(sharding.parameter_names(model))
    return dict(zip(names, jax.tree.leaves(model)))


def _read(
    parameters: Mapping[str, jax.Array], part: str, layer: int | None, config: Model
) -> np.ndarray:
    """A parameter of a layer, gathered on the host."""
    if part not in parameters:  # a bias that the class has and the model does not
        return np.zeros(layout.shape_of(part, config), np.float32)
    array = parameters[part]
    return np.asarray(jax.device_get(array if layer is None else array[layer]))


def _write_weights(
    path: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes one file, or several with an index."""
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if (
            shards[-1]
            and total_bytes(shards[-1].values()) + bytes_of(info) > shard_bytes
        ):
            shards.append({})
        shards[-1][name] = info
    if len(shards) == 1:
        write_file(path / SINGLE, shards[0], read)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(path / file, shard, read)
        weight_map |= dict.fromkeys(shard, file)
    total = total_bytes(infos.values())
    index = dict(metadata=dict(total_size=total), weight_map=weight_map)
    (path / INDEX).write_text(export_config.dump(index), encoding="utf-8")


def require_disk(needed: int, free: int | None) -> None:
    """Raises ConfigError where the disk does not suffice."""
    if free is not None and needed > free:
        raise ConfigError(
            f"out needs {size(needed)} of disk, and {size(free)} are free there: "
            "choose another folder or --dtype bfloat16"
        )


def _total(infos: Mapping[str, TensorInfo]) -> str:
    return size(total_bytes(infos.values()))
