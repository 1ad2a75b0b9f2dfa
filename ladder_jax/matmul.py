"""Matrix products of operands in the compute dtype, summed in float32.

The backward pass also multiplies in the compute dtype.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax.output_major import OutputMajor
from ladder_jax.quantised import Quantised

Weight = jax.Array | Quantised | OutputMajor


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, a, b)` of two operands of one dtype; the result is float32.

    Call it only from code with its own derivative rules; other code calls `einsum`.
    """
    # At the default precision TPUs and NVIDIA GPUs (TF32) round float32 operands.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    multiply = partial(
        jnp.einsum, spec, precision=precision, preferred_element_type=jnp.float32
    )
    left, right, out = spec.replace("->", ",").split(",")
    row_dims = [letter for letter in left if letter not in right]
    has_one_row = row_dims and all(a.shape[left.index(dim)] == 1 for dim in row_dims)
    if not has_one_row:
        return multiply(a, b)
    row_dim = row_dims[0]

    def with_two_rows(a: jax.Array, b: jax.Array) -> jax.Array:
        """The product of `a`'s row twice, without the second row of the result."""
        doubled = jnp.concatenate([a, a], axis=left.index(row_dim))
        return lax.slice_in_dim(multiply(doubled, b), 0, 1, axis=out.index(row_dim))

    # Two rows are faster than one. XLA:TPU multiplies one row on the vector units, by
    # its own estimate two to four times slower than on the matrix units; XLA:CPU
    # multiplies one row of bfloat16 number by number.
    slow = ("tpu", "cpu") if a.dtype == jnp.bfloat16 else ("tpu",)
    by_platform = dict.fromkeys(slow, with_two_rows)
    return lax.platform_dependent(a, b, **by_platform, default=multiply)


def einsum(spec: str, a: jax.Array, b: Weight, out_dtype: Any = None) -> jax.Array:
    """`jnp.einsum(spec, a, b)` with float32 sums, forward and backward.

    The backward pass rounds the cotangent to `a`'s dtype before it multiplies, so that
    its products are as fast as those of the forward pass. The derivative of `b` goes
    from float32 to `b`'s dtype, without another rounding.

    Args:
      spec: two operands; every dimension of one is also in the other or in the result.
      a: its dtype is the compute dtype.
      b: a weight, for example; it is cast to `a`'s dtype. If it is Quantised or
        OutputMajor, the result's last dimensions are those of `b` that are not summed
        over; if it is Quantised, there is no derivative.
      out_dtype: of the result; default, `a`'s.
    """
    if isinstance(b, Quantised):
        return _einsum_quantised(spec, a, b).astype(out_dtype or a.dtype)
    if isinstance(b, OutputMajor):
        left, right, out = spec.replace("->", ",").split(",")
        summed, outputs = right[: -b.outputs], right[-b.outputs :]
        spec, b = f"{left},{outputs}{summed}->{out}", b.output_major
    return _einsum(spec, a, b, out_dtype)


# ---------------------------------------------------------------- int8 weights

# XLA:CPU casts so many elements of a matrix at a time: 4 MiB of float32, which stay in
# the processor's cache until they are multiplied.
SLICE_ELEMENTS = 2**20


def _einsum_quantised(spec: str, a: jax.Array, b: Quantised) -> jax.Array:
    """The product of `a` and `b` in float32; no whole matrix is cast in memory.

    XLA:TPU and XLA:GPU cast while they multiply. XLA:CPU would write the whole matrix
    in `a`'s dtype, or cast and multiply number by number.
    """

    def multiply(a: jax.Array, int8: jax.Array) -> jax.Array:
        return product(spec, a, int8.astype(a.dtype))

    sliced = partial(_multiply_slices, spec)
    result = lax.platform_dependent(a, b.int8, cpu=sliced, default=multiply)
    right, out = spec.split(",")[1].split("->")
    summed = [i for i, dim in enumerate(right) if dim not in out]
    scale = jnp.squeeze(b.scale, summed)
    assert out.endswith("".join(dim for dim in right if dim in out))
    return result * scale


def _multiply_slices(spec: str, a: jax.Array, int8: jax.Array) -> jax.Array:
    """The float32 product of `a` and a matrix, of which one slice at a time is cast.

    The slices are those of the matrix's first dimension.
    """
    left, right, out = spec.replace("->", ",").split(",")
    dim, rows = right[0], int8.shape[0]
    count = min(max(-(-int8.size // SLICE_ELEMENTS), 2), rows)
    size = -(-rows // count)
    sizes = dict(zip(left + right, a.shape + int8.shape))
    result = jnp.zeros([sizes[each] for each in out], jnp.float32)

    def step(i: jax.Array, result: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, rows - size)  # the last slice may overlap
        slice_ = lax.dynamic_slice_in_dim(int8, start, size).astype(a.dtype)
        if dim in out:
            part = product(spec, a, slice_)
            axis = out.index(dim)
            return lax.dynamic_update_slice_in_dim(result, part, start, axis)
        axis = left.index(dim)
        inputs = lax.dynamic_slice_in_dim(a, start, size, axis)
        if rows % size:
            shape = [size if each == dim else 1 for each in left]
            is_new = (start + jnp.arange(size) >= i * size).reshape(shape)
            inputs = jnp.where(is_new, inputs, 0)
        return result + product(spec, inputs, slice_)

    return lax.fori_loop(0, count, step, result)


# ---------------------------------------------------------------- columns

# The most rows of a float32 product that XLA:CPU computes as columns; for more, both
# orders are as fast.
MOST_COLUMNS = 128


def _multiply(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`product(spec, a, b)`; on CPUs as columns, where that is faster.

    XLA:CPU copies its second operand into another order for every product. With `b` the
    first operand, as it lies in memory, only `a` is copied: a product of 4 to 32 rows
    takes half the time on two cores of an AMD EPYC. It is possible where the last
    dimensions of `a` and of `b` are those that are summed over.
    """
    left, right, out = spec.replace("->", ",").split(",")
    summed = "".join(dim for dim in right if dim not in out)
    rows, outputs = left.removesuffix(summed), right.removesuffix(summed)
    size = math.prod(a.shape[: len(rows)])
    is_possible = (rows + summed, outputs + summed, rows + outputs) == (
        left,
        right,
        out,
    )
    pays = a.dtype == jnp.float32 and size <= MOST_COLUMNS
    if not (summed and is_possible and pays):
        return product(spec, a, b)

    def multiply_columns(a: jax.Array, b: jax.Array) -> jax.Array:
        shape = a.shape[: len(rows)] + b.shape[: len(outputs)]
        depth = math.prod(b.shape[len(outputs) :])
        columns = product("oi,ri->or", b.reshape(-1, depth), a.reshape(size, depth))
        # Without the barrier XLA turns the operands back.
        return lax.optimization_barrier(columns).T.reshape(shape)

    default = partial(product, spec)
    return lax.platform_dependent(a, b, cpu=multiply_columns, default=default)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(spec: str, a: jax.Array, b: jax.Array, out_dtype: Any) -> jax.Array:
    return _multiply(spec, a, b.astype(a.dtype)).astype(out_dtype or a.dtype)


def _forward(
    spec: str, a: jax.Array, b: jax.Array, out_dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(spec, a, b, out_dtype), (a, b)


def _backward(
    spec: str,
    out_dtype: Any,
    operands: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    cotangent = cotangent.astype(a.dtype)
    da = product(f"{out},{right}->{left}", cotangent, b.astype(a.dtype))
    db = product(f"{left},{out}->{right}", a, cotangent)
    return da.astype(a.dtype), db.astype(b.dtype)


_einsum.defvjp(_forward, _backward)
