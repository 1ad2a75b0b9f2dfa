"""Keys and values of past tokens: how they are stored, written and sized.

B rows (requests), K key-value heads, S cache length, H head, T new tokens, L layers. A head's keys lie together, [B, K,
S, H], so that attention is one matrix product a head without a transpose on any platform.

int8 keeps a scale for every token and head (symmetric, absolute maximum), which attention applies to scores and
weights, so that no wider copy of the cache is ever made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DTYPES = {
    "float32": 4,
    "bfloat16": 2,
    "int8": 1,
}  # bytes an element; int8 adds a float32 scale for every head


class KV(NamedTuple):
    """One layer's keys and values [B, K, S, H], or those of all layers, [L, B, K, S, H]."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None  # int8: [..., B, K, S, 1] float32
    v_scale: jax.Array | None = None


def empty(shape, dtype):
    """A KV of zeros; `shape` is that of the keys, `dtype` one of DTYPES."""
    scales = (
        (jnp.zeros((*shape[:-1], 1), jnp.float32) for _ in range(2))
        if dtype == "int8"
        else (None, None)
    )
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)


def bytes_per_token(config, dtype):
    """What one token of one request takes in all layers, bytes (config: config.Model)."""
    head = config.head_dim * DTYPES[dtype] + (4 if dtype == "int8" else 0)
    return 2 * config.layers * config.kv_heads * head


def write(cache, k_BTKH, v_BTKH, positions_BT):
    """The cache of one layer with these keys and values at these positions; positions outside it are dropped."""
    rows_B1, heads = (
        jnp.arange(positions_BT.shape[0])[:, None, None],
        jnp.arange(k_BTKH.shape[2]),
    )
    place = lambda kept, new: kept.at[rows_B1, heads, positions_BT[:, :, None]].set(
        new.astype(kept.dtype), mode="drop"
    )
    if cache.k_scale is None:
        return KV(place(cache.k, k_BTKH), place(cache.v, v_BTKH))
    (k_BTKH, k_scale), (v_BTKH, v_scale) = quantise(k_BTKH), quantise(v_BTKH)
    return KV(
        place(cache.k, k_BTKH),
        place(cache.v, v_BTKH),
        place(cache.k_scale, k_scale),
        place(cache.v_scale, v_scale),
    )


def quantise(x):
    """(int8, float32 scale [..., 1]) with x ~ int8 * scale over the last dimension."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-8) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale


def choose_dtype(kv_dtype: str, compute_dtype: str, platform: str) -> str:
    """Returns the dtype of cached keys and values, one of DTYPES.

    Args:
      kv_dtype: one of DTYPES, or "auto": the compute dtype, but float32 on CPUs, where
        XLA copies a whole bfloat16 cache for every write into it.
      compute_dtype: the model's.
      platform: of the devices, such as "cpu".
    """
    if kv_dtype != "auto":
        return kv_dtype
    return "float32" if platform == "cpu" else compute_dtype
