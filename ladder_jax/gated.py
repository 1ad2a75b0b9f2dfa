"""The gated MLP between its products, with little memory for the backward pass.

B batch, T tokens, F feed-forward, D model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax.matmul import einsum

Activation = Callable[[jax.Array], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: Activation, gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """activation(gate) * up, computed in float32 and rounded once, to gate's dtype.

    Its derivative keeps `gate` and `up`. JAX's own would keep the activation and its
    parts, too, some of them in float32.
    """
    return _gated(activation, gate_BTF, up_BTF)


def _gated(activation: Activation, gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    product_BTF = activation(gate_BTF.astype(jnp.float32)) * up_BTF
    return product_BTF.astype(gate_BTF.dtype)


def _gated_forward(
    activation: Activation, gate_BTF: jax.Array, up_BTF: jax.Array
) -> tuple[jax.Array, Any]:
    return _gated(activation, gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _gated_backward(
    activation: Activation, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kept, cotangent = _on_time((kept, cotangent))
    return jax.vjp(partial(_gated, activation), *kept)[1](cotangent)


gated.defvjp(_gated_forward, _gated_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def down(
    activation: Activation,
    gate_BTF: jax.Array,
    up_BTF: jax.Array,
    gated_BTF: jax.Array,
    weight_FD: jax.Array,
) -> jax.Array:
    """The product of `gated_BTF`, which is `gated(activation, gate, up)`, and a weight.

    Its derivative keeps `gate` and `up`, as that of `gated` does, and not `gated_BTF`.
    """
    return einsum("btf,fd->btd", gated_BTF, weight_FD)


def _down_forward(
    activation: Activation,
    gate_BTF: jax.Array,
    up_BTF: jax.Array,
    gated_BTF: jax.Array,
    weight_FD: jax.Array,
) -> tuple[jax.Array, Any]:
    kept = gate_BTF, up_BTF, weight_FD
    return einsum("btf,fd->btd", gated_BTF, weight_FD), kept


def _down_backward(
    activation: Activation, kept: tuple[jax.Array, ...], cotangent_BTD: jax.Array
) -> tuple[jax.Array | None, ...]:
    *pair, weight_FD = kept
    (gate_BTF, up_BTF), cotangent_BTD = _on_time((pair, cotangent_BTD))
    gated_BTF = _gated(activation, gate_BTF, up_BTF)
    product = partial(einsum, "btf,fd->btd")
    return None, None, *jax.vjp(product, gated_BTF, weight_FD)[1](cotangent_BTD)


down.defvjp(_down_forward, _down_backward)


def _on_time(arrays: Any) -> Any:
    """Returns `arrays`: what is kept, and a cotangent, which comes late.

    On a CPU the layers of a training step are no loop, and XLA would merge what the
    backward pass computes from the kept arrays alone with the same in the forward pass,
    and keep that, too.
    """
    default = lambda arrays: arrays
    return lax.platform_dependent(arrays, cpu=lax.optimization_barrier, default=default)
