"""Matrix products of operands in the compute dtype, summed in float32.

The backward pass also multiplies in the compute dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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


def einsum(spec: str, a: jax.Array, b: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`jnp.einsum(spec, a, b)` with float32 sums, forward and backward.

    The backward pass rounds the cotangent to `a`'s dtype before it multiplies, so that
    its products are as fast as those of the forward pass. The derivative of `b` goes
    from float32 to `b`'s dtype, without another rounding.

    Args:
      spec: two operands; every dimension of one is also in the other or in the result.
      a: its dtype is the compute dtype.
      b: a weight, for example; it is cast to `a`'s dtype.
      out_dtype: of the result; default, `a`'s.
    """
    return _einsum(spec, a, b, out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(spec: str, a: jax.Array, b: jax.Array, out_dtype: Any) -> jax.Array:
    return product(spec, a, b.astype(a.dtype)).astype(out_dtype or a.dtype)


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
