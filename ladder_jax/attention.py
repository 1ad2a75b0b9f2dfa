"""Causal grouped-query attention within segments, by the platform's kernel.

B batch, T tokens (queries), S tokens (keys), N query heads, K key-value heads,
G = N / K, H head dimension.

Three kernels compute it for whole sequences: JAX's splash attention on TPU, cuDNN's on
NVIDIA GPUs, and the blockwise path of this file, in XLA's own operations. The blockwise
path runs on CPUs, on AMD GPUs, and wherever a shape or dtype fits no other kernel
(`kernel_for`); every test of a model on a CPU goes through it. It is there because
`jax.nn.dot_product_attention` computes the scores of all T x T pairs on a CPU and keeps
them for the backward pass. With gradients, blockwise is 1.1 to 3.4 times as fast: six
cases of 256 to 2048 tokens, float32 and bfloat16, side by side on a busy 2-core Intel
Xeon, 26 November 2026. Without gradients it is 0.7 (2048 tokens, float32) to 2.2 times
as fast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax import config
from ladder_jax.kv_cache import KV
from ladder_jax.matmul import einsum, product

# Finite, so that a row in which every key is masked stays finite.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


Kernel = str | Callable[..., jax.Array]  # see `attend`


def kernel_for(platform: str, model_config: config.Model, length: int) -> str:
    """The fastest kernel that can compute this model's causal self-attention.

    Args:
      platform: cpu, tpu, cuda or rocm (hardware.chips.platform).
      model_config: its dtype and head_dim decide.
      length: tokens in a sequence.

    Returns "splash" on TPU (a multiple of 128 tokens), "cudnn" on NVIDIA GPUs (bfloat16
    and heads of 8, 16, ... 128), "xla" elsewhere.
    """
    if platform == "tpu" and length % 128 == 0:
        return "splash"
    fits_cudnn = model_config.dtype == "bfloat16" and model_config.head_dim in range(
        8, 129, 8
    )
    return "cudnn" if platform == "cuda" and fits_cudnn else "xla"


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    kernel: Kernel = "xla",
    window: int | None = None,
) -> jax.Array:
    """Causal self-attention of whole sequences.

    Every token attends to itself and to the tokens before it that share its segment
    number. Queries are scaled here, by H ** -0.5.

    Args:
      q_BTNH, k_BTKH, v_BTKH: queries, keys and values; N is a multiple of K.
      segments_BT: integers.
      kernel: "splash", "cudnn" or "xla", see `kernel_for`; or a function of queries,
        keys and values in its place.
      window: a token sees itself and the `window - 1` tokens before it; None: all.

    Returns [B, T, N, H] in the queries' dtype.
    """
    if not isinstance(kernel, str):
        return kernel(q_BTNH, k_BTKH, v_BTKH)
    if kernel == "splash":
        return splash(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)
    if kernel == "cudnn":
        index_T = jnp.arange(q_BTNH.shape[1])
        seen_TS = sees(index_T[:, None], index_T, window)
        mask_BTS = seen_TS & (segments_BT[:, :, None] == segments_BT[:, None, :])
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask_BTS[:, None], implementation="cudnn"
        )
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    out_BTKGH = _blockwise(q_BTKGH, k_BTKH, v_BTKH, segments_BT, window)
    return out_BTKGH.reshape(B, T, N, H)


def sees(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Whether the token at index `query` sees the one at index `key`."""
    seen = query >= key
    return seen if window is None else seen & (key > query - window)


# ---------------------------------------------------------------- blockwise
# Each slice of queries attends to the keys from the first one in its window up to the
# slice's end, so that most masked scores are never computed. The forward pass saves the
# logarithm of each row's sum of weights. From it the backward pass computes the weights
# again (FlashAttention, arXiv 2205.14135, algorithm 4): no array of T x S elements is
# stored between the passes.


def _query_slices(T: int) -> list[slice]:
    """At most 8 slices of T queries, each of 128 queries or more."""
    size = max(128, -(-T // 8))
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def _keys_of(queries: slice, window: int | None) -> slice:
    """The keys that some query of a slice may see."""
    first = 0 if window is None else max(0, queries.start - window + 1)
    return slice(first, queries.stop)


def _scores(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    segments_BT: jax.Array,
    queries: slice,
    window: int | None,
) -> jax.Array:
    """The scores [B, K, G, T, S] of a slice of queries and the keys they may see."""
    keys = _keys_of(queries, window)
    mask_BTS = segments_BT[:, queries, None] == segments_BT[:, None, keys]
    query_T1 = jnp.arange(queries.start, queries.stop)[:, None]
    mask_BTS &= sees(query_T1, jnp.arange(keys.start, keys.stop), window)
    scores_BKGTS = product("btkgh,bskh->bkgts", q_BTKGH[:, queries], k_BSKH[:, keys])
    return jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    window: int | None,
) -> jax.Array:
    return _blockwise_forward(q_BTKGH, k_BTKH, v_BTKH, segments_BT, window)[0]


def _blockwise_forward(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    window: int | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    dtype = q_BTKGH.dtype
    outs, log_sums = [], []
    for queries in _query_slices(q_BTKGH.shape[1]):
        scores_BKGTS = _scores(q_BTKGH, k_BTKH, segments_BT, queries, window)
        largest_BKGT1 = scores_BKGTS.max(axis=-1, keepdims=True)
        weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
        sum_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
        weights_BKGTS = (weights_BKGTS / sum_BKGT1).astype(dtype)
        v_BSKH = v_BTKH[:, _keys_of(queries, window)]
        out_BTKGH = product("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
        outs.append(out_BTKGH.astype(dtype))
        log_sums.append(largest_BKGT1 + jnp.log(sum_BKGT1))
    out_BTKGH = jnp.concatenate(outs, axis=1)
    return out_BTKGH, (q_BTKGH, k_BTKH, v_BTKH, segments_BT, out_BTKGH, log_sums)


def _blockwise_backward(
    window: int | None, residuals: tuple[Any, ...], dout_BTKGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTKGH, k_BTKH, v_BTKH, segments_BT, out_BTKGH, log_sums = residuals
    dtype = q_BTKGH.dtype
    # D in the paper: a row's sum of weights * dweights.
    row_sum_BTKG = jnp.sum(dout_BTKGH.astype(jnp.float32) * out_BTKGH, axis=-1)
    dk_BTKH = jnp.zeros(k_BTKH.shape, jnp.float32)
    dv_BTKH = jnp.zeros(v_BTKH.shape, jnp.float32)
    dqs = []
    for queries, log_sum_BKGT1 in zip(_query_slices(q_BTKGH.shape[1]), log_sums):
        keys = _keys_of(queries, window)
        q, dout = q_BTKGH[:, queries], dout_BTKGH[:, queries]
        scores_BKGTS = _scores(q_BTKGH, k_BTKH, segments_BT, queries, window)
        weights_BKGTS = jnp.exp(scores_BKGTS - log_sum_BKGT1)
        dweights_BKGTS = product("btkgh,bskh->bkgts", dout, v_BTKH[:, keys])
        row_sum_BKGT1 = jnp.moveaxis(row_sum_BTKG[:, queries], 1, 3)[..., None]
        dscores_BKGTS = weights_BKGTS * (dweights_BKGTS - row_sum_BKGT1)
        dscores_BKGTS = dscores_BKGTS.astype(dtype)
        weights_BKGTS = weights_BKGTS.astype(dtype)
        dqs.append(product("bkgts,bskh->btkgh", dscores_BKGTS, k_BTKH[:, keys]))
        dk_BSKH = product("bkgts,btkgh->bskh", dscores_BKGTS, q)
        dv_BSKH = product("bkgts,btkgh->bskh", weights_BKGTS, dout)
        dk_BTKH = dk_BTKH.at[:, keys].add(dk_BSKH)
        dv_BTKH = dv_BTKH.at[:, keys].add(dv_BSKH)
    dq_BTKGH = jnp.concatenate(dqs, axis=1)
    return dq_BTKGH.astype(dtype), dk_BTKH.astype(dtype), dv_BTKH.astype(dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# ---------------------------------------------------------------- splash


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attend` by the TPU kernel in JAX; T is a multiple of 128.

    The kernel computes no block above the diagonal or outside of the window, and writes
    no scores to memory. With `interpret`, JAX runs it on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, N, H = q_BTNH.shape
    seen: Any = splash_attention.CausalMask((T, T))
    if window is not None:
        # (tokens before the query, tokens after it)
        seen = splash_attention.LocalMask((T, T), (window - 1, 0), offset=0)
    size = next(size for size in (512, 256, 128) if T % size == 0)
    block_sizes = splash_attention.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([seen] * N),
        block_sizes=block_sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_row(
        q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segments_T: jax.Array
    ) -> jax.Array:
        segments = splash_attention.SegmentIds(segments_T, segments_T)
        return kernel(q_NTH, k_KTH, v_KTH, segment_ids=segments)

    q_BTNH = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    # The kernel groups query heads itself: keys and values are not repeated.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BNTH = jax.vmap(one_row)(q, k, v, segments_BT)
    return out_BNTH.transpose(0, 2, 1, 3)


# ---------------------------------------------------------------- decoding


def attend_cache(
    q_BTNH: jax.Array, cache: KV, positions_BT: jax.Array, window: int | None = None
) -> jax.Array:
    """Attention of new tokens to a cache: position p attends to entries 0 to p.

    With a window it attends to the last `window` of these. The cache keeps the others
    and the products read them: a window saves no memory and no time here.

    The T G queries that share a key-value head are the R rows of one matrix. XLA:CPU
    is several times slower with separate dimensions T and G, and has no bfloat16
    product for them.

    Args:
      q_BTNH: queries.
      cache: one layer's keys and values, [B, K, S, H].
      positions_BT: the index in the cache of each query's own token.

    Returns [B, T, N, H] in the queries' dtype.
    """
    B, T, N, H = q_BTNH.shape
    _, K, S, _ = cache.k.shape
    G = N // K
    # At least the cache's dtype, so that the product does not round the cache.
    dtype = q_BTNH.dtype
    if cache.k_scale is None:
        dtype = jnp.promote_types(dtype, cache.k.dtype)
    q_BTNH_scaled = q_BTNH.astype(dtype) * jnp.asarray(H**-0.5, dtype)
    q_BKTGH = q_BTNH_scaled.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4)
    q_BKRH = q_BKTGH.reshape(B, K, T * G, H)
    scores_BKRS = einsum("bkrh,bksh->bkrs", q_BKRH, cache.k, jnp.float32)
    if cache.k_scale is not None:
        scores_BKRS = scores_BKRS * cache.k_scale.reshape(B, K, 1, S)
    positions_BR1 = jnp.repeat(positions_BT, G, axis=1)[:, :, None]
    mask_BRS = sees(positions_BR1, jnp.arange(S), window)
    scores_BKRS = jnp.where(mask_BRS[:, None], scores_BKRS, MASKED)
    weights_BKRS = jax.nn.softmax(scores_BKRS, axis=-1)
    if cache.v_scale is not None:
        weights_BKRS = weights_BKRS * cache.v_scale.reshape(B, K, 1, S)
    out_BKRH = _weighted_sum(weights_BKRS.astype(dtype), cache.v, q_BTNH.dtype)
    return out_BKRH.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _weighted_sum(
    weights_BKRS: jax.Array, v_BKSH: jax.Array, out_dtype: Any
) -> jax.Array:
    """The values' weighted sums [B, K, R, H]."""

    def multiply(weights_BKRS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
        return einsum("bkrs,bksh->bkrh", weights_BKRS, v_BKSH, out_dtype)

    def add_up(weights_BKRS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
        weights_BKSR = jnp.swapaxes(weights_BKRS, 2, 3).astype(jnp.float32)
        weighted_BKSH = weights_BKSR * v_BKSH.astype(jnp.float32)
        return weighted_BKSH.sum(axis=2, keepdims=True).astype(out_dtype)

    if weights_BKRS.shape[2] > 1:
        return multiply(weights_BKRS, v_BKSH)
    # XLA:CPU computes a batch of one-row products on one core, but a sum on all cores.
    return lax.platform_dependent(weights_BKRS, v_BKSH, cpu=add_up, default=multiply)
