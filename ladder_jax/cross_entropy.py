"""The cross-entropy of tokens, from logits that the tensor shards have in parts.

B batch, T tokens, V this tensor shard's share of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax import sharding
from ladder_jax.residual.reductions import reduce


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p(target) of every token [B, T], nats.

    Every tensor shard has the logits of its share of the vocabulary, and does not
    gather the others.
    """
    largest_BT = sharding.largest(logits_BTV.max(axis=-1))
    rows_BT = targets_BT - sharding.vocabulary_offset(logits_BTV.shape[-1])
    total_BT, target_BT = _softmax_terms(logits_BTV, largest_BT, rows_BT)
    log_total_BT = jnp.log(reduce(total_BT, "psum")) + largest_BT
    return log_total_BT - reduce(target_BT, "psum")


@jax.custom_vjp
def _softmax_terms(
    logits_BTV: jax.Array, largest_BT: jax.Array, rows_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of exp(logit - largest), and the logit of row `rows_BT`: [B, T] each.

    The logit is 0 if another shard has the row. The backward pass computes the
    exponentials again, so that no second array of the logits' size is stored.
    """
    total_BT = jnp.exp(logits_BTV - largest_BT[..., None]).sum(axis=-1)
    V = logits_BTV.shape[-1]
    is_local_BT = (rows_BT >= 0) & (rows_BT < V)
    index_BT1 = jnp.where(is_local_BT, rows_BT, 0)[..., None]
    target_BT = jnp.take_along_axis(logits_BTV, index_BT1, axis=-1)[..., 0]
    return total_BT, jnp.where(is_local_BT, target_BT, 0)


def _softmax_terms_forward(*args: jax.Array) -> tuple[Any, Any]:
    return _softmax_terms(*args), args


def _softmax_terms_backward(
    operands: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None, None]:
    logits_BTV, largest_BT, rows_BT = operands
    dtotal_BT1, dtarget_BT1 = (cotangent[..., None] for cotangent in cotangents)
    is_target_BTV = rows_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    exp_BTV = jnp.exp(logits_BTV - largest_BT[..., None])
    dlogits_BTV = dtotal_BT1 * exp_BTV + jnp.where(is_target_BTV, dtarget_BT1, 0)
    return dlogits_BTV, None, None


_softmax_terms.defvjp(_softmax_terms_forward, _softmax_terms_backward)


def sum_over_tokens(
    function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], chunk: int
) -> jax.Array:
    """The sum of `function`, itself a sum over tokens, over chunks of the tokens.

    Args:
      function: takes arrays [B, T, ...]; zeros must add nothing.
      arrays: its arguments [B, T, ...].
      chunk: if not 0, `function` gets this many tokens at a time, as [1, chunk, ...],
        and computes them again in the backward pass.
    """
    if not chunk:
        return function(*arrays)

    def add_chunk(total: jax.Array, chunk_arrays: Any) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(function)(*chunk_arrays), None

    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunks = tuple(_chunked(x, min(chunk, tokens)) for x in arrays)
    shape = jax.eval_shape(function, *(x[0] for x in chunks)).shape
    return lax.scan(add_chunk, jnp.zeros(shape, jnp.float32), chunks)[0]


def _chunked(x_BT: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] as [chunks, 1, chunk, ...]; zeros fill the last chunk."""
    x = x_BT.reshape(-1, *x_BT.shape[2:])
    padding = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, 1, chunk, *x.shape[1:])
