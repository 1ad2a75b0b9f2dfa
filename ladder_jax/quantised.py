"""Int8 weights: a matrix is int8 numbers and a float32 scale for every output channel.

The numbers are symmetric: the channel's largest absolute value is 127 steps. Norms and
biases stay as they are. A product multiplies the numbers, cast to the compute dtype,
and applies the scale to its result (matmul.einsum): the scale of a channel is the same
on every shard, so it commutes with the sum over the tensor axis. A cache of int8 or
float8 (kv_cache.py) has its numbers and scales from `scaled`, too.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ladder_jax import sharding

WeightsDtype = Literal["auto", "int8"]
# The largest number of each dtype that has scales.
LARGEST = {"int8": 127, "float8_e4m3fn": 448}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A matrix `int8 * scale`; both have its dimensions.

    The scale's size is 1 in every dimension that products with the matrix sum over. It
    takes the matrix's place as the value of a nnx.Param.
    """

    int8: jax.Array
    scale: jax.Array  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape."""
        return self.int8.shape

    def __getitem__(self, index: Any) -> "Quantised":
        """Itself; only `[...]` is accepted."""
        if index is not ...:
            raise TypeError("a Quantised has no index but [...]: see take_rows")
        return self

    def reshape(self, *shape: int) -> "Quantised":
        """With other dimensions that products sum over, and the same outputs."""
        return Quantised(self.int8.reshape(*shape), self.scale.reshape(*shape))


def quantise(x: jax.Array, summed: Sequence[int]) -> Quantised:
    """`x` in int8, with a scale for every index of the dimensions not in `summed`.

    No element changes by more than half of its scale.
    """
    return Quantised(*scaled(x, summed, "int8"))


def scaled(
    x: jax.Array, summed: Sequence[int], dtype: str
) -> tuple[jax.Array, jax.Array]:
    """(numbers of `dtype`, float32 scale) whose product is nearly `x`.

    Args:
      x: any float array.
      summed: its dimensions that share a scale; the scale's size is 1 there.
      dtype: one of LARGEST. The largest absolute value becomes its largest number.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(summed), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST[dtype]
    numbers = x / scale
    if dtype == "int8":
        numbers = jnp.round(numbers)
    return numbers.astype(dtype), scale


def take_rows(table: jax.Array | Quantised, index: jax.Array) -> jax.Array:
    """`table[index]`, in float32 if the table is Quantised."""
    if isinstance(table, Quantised):
        return table.int8[index] * table.scale[index]
    return _take_bits(table, index) if table.dtype == jnp.bfloat16 else table[index]


@jax.custom_jvp
def _take_bits(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]` of bfloat16.

    XLA:CPU casts a bfloat16 table to float32 to read a row of it, the whole table in
    every call of a decode loop; it does not cast integers.
    """

    def of_integers(table: jax.Array, index: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(table, jnp.uint16)[index]
        return lax.bitcast_convert_type(bits, table.dtype)

    def as_it_is(table: jax.Array, index: jax.Array) -> jax.Array:
        return table[index]

    return lax.platform_dependent(table, index, cpu=of_integers, default=as_it_is)


@_take_bits.defjvp
def _take_bits_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (table, index), (table_tangent, _) = primals, tangents
    return table[index], table_tangent[index]


# ---------------------------------------------------------------- models


def quantise_parameters(model: Any) -> Any:
    """`model`, a Transformer of arrays, with a Quantised for each matrix."""
    names = sharding.parameter_names(model)
    return jax.tree.map(_quantise_parameter, names, model)


def quantise_on_mesh(model: Any, mesh: Mesh, consume: bool = False) -> Any:
    """`quantise_parameters` of a model on `mesh`, one parameter after the other.

    consume: delete each array of `model` that a Quantised replaces.
    A model that has Quantised matrices already is returned as it is.
    """
    leaves, tree = jax.tree.flatten(model, is_leaf=_is_quantised)
    if any(map(_is_quantised, leaves)):
        return model
    names = jax.tree.leaves(sharding.parameter_names(model))
    specs = sharding.parameter_specs(jax.eval_shape(quantise_parameters, model))
    made = []
    for name, spec, x in zip(
        names, jax.tree.leaves(specs, is_leaf=_is_quantised), leaves, strict=True
    ):
        if not _is_quantised(spec):
            made.append(x)
            continue
        made.append(_make_quantise(mesh, name, spec.int8, spec.scale)(x))
        if consume:
            jax.block_until_ready(made[-1])
            x.delete()
    return jax.tree.unflatten(tree, made)


def _is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def _quantise_parameter(name: str, x: jax.Array) -> jax.Array | Quantised:
    row = sharding.PARAMETERS[name]
    if not row.summed:
        return x
    stacked = x.ndim - len(row.axes)
    dims = [stacked + i for i, dim in enumerate(row.axes) if dim in row.summed]
    return quantise(x, dims)


@functools.lru_cache(maxsize=64)
def _make_quantise(mesh: Mesh, name: str, *specs: Any) -> Callable[..., Any]:
    """Jits the quantisation of one parameter; `specs` are those of its two arrays."""
    shardings = Quantised(*sharding.named_shardings(mesh, specs))
    return jax.jit(
        functools.partial(_quantise_parameter, name), out_shardings=shardings
    )
