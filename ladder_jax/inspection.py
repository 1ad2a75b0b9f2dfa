"""What a checkpoint holds, without its arrays: `ladder-jax inspect`.

The path may be a run's folder or checkpoint, a Hugging Face folder or name, or a GGUF
file.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax import checkpoint, identity, kv_cache, sharding
from ladder_jax.addresses import is_address, local_path
from ladder_jax.config import Model, from_meta, require, to_dict
from ladder_jax.convert.families import read_config
from ladder_jax.convert.from_hf import tokenizer_of
from ladder_jax.convert.safetensors_source import open_source
from ladder_jax.convert.source import TensorSource
from ladder_jax.convert.tensor_names import check_names
from ladder_jax.data.tokenizer import Tokenizer, from_json
from ladder_jax.hardware.chips import CHIPS
from ladder_jax.hardware.memory import size

Report = dict[str, Any]
# The share of a device's memory that weights and caches may take.
USABLE = 0.9
# Bytes that training takes for a parameter: float32 weight, gradient, two moments.
TRAINING_BYTES = 16
MOST_DEVICES = 4096


class Array(NamedTuple):
    """A parameter, of all layers where it is one of a layer."""

    name: str  # in sharding.PARAMETERS
    elements: int
    bytes: int
    dtype: str
    sharding: str  # the mesh axes of its dimensions; "" where it was never sharded


def inspect(path: str | Path, step: int | None = None) -> Report:
    """Returns what a checkpoint holds, as JSON values.

    Args:
      path: see the module's docstring.
      step: of a run's checkpoint; None: the newest.

    Raises ConfigError or ValueError, one line, where there is no checkpoint, or it is
    damaged or not supported.
    """
    place = Path(path) if is_address(path) else local_path(path, "path")
    is_hub_name = not place.exists() and str(path).count("/") == 1
    is_gguf = place.suffix == ".gguf" and not place.is_dir()
    if not is_gguf and not is_hub_name and not (place / "config.json").is_file():
        return _inspect_run(str(path), step)
    require(step is None, "step", step, "left out: only a run has steps")
    if is_gguf:
        from ladder_jax.convert.gguf_source import open_gguf

        return _inspect_source(open_gguf(place), "GGUF")
    return _inspect_source(open_source(path), "Hugging Face")


def _inspect_run(path: str, step: int | None) -> Report:
    number, meta, arrays = checkpoint.read_arrays(path, step)
    config = from_meta(meta, path)
    parameters = [_array(name, x) for name, x in arrays.pop("model").items()]
    others = {
        part: sum(math.prod(x.shape) * x.dtype.itemsize for x in values.values())
        for part, values in arrays.items()
    }
    described = dict(
        path=path,
        format="ladder_jax",
        step=number,
        written_by=meta["ladder_jax"],
        other_bytes=others,
        starts=identity.find(path),
    )
    tokenizer = from_json(meta["tokenizer"])
    return described | _common(config.model, parameters, tokenizer)


def _array(name: str, metadata: Any) -> Array:
    """Of a checkpoint's array, such as layers/attention/wq."""
    parts = [part for part in name.split("/") if part != "layers"]
    spec = getattr(metadata.sharding_metadata, "partition_spec", None) or ()
    elements = math.prod(metadata.shape)
    return Array(
        ".".join(parts),
        elements,
        elements * metadata.dtype.itemsize,
        str(metadata.dtype),
        " ".join(str(axis or "-") for axis in spec),
    )


def _inspect_source(source: TensorSource, form: str) -> Report:
    imported = read_config(source.config, f"{source.name}/config.json")
    infos = source.tensors
    imported = check_names(imported, infos, source.name, lambda a, b: True)
    parameters = []
    for tensor in imported.tensors:
        for layer in range(imported.model.layers if tensor.stacked else 1):
            info = infos[tensor.name.format(layer)]
            elements = math.prod(info.shape)
            for part in tensor.parts:
                share = elements // len(tensor.parts)
                parameters.append(
                    Array(part, share, share * info.dtype.itemsize, str(info.dtype), "")
                )
    described = dict(
        path=source.name, format=form, family=source.config.get("model_type")
    )
    tokenizer = tokenizer_of(source, imported.model, None)
    return described | _common(imported.model, parameters, tokenizer)


def _common(model: Model, parameters: list[Array], tokenizer: Tokenizer) -> Report:
    total = sum(array.elements for array in parameters)
    return dict(
        model=to_dict(model),
        parameters=total,
        bytes=sum(array.bytes for array in parameters),
        modules=_modules(parameters),
        tokenizer=_describe_tokenizer(tokenizer),
        fits=fits(model, total),
    )


def _modules(parameters: list[Array]) -> dict[str, Report]:
    """Parameters, bytes, dtypes and shardings by module."""
    modules: dict[str, Report] = {}
    for array in parameters:
        role = sharding.PARAMETERS[array.name].role
        module = "norms" if role == "norm" else array.name.partition(".")[0]
        row = modules.setdefault(
            module, dict(parameters=0, bytes=0, dtypes=[], shardings={})
        )
        row["parameters"] += array.elements
        row["bytes"] += array.bytes
        if array.dtype not in row["dtypes"]:
            row["dtypes"].append(array.dtype)
        if array.sharding:
            row["shardings"][array.name] = array.sharding
    return modules


def _describe_tokenizer(tokenizer: Tokenizer) -> Report:
    return dict(
        kind=json.loads(tokenizer.to_json())["kind"],
        ids=tokenizer.size,
        special=tokenizer.special.names,
        end_ids=list(tokenizer.eos_ids),
        chat_template=tokenizer.chat_template,
    )


def fits(model: Model, parameters: int) -> dict[str, Report]:
    """By chip of known memory: the fewest devices for decoding and for training.

    Decoding: bfloat16 weights, and the keys and values of one request of the longest
    context. Training: float32 weights, gradients and AdamW's moments, without
    activations. Both are divided over the devices evenly. None: more than MOST_DEVICES.
    """
    cache = kv_cache.bytes_per_token(model, "bfloat16") * model.max_length
    needs = dict(decode=2 * parameters + cache, train=TRAINING_BYTES * parameters)
    return {
        name: {
            job: _devices(count, USABLE * chip.hbm_bytes)
            for job, count in needs.items()
        }
        for name, chip in CHIPS.items()
        if chip.hbm_bytes
    }


def _devices(needed: float, each: float) -> int | None:
    """The fewest devices, a power of two."""
    count = 1
    while count * each < needed:
        count *= 2
    return count if count <= MOST_DEVICES else None


def dump(report: Report) -> str:
    """The report as JSON."""
    return json.dumps(report, indent=2, ensure_ascii=False)


def text(report: Report) -> str:
    """The report as lines for a terminal."""
    model = report["model"]
    kind = report["format"] + (f" {report['family']}" if "family" in report else "")
    lines = [f"{report['path']}: {kind}"]
    if "step" in report:
        lines[0] += f", step {report['step']}, by ladder_jax {report['written_by']}"
    lines += [
        f"architecture  {model['layers']} layers, {model['dim']} wide, "
        f"{model['heads']} heads of {model['head_dim']}, {model['kv_heads']} for keys "
        f"and values, MLP {model['ffn_dim']}, vocabulary {model['vocab_size']}",
        f"context       {model['max_length']} tokens, rotary base "
        f"{model['rope_theta']:g}{_scaling(model['rope_scaling'])}",
        f"options       {_options(model)}",
        f"schedule      {model['residual']}",
        f"computes in   {model['dtype']}",
        f"parameters    {report['parameters']:,} in {size(report['bytes'])}",
        *identity.lines(report.get("starts", [])),
        "",
    ]
    for name, row in report["modules"].items():
        line = f"  {name:12}{row['parameters']:>16,}  {size(row['bytes']):>9}  "
        lines.append(line + ", ".join(row["dtypes"]))
        for array, axes in row["shardings"].items():
            lines.append(f"    {array:22} saved with sharding: {axes}")
    for part, count in report.get("other_bytes", {}).items():
        lines.append(f"  {part:12}{'':>16}  {size(count):>9}")
    tokenizer = report["tokenizer"]
    names = ", ".join(f"{kind} {name}" for kind, name in tokenizer["special"].items())
    template = tokenizer["chat_template"]
    has = "none" if template is None else f"{len(template)} characters"
    lines += [
        "",
        f"tokenizer     {tokenizer['kind']}, {tokenizer['ids']} ids, {names}; "
        f"generation ends at {tokenizer['end_ids']}",
        f"chat template {has}",
        "",
        "fits on       devices to decode (bfloat16, one request of the longest "
        "context), to train (AdamW, without activations):",
    ]
    for chip, needed in report["fits"].items():
        decode, train = (needed[job] or "more than 4096" for job in needed)
        lines.append(f"  {chip:12}{decode:>5} {train:>5}")
    return "\n".join(lines)


def _scaling(scaling: Report) -> str:
    if scaling["factor"] == 1 and scaling.get("kind") != "yarn":
        return ""
    return f", {scaling.get('kind', 'llama3')} scaling by {scaling['factor']:g}"


def _options(model: Report) -> str:
    """What differs from Llama."""
    neutral = to_dict(Model())
    names = ["tie_embeddings", "qk_norm", "qkv_bias", "out_bias", "mlp_bias"]
    names += ["activation", "sliding_window", "window_layers", "nope_layers"]
    given = [
        name if model[name] is True else f"{name} {model[name]}"
        for name in names
        if name in model and model[name] != neutral[name]
    ]
    return ", ".join(given) or "as Llama"
