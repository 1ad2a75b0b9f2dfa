"""Which tensor of Hugging Face holds which parameters of ours, in both directions.

A matrix of torch is [out, in] and ours [in, ..., out], so every matrix but the
embedding is transposed. Parameters of the layers are stacked here and apart there.

D model, F feed-forward, N query heads, K key-value heads, H head, V vocabulary.
"""

import math
from typing import NamedTuple

import numpy as np

from ladder_jax import sharding
from ladder_jax.config import Model

LAYER = "model.layers.{}."


class Scales(NamedTuple):
    """Factors that a family applies as it runs, and that import folds into weights.

    value = stored * factor; for norms, value = stored + norm_offset.
    """

    embedding: float = 1.0
    query: float = 1.0  # of wq, and so of the attention logits
    output: float = 1.0  # of every block's output: wo, down and their biases
    logits: float = 1.0  # of the unembedding
    norm_offset: float = 0.0


class Tensor(NamedTuple):
    """A tensor of Hugging Face, and the parameters of ours that are its rows."""

    name: str  # with {} for the number of the layer
    parts: tuple[str, ...]  # names in sharding.PARAMETERS, from the first row on
    scale: float = 1.0
    offset: float = 0.0

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


_NO_SCALES = Scales()


def tensors(
    model: Model, fused: bool = False, scales: Scales = _NO_SCALES
) -> list[Tensor]:
    """Every tensor of a model, without repeating those of the layers.

    Args:
      model: its config.
      fused: whether q, k, v are one tensor, and gate and up another, as in phi3.
      scales: see Scales.
    """
    query = {"attention.wq": scales.query, "attention.bq": scales.query}
    outputs = ("attention.wo", "attention.bo", "mlp.down", "mlp.down_bias")

    def row(name: str, *parts: str) -> Tensor:
        role = sharding.PARAMETERS[parts[0]].role
        scale = scales.output if parts[0] in outputs else query.get(parts[0], 1.0)
        return Tensor(name, parts, scale, scales.norm_offset if role == "norm" else 0.0)

    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    rows = [
        Tensor("model.embed_tokens.weight", ("embedding",), scales.embedding),
        row(LAYER + "input_layernorm.weight", "attention.norm"),
    ]
    if fused:
        parts = ("attention.wq", "attention.wk", "attention.wv")
        rows += [row(attention + "qkv_proj.weight", *parts)]
    else:
        rows += [row(f"{attention}{x}_proj.weight", f"attention.w{x}") for x in "qkv"]
    rows += [row(attention + "o_proj.weight", "attention.wo")]
    if model.qkv_bias:
        rows += [row(f"{attention}{x}_proj.bias", f"attention.b{x}") for x in "qkv"]
    if model.out_bias:
        rows += [row(attention + "o_proj.bias", "attention.bo")]
    if model.qk_norm:
        rows += [
            row(f"{attention}{x}_norm.weight", f"attention.{x}_norm") for x in "qk"
        ]
    if model.residual != "parallel":  # both blocks of a layer read one norm there
        rows += [row(LAYER + "post_attention_layernorm.weight", "mlp.norm")]
    if fused:
        rows += [row(mlp + "gate_up_proj.weight", "mlp.gate", "mlp.up")]
    else:
        rows += [row(f"{mlp}{x}_proj.weight", f"mlp.{x}") for x in ("gate", "up")]
    rows += [row(mlp + "down_proj.weight", "mlp.down")]
    if model.mlp_bias:
        names = ("gate", "up", "down")
        rows += [row(f"{mlp}{x}_proj.bias", f"mlp.{x}_bias") for x in names]
    rows += [row("model.norm.weight", "norm")]
    if not model.tie_embeddings:
        rows += [Tensor("lm_head.weight", ("unembedding",), scales.logits)]
    return rows


def shape_of(part: str, model: Model) -> tuple[int, ...]:
    """The shape of a parameter of ours, without the layer dimension."""
    dims = sharding.PARAMETERS[part].axes
    return tuple(getattr(model, sharding.DIMS[dim]) for dim in dims)


def foreign_shape(tensor: Tensor, model: Model) -> tuple[int, ...]:
    """The shape of a tensor of Hugging Face."""
    shapes = [_foreign(part, shape_of(part, model)) for part in tensor.parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _foreign(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] for a matrix, [out] for a norm or bias."""
    if part == "embedding":
        return shape
    if sharding.PARAMETERS[part].role != "matrix":
        return (math.prod(shape),)
    inner = 1 if part != "attention.wo" else 2  # wo is [N, H, D]: N and H come in
    return (math.prod(shape[inner:]), math.prod(shape[:inner]))


def to_ours(array: np.ndarray, tensor: Tensor, model: Model) -> dict[str, np.ndarray]:
    """The parameters in a tensor of Hugging Face, as views of it, not yet scaled."""
    ours, start = {}, 0
    for part in tensor.parts:
        shape = shape_of(part, model)
        rows = _foreign(part, shape)[0]
        part_array = array[start : start + rows]
        start += rows
        ours[part] = (part_array if part == "embedding" else part_array.T).reshape(
            shape
        )
    return ours


def to_foreign(arrays: list[np.ndarray], tensor: Tensor) -> np.ndarray:
    """The tensor of Hugging Face that holds these parameters, in `tensor.parts`' order.

    Scales are not undone: only a tensor without them can be written.
    """
    assert (tensor.scale, tensor.offset) == (1.0, 0.0), tensor
    pieces = []
    for part, array in zip(tensor.parts, arrays):
        shape = _foreign(part, array.shape)
        is_matrix = part != "embedding" and len(shape) == 2
        pieces.append(
            array.reshape(shape[::-1]).T if is_matrix else array.reshape(shape)
        )
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
