"""Exports a model as a Hugging Face folder, tensor by tensor.

A model that a class of transformers computes is written for that class. Other residual
schedules are written with a modeling file of their own (`exported/`), and never under
the name of a class that computes something else.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ladder_jax.checkpoint import VERSION
from ladder_jax.config import Model
from ladder_jax.convert import export_config, folder, ladder_llama, layout
from ladder_jax.convert.from_hf import write_tokenizer_files
from ladder_jax.convert.layout import Tensor
from ladder_jax.convert.needs import Available, export_needs
from ladder_jax.convert.safetensors_file import total_bytes
from ladder_jax.convert.shards import Shards, split
from ladder_jax.convert.source import TensorInfo
from ladder_jax.convert.weights import Place, Weights
from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.data.tokenizer_files import dump
from ladder_jax.hardware.memory import size
from ladder_jax.say import Say


def write_hf(
    weights: Weights,
    config: Model,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5 * 1000**3,
    say: Say = lambda line: None,
) -> Path:
    """Writes a folder that transformers loads. It appears when it is complete.

    An export of a checkpoint that is cut off leaves the files of weights that are
    whole, and the same export goes on after them.

    Args:
      weights: the parameters.
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
    infos, places = tensors(config, dtype)
    export = f"{weights.name} {dtype} {VERSION}"
    shards = Shards(split(infos, shard_bytes), export)

    def reader(names: Sequence[str]) -> Callable[[str], np.ndarray]:
        wanted = [place for name in names for place in places[name].parts]
        read = weights.reader(wanted)

        def array(part: str, layer: int | None) -> np.ndarray:
            if part in weights.parts:
                return read((part, layer))
            # A bias that the class has and the model does not.
            return np.zeros(layout.shape_of(part, config), np.float32)

        def tensor(name: str) -> np.ndarray:
            row, parts = places[name]
            return layout.to_foreign([array(*place) for place in parts], row)

        return tensor

    export_needs(config, dtype, 0).check(Available(folder.free_disk(path), None))
    with folder.new_folder(path, shards if weights.name else None) as part:
        if line := folder.kept_text(
            shards, len(shards.whole), len(shards.shards), "files"
        ):
            say(line)
        shards.write(part, reader)
        write_tokenizer_files(tokenizer, part, for_others=True)
        if values["model_type"] == ladder_llama.MODEL_TYPE:
            values = ladder_llama.write_ladder_llama(part, values)
        files = {
            "config.json": dump(values),
            "generation_config.json": dump(export_config.special_ids(tokenizer)),
        }
        for name, content in files.items():
            (part / name).write_text(content, encoding="utf-8")
        shards.end(part)
    say(f"{values['model_type']}: {len(infos)} tensors, {_total(infos)} in {dtype}")
    return path


class Row(NamedTuple):
    """A tensor of the export, and the parameters that it is made of."""

    tensor: Tensor
    parts: list[Place]


def tensors(config: Model, dtype: str) -> tuple[dict[str, TensorInfo], dict[str, Row]]:
    """Every tensor of the export by its name: what it is, and its parameters."""
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    infos: dict[str, TensorInfo] = {}
    rows: dict[str, Row] = {}
    for tensor in layout.tensors(config):
        shape = layout.foreign_shape(tensor, config)
        for layer in range(config.layers) if tensor.stacked else [None]:
            name = tensor.name.format(layer)
            infos[name] = TensorInfo(shape, numpy_dtype)
            rows[name] = Row(tensor, [(part, layer) for part in tensor.parts])
    return infos, rows


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


def _total(infos: Mapping[str, TensorInfo]) -> str:
    return size(total_bytes(infos.values()))
