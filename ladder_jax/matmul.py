"""Matrix products as accelerators like them: operands in the compute dtype, sums in float32, backward pass included."""
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def product(spec, a, b):
    """`jnp.einsum(spec, a, b)` of two operands of one dtype, in float32; for code with derivative rules of its own."""
    # float32 operands are meant as float32, also where the hardware would rather round them first (TPU, TF32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


@jax.tree_util.register_pytree_node_class
class OutIn:
    """A weight stored with the dimensions that products sum over last: `axes` says which of its own each stored one is.

    `product` is `einsum` with it, as a product of two matrices: XLA turns the operands of others around first.
    """

    def __init__(self, array, axes):
        self.array, self.axes = array, axes

    @classmethod
    def of(cls, weight, axes):
        """`weight` in the order `axes`; dimensions that stack weights come before, and stay."""
        stacked = weight.ndim - len(axes)
        return cls(weight.transpose(*range(stacked), *(stacked + axis for axis in axes)), axes)

    def product(self, spec, a, out_dtype):
        left, right, out = spec.replace("->", ",").split(",")
        stored = "".join(right[axis] for axis in self.axes)
        outs = "".join(letter for letter in stored if letter in out)
        rows, ins = left[:len(out) - len(outs)], stored[len(outs):]
        assert left == rows + ins and out == rows + outs and stored == outs + ins, (spec, self.axes)
        shape, sizes = a.shape[:len(rows)], self.array.shape[:len(outs)]
        matrix = self.array.reshape(math.prod(sizes), -1)
        return _einsum("ri,oi->ro", a.reshape(-1, matrix.shape[1]), matrix, out_dtype).reshape(*shape, *sizes)

    def __getitem__(self, key):        # as a parameter's value is read: weight[...]
        assert key is Ellipsis
        return self

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(*children, axes)


def einsum(spec, a, b, out_dtype=None):
    """`jnp.einsum(spec, a, b)` of two operands, none of whose dimensions is summed alone.

    `b` (a weight, say) is cast to `a`'s dtype; products are summed in float32; the result is rounded to `out_dtype`
    (default: `a`'s). In the backward pass the cotangent is rounded to `a`'s dtype before it is multiplied, so that it
    runs at the forward pass's speed, and the derivative of `b` is returned in `b`'s dtype without another rounding.
    `b` may be an OutIn; `spec` names its dimensions in their own order.
    """
    if isinstance(b, OutIn):
        return b.product(spec, a, out_dtype)
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
    return (product(f"{out},{right}->{left}", cotangent, b.astype(a.dtype)).astype(a.dtype),
            product(f"{left},{out}->{right}", a, cotangent).astype(b.dtype))


_einsum.defvjp(_forward, _backward)
