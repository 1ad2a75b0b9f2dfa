"""Converts a model's weights for the decode programs: dtype, int8, a list of layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ladder_jax import quantised, sharding
from ladder_jax.decode_state import DecodeSpec
from ladder_jax.model import Transformer, Unstacked, abstract, unstack


def weights_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of the weights that `prepare_weights` returns."""
    return sharding.parameter_specs(_weights_shapes(spec))


def abstract_weights(spec: DecodeSpec) -> Any:
    """Returns these weights as shapes with shardings; nothing is allocated."""
    return sharding.abstract(_weights_shapes(spec), spec.mesh)


def _weights_shapes(spec: DecodeSpec) -> Transformer | Unstacked:
    cast = functools.partial(_cast_and_unstack, spec)
    return jax.eval_shape(cast, abstract(spec.model_config))


def prepare_weights(
    spec: DecodeSpec, model: Transformer | Unstacked, consume: bool = False
) -> Transformer | Unstacked:
    """Converts the weights of `model`, which is on the mesh, for the compiled programs.

    Matrices are cast to the compute dtype, or to int8 as `spec.weights_dtype` says. If
    `spec.unroll_layers`, the layers become a list. The time of an iteration is the time
    to read the weights: a cast in the iteration would read twice as much, and on GPUs a
    scan over stacked layers copies each layer out of the stack.

    consume: delete each array of `model` once it is converted, so that only one exists
      twice. An array that needs no conversion becomes one of the weights.
    Weights that are converted already are returned as they are.
    """
    if isinstance(model, Unstacked):
        return model
    if spec.weights_dtype == "int8":
        model = quantised.quantise_on_mesh(model, spec.mesh, consume)
    leaves, tree = jax.tree.flatten(model)
    names = jax.tree.leaves(sharding.parameter_names(model))
    partitions = jax.tree.leaves(sharding.parameter_specs(model))
    converted: list[Any] = []  # a layer's parameter: a list, if the layers become one
    for name, partition, x in zip(names, partitions, leaves, strict=True):
        row = sharding.PARAMETERS[name]
        dtype = _dtype(spec, row.role, x)
        has_layers = spec.unroll_layers and x.ndim > len(row.axes)
        count = x.shape[0] if has_layers else None
        if x.dtype == dtype and count is None:
            converted.append(x)
            continue
        converted.append(_make_convert(spec.mesh, partition, dtype, count)(x))
        if consume:
            jax.block_until_ready(converted[-1])
            x.delete()

    def model_of(layer: int) -> Transformer:
        values = [x[layer] if isinstance(x, list) else x for x in converted]
        return jax.tree.unflatten(tree, values)

    if not spec.unroll_layers:
        return model_of(0)
    models = [model_of(layer) for layer in range(spec.model_config.layers)]
    layers = [each.layers for each in models]
    first = models[0]
    return Unstacked(first.embedding, layers, first.norm, first.unembedding)


@functools.lru_cache(maxsize=128)
def _make_convert(
    mesh: Mesh, partition: P, dtype: Any, count: int | None
) -> Callable[[jax.Array], Any]:
    """Jits the cast of a parameter, which also splits it into `count` layers."""

    def convert(x: jax.Array) -> Any:
        if count is None:
            return x.astype(dtype)
        return [x[i].astype(dtype) for i in range(count)]

    one = partition if count is None else P(*partition[1:])
    shardings = sharding.named_shardings(mesh, one if count is None else [one] * count)
    return jax.jit(convert, out_shardings=shardings)


def _dtype(spec: DecodeSpec, role: sharding.Role, x: Any) -> Any:
    """The dtype of an array `x` of the weights; an int8 matrix is two arrays."""
    is_quantised = spec.weights_dtype == "int8" and role in ("embedding", "matrix")
    keeps = role == "norm" or is_quantised
    return x.dtype if keeps else jnp.dtype(spec.model_config.dtype)


def _cast_and_unstack(spec: DecodeSpec, model: Transformer) -> Transformer | Unstacked:
    def cast(role: sharding.Role, x: jax.Array) -> jax.Array:
        return x.astype(_dtype(spec, role, x))

    if spec.weights_dtype == "int8":
        model = quantised.quantise_parameters(model)
    model = jax.tree.map(cast, sharding.parameter_roles(model), model)
    return unstack(model) if spec.unroll_layers else model
