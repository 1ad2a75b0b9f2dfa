"""JAX's own kernels for attention to pages: which one fits an engine, and its call.

On TPU, ragged paged attention (Pallas; vLLM uses it). It reads pages [P, S, 2K, H] in
which a token's keys and values lie side by side, `Joint`: one transfer from HBM for a
page, not one for every head, and one row of memory to write for a token. It accepts
several new tokens of a row and a window, so prefill uses it, too.

On NVIDIA GPUs, paged attention (Pallas through Triton), which reads KV [K, P, S, H] in
bfloat16, int8 or float8. Every new token is a row of its own for it.

Both read a block of pages at a time, to the block's end: `tokens_read`. Elsewhere
pages.py computes attention in XLA's own operations.

B rows, T new tokens, M entries of a table, P pages, S tokens of a page, N query heads,
K key-value heads, H head.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax.config import Model
from ladder_jax.kv_cache import KV
from ladder_jax.quantised import LARGEST

# Bytes that one iteration of the TPU's kernel reads, but MOST_TOKENS at most: while it
# computes, only the next block is on its way, and a short transfer waits for HBM's
# latency. Longer blocks are read further past a row's end. Not measured on a TPU.
TPU_BLOCK_BYTES = 256 << 10
MOST_TOKENS = 256
TPU_QUERIES = 32  # new tokens that it computes together
GPU_TOKENS = 64  # that one iteration of the GPU's kernel reads
GPU_SPLITS = 16  # parts of a row that a GPU computes in parallel, at most
# Tokens of a page. XLA's loop has more iterations with smaller pages: on two CPU cores
# 16 take 1.4 times as long as 32. Larger ones are read to their end: with requests of
# 200 tokens, 32 read 8% too much and 64 read 16%. On TPU a page is one transfer from
# HBM, and JAX advises few pages a row.
PAGE_SIZES = {"xla": 32, "triton": 32, "ragged": 64}
LEAST_PAGE = 16  # the fewest tokens of a page that a kernel reads
GPU_QUERIES = 8  # new tokens of a row, at most: each one reads the row's pages again


class Joint(NamedTuple):
    """One layer's pages [P, S, 2K, H]: key of head 0, value of head 0, key of head 1...

    It is what the TPU's kernel reads without a copy.
    """

    kv: jax.Array


# ---------------------------------------------------------------- the choice


def kernel_for(
    platform: str,
    model_config: Model,
    kv_dtype: str,
    tensor: int = 1,
    unroll_layers: bool = True,
) -> tuple[str, str]:
    """The kernel that computes a model's attention to pages, or why there is none.

    Args:
      platform: cpu, tpu, cuda or rocm (hardware.chips.platform).
      model_config: heads, head_dim, sliding_window and dtype decide.
      kv_dtype: of the cache, one of kv_cache.DTYPES.
      tensor: shards of the heads.
      unroll_layers: whether each layer has an array of its own.

    Returns ("ragged", "") on TPU, ("triton", "") on NVIDIA GPUs; ("xla", reason) where
    no kernel fits.
    """
    name = {"tpu": "ragged", "cuda": "triton"}.get(platform)
    if name is None:
        return "xla", f"there is no kernel for {platform}"
    reasons = _against_ragged if name == "ragged" else _against_triton
    for misfits, reason in (
        (not unroll_layers, "decode.unroll_layers=False copies a layer's pages"),
        *reasons(model_config, kv_dtype, model_config.kv_heads // tensor),
    ):
        if misfits:
            return "xla", reason
    return name, ""


def _against_ragged(
    model_config: Model, kv_dtype: str, heads: int
) -> list[tuple[bool, str]]:
    """(whether it is so, what speaks against the TPU's kernel)."""
    # Two heads of bfloat16 share a word; XLA tiles 1, 2, 4 or a multiple of 8 words.
    words = heads if kv_dtype == "bfloat16" else 2 * heads
    H = model_config.head_dim
    return [
        (H != 128, f"its heads are 128 wide, not model.head_dim={H}"),
        (
            kv_dtype != model_config.dtype,
            f"it reads keys and values in model.dtype={model_config.dtype}, "
            f"not in {kv_dtype}",
        ),
        (
            words not in (1, 2, 4) and words % 8 != 0,
            f"it cannot tile {heads} key-value heads of a shard",
        ),
    ]


def _against_triton(
    model_config: Model, kv_dtype: str, heads: int
) -> list[tuple[bool, str]]:
    """(whether it is so, what speaks against the GPU's kernel)."""
    H, window = model_config.head_dim, model_config.sliding_window
    is_power = H >= 16 and H.bit_count() == 1
    return [
        (model_config.dtype != "bfloat16", "its queries are bfloat16"),
        (
            kv_dtype not in ("bfloat16", *LARGEST),
            f"it reads bfloat16, int8 and float8_e4m3fn, not {kv_dtype}",
        ),
        (not is_power, f"its heads are 16, 32, 64, ... wide, not {H}"),
        (window is not None, f"it has no window: model.sliding_window={window}"),
    ]


def reads_pages_of(kernel: str, page_size: int) -> bool:
    """Whether a kernel reads pages of so many tokens."""
    is_power = page_size >= LEAST_PAGE and page_size.bit_count() == 1
    return kernel == "xla" or is_power


def block_tokens(kernel: str, page_size: int, token_bytes: int) -> int:
    """The tokens of a row that an iteration of a kernel reads together.

    token_bytes: of a token's keys and values in one layer, on one device.
    """
    if kernel == "xla":
        return page_size
    tokens = GPU_TOKENS
    if kernel == "ragged":
        tokens = min(TPU_BLOCK_BYTES // token_bytes, MOST_TOKENS)
    return max(tokens // page_size, 1) * page_size


def tokens_read(tokens: int, block: int) -> int:
    """The tokens that attention reads of a row that has so many."""
    return -(-tokens // block) * block


# ---------------------------------------------------------------- the calls


def ragged(
    q_BTNH: jax.Array,
    pages: Joint,
    table_BM: jax.Array,
    reads_B: jax.Array,
    positions_BT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """pages.attend by the TPU's kernel. The tokens of a row are neighbours."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
        ragged_paged_attention,
    )

    B, T, N, H = q_BTNH.shape
    P, S, heads, _ = pages.kv.shape
    M = table_BM.shape[1]
    token_bytes = heads * H * pages.kv.dtype.itemsize
    # The kernel ends at the last row that reads. It would take the wrong pages after a
    # row without any, so it reads one block for each of those before.
    count = jnp.max(jnp.where(reads_B, jnp.arange(1, B + 1), 1))
    out = ragged_paged_attention(
        q_BTNH.reshape(B * T, N, H).astype(pages.kv.dtype),
        pages.kv,
        jnp.where(reads_B, positions_BT[:, -1] + 1, T).astype(jnp.int32),
        table_BM.clip(0, P - 1),
        jnp.arange(B + 1, dtype=jnp.int32) * T,
        count.reshape(1).astype(jnp.int32),
        sm_scale=H**-0.5,
        sliding_window=window,
        num_kv_pages_per_block=min(block_tokens("ragged", S, token_bytes) // S, M),
        num_queries_per_block=min(T, TPU_QUERIES),
    )
    out_BTNH = out.reshape(B, T, N, H).astype(q_BTNH.dtype)
    return jnp.where(reads_B[:, None, None, None], out_BTNH, 0)


def triton(
    q_BTNH: jax.Array,
    kv: KV,
    table_BM: jax.Array,
    reads_B: jax.Array,
    positions_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """pages.attend by the GPU's kernel. With `interpret`, JAX runs it anywhere."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    B, T, N, H = q_BTNH.shape
    _, P, S, _ = kv.k.shape
    block = block_tokens("triton", S, 0) // S
    blocks = -(-table_BM.shape[1] // block)
    splits = min(GPU_SPLITS, blocks)
    entries = math.ceil(blocks / splits) * splits * block
    padding = [(0, 0), (0, entries - table_BM.shape[1])]
    table_BM = jnp.pad(table_BM.clip(0, P - 1), padding)
    lengths_BT = jnp.where(reads_B[:, None], positions_BT + 1, 0).astype(jnp.int32)
    scales: dict[str, Any] = {}
    if kv.k_scale is not None and kv.v_scale is not None:
        scales = dict(
            k_scales_pages=kv.k_scale[..., 0], v_scales_pages=kv.v_scale[..., 0]
        )
    q_BTNH_scaled = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    out = paged_attention(
        q_BTNH_scaled.reshape(B * T, N, H),
        kv.k,
        kv.v,
        jnp.repeat(table_BM, T, axis=0),
        lengths_BT.reshape(B * T),
        **scales,
        pages_per_compute_block=block,
        k_splits=splits,
        interpret=interpret,
    )
    return out.reshape(q_BTNH.shape)
