"""Matrix products as accelerators like them: operands in the compute dtype, sums in float32, backward pass included."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def product(spec, a, b):
    """`jnp.einsum(spec, a, b)` of two operands of one dtype, in float32; for code with derivative rules of its own."""
    # float32 operands are meant as float32, also where the hardware would rather round them first (TPU, TF32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    multiply = partial(
        jnp.einsum, spec, precision=precision, preferred_element_type=jnp.float32
    )
    left, right, out = spec.replace("->", ",").split(",")
    rows = [letter for letter in left if letter not in right]
    if not rows or any(a.shape[left.index(letter)] != 1 for letter in rows):
        return multiply(a, b)

    def twice(a, b):
        doubled = jnp.concatenate([a, a], axis=left.index(rows[0]))
        return lax.slice_in_dim(multiply(doubled, b), 0, 1, axis=out.index(rows[0]))

    # Two rows are faster than one: XLA:TPU multiplies one row on the vector units, by its own estimate two to four
    # times slower than the matrix units, XLA:CPU one row of bfloat16 number by number.
    slow = ("tpu", "cpu") if a.dtype == jnp.bfloat16 else ("tpu",)
    return lax.platform_dependent(a, b, **dict.fromkeys(slow, twice), default=multiply)


def einsum(spec, a, b, out_dtype=None):
    """`jnp.einsum(spec, a, b)` of two operands, none of whose dimensions is summed alone.

    `b` (a weight, say) is cast to `a`'s dtype; products are summed in float32; the result is rounded to `out_dtype`
    (default: `a`'s). In the backward pass the cotangent is rounded to `a`'s dtype before it is multiplied, so that it
    runs at the forward pass's speed, and the derivative of `b` is returned in `b`'s dtype without another rounding.
    """
    return _einsum(spec, a, b, out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(spec, a, b, out_dtype):
    return product(spec, a, b.astype(a.dtype)).astype(out_dtype or a.dtype)


def _forward(spec, a, b, out_dtype):
    return _einsum(spec, a, b, out_dtype), (a, b)


def _backward(spec, out_dtype, operands, cotangent):
    a, b = operands
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    cotangent = cotangent.astype(a.dtype)
    return (
        product(f"{out},{right}->{left}", cotangent, b.astype(a.dtype)).astype(a.dtype),
        product(f"{left},{out}->{right}", a, cotangent).astype(b.dtype),
    )


_einsum.defvjp(_forward, _backward)
