"""One door to attention: causal, grouped-query, within segments, by the kernel that suits the platform.

B batch, T tokens (queries), S tokens (keys), N query heads, K key-value heads, G = N / K, H head dimension.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax.matmul import einsum, product

MASKED = -0.7 * float(
    jnp.finfo(jnp.float32).max
)  # finite: a row with nothing to see stays finite


def kernel_for(platform, config, length):
    """The fastest kernel for causal self-attention over `length` tokens that takes this model (config.Model).

    "splash" on TPU (rows of a multiple of 128), "cudnn" on GPU (bfloat16, heads of 8, 16, ... 128), or "xla".
    """
    if platform == "tpu" and length % 128 == 0:
        return "splash"
    if (
        platform == "cuda"
        and config.dtype == "bfloat16"
        and config.head_dim in range(8, 129, 8)
    ):
        return "cudnn"
    return "xla"


def attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, kernel="xla"):
    """Every token attends to itself and to the tokens before it that share its segment number.

    Queries are scaled here, by H ** -0.5. Returns [B, T, N, H] in the queries' dtype.
    """
    if kernel == "splash":
        return _splash(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if kernel == "cudnn":
        index_T = jnp.arange(q_BTNH.shape[1])
        mask_BTS = (index_T[:, None] >= index_T) & (
            segments_BT[:, :, None] == segments_BT[:, None, :]
        )
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask_BTS[:, None], implementation="cudnn"
        )
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    return _blockwise(q_BTKGH, k_BTKH, v_BTKH, segments_BT).reshape(B, T, N, H)


def plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Attention as the equations have it; the mask says which keys a query sees. Returns [B, T, N, H]."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    scores_BKGTS = einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    return einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


# Causal self-attention by blocks of queries, each against the keys up to its end, so that what the mask hides is mostly
# never computed. The backward pass computes a block's weights again from the logarithm of their sum (FlashAttention's
# rule, arXiv 2205.14135, algorithm 4): between the passes nothing of size T x S is kept.


def _blocks(T):
    """Slices of queries: 128 at a time, more where that would make over 8 of them."""
    size = max(128, -(-T // 8))
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def _scores(q_BTKGH, k_BSKH, segments_BT, block):
    """The scores [B, K, G, T, S] of a block's queries and the keys that it may see, masked."""
    seen = slice(0, block.stop)
    mask_BTS = segments_BT[:, block, None] == segments_BT[:, None, seen]
    mask_BTS &= jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(block.stop)
    scores_BKGTS = product("btkgh,bskh->bkgts", q_BTKGH[:, block], k_BSKH[:, seen])
    return jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)


@jax.custom_vjp
def _blockwise(q_BTKGH, k_BTKH, v_BTKH, segments_BT):
    return _blockwise_forward(q_BTKGH, k_BTKH, v_BTKH, segments_BT)[0]


def _blockwise_forward(q_BTKGH, k_BTKH, v_BTKH, segments_BT):
    outs, log_sums = [], []
    for block in _blocks(q_BTKGH.shape[1]):
        scores_BKGTS = _scores(q_BTKGH, k_BTKH, segments_BT, block)
        top_BKGT1 = scores_BKGTS.max(axis=-1, keepdims=True)
        weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
        sum_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
        weights_BKGTS = (weights_BKGTS / sum_BKGT1).astype(q_BTKGH.dtype)
        outs.append(
            product("bkgts,bskh->btkgh", weights_BKGTS, v_BTKH[:, : block.stop]).astype(
                q_BTKGH.dtype
            )
        )
        log_sums.append(top_BKGT1 + jnp.log(sum_BKGT1))
    out_BTKGH = jnp.concatenate(outs, axis=1)
    return out_BTKGH, (q_BTKGH, k_BTKH, v_BTKH, segments_BT, out_BTKGH, log_sums)


def _blockwise_backward(kept, dout_BTKGH):
    q_BTKGH, k_BTKH, v_BTKH, segments_BT, out_BTKGH, log_sums = kept
    dtype = q_BTKGH.dtype
    dot_BTKG = jnp.sum(dout_BTKGH.astype(jnp.float32) * out_BTKGH, axis=-1)
    dk_BTKH, dv_BTKH = (jnp.zeros(k_BTKH.shape, jnp.float32) for _ in range(2))
    dqs = []
    for block, log_sum_BKGT1 in zip(_blocks(q_BTKGH.shape[1]), log_sums):
        seen = slice(0, block.stop)
        weights_BKGTS = jnp.exp(
            _scores(q_BTKGH, k_BTKH, segments_BT, block) - log_sum_BKGT1
        )
        dweights_BKGTS = product(
            "btkgh,bskh->bkgts", dout_BTKGH[:, block], v_BTKH[:, seen]
        )
        dscores_BKGTS = weights_BKGTS * (
            dweights_BKGTS - jnp.moveaxis(dot_BTKG[:, block], 1, 3)[..., None]
        )
        dscores_BKGTS = dscores_BKGTS.astype(dtype)
        dqs.append(product("bkgts,bskh->btkgh", dscores_BKGTS, k_BTKH[:, seen]))
        dk_BTKH = dk_BTKH.at[:, seen].add(
            product("bkgts,btkgh->bskh", dscores_BKGTS, q_BTKGH[:, block])
        )
        dv_BTKH = dv_BTKH.at[:, seen].add(
            product(
                "bkgts,btkgh->bskh", weights_BKGTS.astype(dtype), dout_BTKGH[:, block]
            )
        )
    dq_BTKGH = jnp.concatenate(dqs, axis=1)
    return dq_BTKGH.astype(dtype), dk_BTKH.astype(dtype), dv_BTKH.astype(dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _splash(q_BTNH, k_BTKH, v_BTKH, segments_BT, interpret=False):
    """The TPU kernel that JAX ships: blocks above the diagonal are skipped, scores never reach memory."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    B, T, N, H = q_BTNH.shape
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    block = next(size for size in (512, 256, 128) if T % size == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    q_BTNH = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    heads_first = [
        x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH)
    ]  # the kernel groups query heads
    out_BNTH = jax.vmap(
        lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s))
    )(*heads_first, segments_BT)
    return out_BNTH.transpose(0, 2, 1, 3)


def attend_cache(q_BTNH, cache, positions_BT):
    """A query at position p attends to the entries 0 to p of `cache` (cache.KV [B, K, S, H]). Returns [B, T, N, H].

    The queries that share a head of the cache are laid out as one matrix (R = T G rows): XLA:CPU is several times
    slower where it has to find that out, and has no such product of bfloat16.
    """
    B, T, N, H = q_BTNH.shape
    _, K, S, _ = cache.k.shape
    G = N // K
    dtype = jnp.promote_types(
        q_BTNH.dtype, cache.k.dtype
    )  # a cache wider than the queries is used as it is
    q_BKRH = (q_BTNH.astype(dtype) * jnp.asarray(H**-0.5, dtype)).reshape(B, T, K, G, H)
    q_BKRH = q_BKRH.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    scores_BKRS = einsum("bkrh,bksh->bkrs", q_BKRH, cache.k, jnp.float32)
    if cache.k_scale is not None:
        scores_BKRS = scores_BKRS * cache.k_scale.reshape(B, K, 1, S)
    seen_BRS = jnp.arange(S) <= jnp.repeat(positions_BT, G, axis=1)[:, :, None]
    weights_BKRS = jax.nn.softmax(
        jnp.where(seen_BRS[:, None], scores_BKRS, MASKED), axis=-1
    )
    if cache.v_scale is not None:
        weights_BKRS = weights_BKRS * cache.v_scale.reshape(B, K, 1, S)
    out_BKRH = _mix(weights_BKRS.astype(dtype), cache.v, q_BTNH.dtype)
    return out_BKRH.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _mix(weights_BKRS, v_BKSH, out_dtype):
    """The values' sums [B, K, R, H], weighted."""
    multiply = lambda weights, v: einsum("bkrs,bksh->bkrh", weights, v, out_dtype)
    if weights_BKRS.shape[2] > 1:
        return multiply(weights_BKRS, v_BKSH)

    def add_up(weights_BKRS, v_BKSH):
        weighted_BKSH = jnp.swapaxes(weights_BKRS, 2, 3).astype(jnp.float32) * v_BKSH
        return weighted_BKSH.sum(axis=2, keepdims=True).astype(out_dtype)

    # XLA:CPU computes many products of one row on one core, and a sum on all of them
    return lax.platform_dependent(weights_BKRS, v_BKSH, cpu=add_up, default=multiply)


def rotary(positions_BT, head_dim, theta, scaling=None):
    """Cosines and sines of rotary embedding (arXiv 2104.09864) for these positions, [B, T, 1, H/2], float32.

    `scaling` (config.RopeScaling): Llama-3.1's rule. Wavelengths above original_length / low_freq_factor are stretched
    by `factor`, those below original_length / high_freq_factor stay, those between are interpolated.
    """
    frequency_H = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None and scaling.factor != 1:
        turns_H = (
            scaling.original_length * frequency_H / (2 * jnp.pi)
        )  # over the original context
        kept_H = (turns_H - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        kept_H = jnp.clip(kept_H, 0, 1)
        frequency_H = frequency_H * (kept_H + (1 - kept_H) / scaling.factor)
    angle_BTH = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
    return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def rotate(x_BTNH, rotation):
    """`x` rotated by `rotary`'s angles; halves are paired, as in the Hugging Face layout of Llama weights."""
    cosine, sine = rotation
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return lax.concatenate([a * cosine - b * sine, b * cosine + a * sine], 3).astype(
        x_BTNH.dtype
    )
