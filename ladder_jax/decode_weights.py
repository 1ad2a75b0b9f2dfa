"""Converts a model's weights for decoding: dtype, order, a list of layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ladder_jax import quantised, sharding
from ladder_jax.decode_state import DecodeSpec
from ladder_jax.model import Transformer, Unstacked, abstract, unstack
from ladder_jax.output_major import OutputMajor, output_major


def weights_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of the weights that `prepare_weights` returns."""
    return sharding.parameter_specs(_weights_shapes(spec))


def abstract_weights(spec: DecodeSpec) -> Any:
    """Returns these weights as shapes with shardings; nothing is allocated."""
    return sharding.abstract(_weights_shapes(spec), spec.mesh)


def _weights_shapes(spec: DecodeSpec) -> Transformer | Unstacked:
    convert = functools.partial(_convert_and_unstack, spec)
    return jax.eval_shape(convert, abstract(spec.model_config))


def prepare_weights(
    spec: DecodeSpec, model: Transformer | Unstacked, consume: bool = False
) -> Transformer | Unstacked:
    """Converts the weights of `model`, which is on the mesh, for the compiled programs.

    Matrices are cast to the compute dtype, or to int8 as `spec.weights_dtype` says; on
    CPUs those in float32 become OutputMajor. If `spec.unroll_layers`, the layers become
    a list. The time of an iteration is the time to read the weights: a cast in the
    iteration would read twice as much, and on GPUs a scan over stacked layers copies
    each layer out of the stack.

    consume: delete each array of `model` once it is converted, so that only one exists
      twice. An array that needs no conversion becomes one of the weights.
    Weights that are converted already are returned as they are.
    """
    if isinstance(model, Unstacked):
        return model
    if spec.weights_dtype == "int8":
        model = quantised.quantise_on_mesh(model, spec.mesh, consume)
    leaves, tree = jax.tree.flatten(model, is_leaf=_is_output_major)
    if any(map(_is_output_major, leaves)):
        return model
    names = jax.tree.leaves(sharding.parameter_names(model))
    shapes = jax.eval_shape(functools.partial(_convert, spec), model)
    specs = sharding.parameter_specs(shapes)
    converted: list[Any] = []  # a layer's parameter: a list, if the layers become one
    for name, made, partition, x in zip(
        names, *map(_parameters, (shapes, specs)), leaves, strict=True
    ):
        has_layers = spec.unroll_layers and x.ndim > len(sharding.PARAMETERS[name].axes)
        count = x.shape[0] if has_layers else None
        if not _is_output_major(made) and x.dtype == made.dtype and count is None:
            converted.append(x)
            continue
        converted.append(_make_convert(spec, name, partition, count)(x))
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
    spec: DecodeSpec, name: str, partition: Any, count: int | None
) -> Callable[[jax.Array], Any]:
    """Jits the conversion of a parameter, which also splits it into `count` layers."""

    def convert(x: jax.Array) -> Any:
        if count is None:
            return _convert_parameter(spec, name, x)
        return [_convert_parameter(spec, name, x[i]) for i in range(count)]

    parts = partition
    if count is not None:
        is_spec = lambda x: isinstance(x, P)
        one = jax.tree.map(lambda x: P(*x[1:]), partition, is_leaf=is_spec)
        parts = [one] * count
    shardings = sharding.named_shardings(spec.mesh, parts)
    return jax.jit(convert, out_shardings=shardings)


def _convert_parameter(
    spec: DecodeSpec, name: str, x: jax.Array
) -> jax.Array | OutputMajor:
    """A parameter in the dtype and order of the decode programs.

    An int8 matrix is two parameters, which stay as they are.
    """
    row = sharding.PARAMETERS[name]
    is_weight = row.role in ("embedding", "matrix")
    if row.role == "norm" or (spec.weights_dtype == "int8" and is_weight):
        return x
    x = x.astype(jnp.dtype(spec.model_config.dtype))
    on_cpu = spec.mesh.devices.flat[0].platform == "cpu"
    if row.role != "matrix" or x.dtype != jnp.float32 or not on_cpu:
        return x
    return output_major(x, list(row.axes), row.summed)


def _convert(spec: DecodeSpec, model: Transformer) -> Transformer:
    names = sharding.parameter_names(model)
    return jax.tree.map(functools.partial(_convert_parameter, spec), names, model)


def _convert_and_unstack(
    spec: DecodeSpec, model: Transformer
) -> Transformer | Unstacked:
    if spec.weights_dtype == "int8":
        model = quantised.quantise_parameters(model)
    model = _convert(spec, model)
    return unstack(model) if spec.unroll_layers else model


def _is_output_major(x: Any) -> bool:
    return isinstance(x, OutputMajor)


def _parameters(model: Any) -> list[Any]:
    """The parameters of a model, in which an OutputMajor counts as one."""
    return jax.tree.leaves(model, is_leaf=_is_output_major)
