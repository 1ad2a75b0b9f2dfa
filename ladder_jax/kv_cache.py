"""Keys and values of past tokens: how they are stored, written and sized.

B rows (requests), K key-value heads, S cache length, H head dimension, T new tokens,
L layers. A head's keys are contiguous, [B, K, S, H], so that attention is one matrix
product a head, without a transpose, on every platform.

A cache of int8 or float8 has a scale for every token and head (symmetric, by the
absolute maximum). int8 rounds less; GPUs from Hopper on and TPU7x convert float8
faster.
Attention multiplies scores and weights by the scales, so that the cache is never copied
to a wider dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax import config
from ladder_jax.quantised import LARGEST, scaled

# Bytes an element. Those of LARGEST add a float32 scale for every token and head.
DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
SCALE_BYTES = 4


class KV(NamedTuple):
    """One layer's keys and values [B, K, S, H], or those of all, [L, B, K, S, H]."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None  # int8, float8: [..., B, K, S, 1] float32
    v_scale: jax.Array | None = None


def empty(shape: tuple[int, ...], dtype: str) -> KV:
    """A KV of zeros; `shape` is that of the keys, `dtype` one of DTYPES."""
    k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    if dtype not in LARGEST:
        return KV(k, v)
    scale_shape = (*shape[:-1], 1)
    return KV(k, v, *(jnp.zeros(scale_shape, jnp.float32) for _ in range(2)))


def bytes_per_token(model_config: config.Model, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers; `dtype` one of DTYPES."""
    bytes_per_head = model_config.head_dim * DTYPES[dtype]
    if dtype in LARGEST:
        bytes_per_head += SCALE_BYTES
    return 2 * model_config.layers * model_config.kv_heads * bytes_per_head


def write(
    cache: KV, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> KV:
    """One layer's cache with these keys and values written at these positions.

    Keys and values at positions outside the cache are dropped.
    """
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    index = rows_B1, slice(None), positions_BT  # [B, T, K]
    return write_at(cache, index, k_BTKH, v_BTKH)


def write_at(cache: KV, index: Any, k: jax.Array, v: jax.Array) -> KV:
    """One layer's cache with these keys and values at a NumPy index of its arrays.

    `k` and `v` have the shape of `cache.k[index]`. What the index has outside of the
    arrays is dropped. All heads of a token are one slice of the index: XLA:CPU writes
    one slice after the other.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[index].set(new.astype(old.dtype), mode="drop")

    if cache.k_scale is None or cache.v_scale is None:
        return KV(put(cache.k, k), put(cache.v, v))
    dtype = cache.k.dtype.name
    k, k_scale = scaled(k, [-1], dtype)  # a scale for every head
    v, v_scale = scaled(v, [-1], dtype)
    return KV(
        put(cache.k, k),
        put(cache.v, v),
        put(cache.k_scale, k_scale),
        put(cache.v_scale, v_scale),
    )


def choose_dtype(kv_dtype: str, compute_dtype: str, platform: str) -> str:
    """The dtype of cached keys and values, one of DTYPES.

    Args:
      kv_dtype: one of DTYPES, or "auto": the compute dtype, but float32 on CPUs, where
        XLA copies a whole bfloat16 cache for every write into it.
      compute_dtype: the model's.
      platform: of the devices, such as "cpu".
    """
    if kv_dtype != "auto":
        return kv_dtype
    return "float32" if platform == "cpu" else compute_dtype
