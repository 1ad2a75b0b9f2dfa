"""Keys and values in pages that all requests share: a pool, and a page table a row.

A page has the keys and values of S neighbouring tokens of one request. The table of a
row has the page of its first S tokens, of the next S, and so on, or NO_PAGE. So a row
takes the memory of the tokens that it has, not of the most that it could have, and
several rows may have the same page: their prompts begin with the same tokens. A page
counts its users; it is free if there are none (vLLM, arXiv 2309.06180).

On TPUs and NVIDIA GPUs a kernel computes attention where it fits the model
(page_kernels.py). Elsewhere XLA's own operations do. Attention of one new token a row
then reads the pages that rows have, and no others: the pages of all rows are one list
of (row, page) pairs; a loop reads MANY of them at a time, and a second one the rest,
FEW at a time. Attention of many new tokens, in prefill, is a loop over BLOCK tokens of
every row, up to the longest row. Both join the parts of a row by their largest scores
and sums (FlashAttention, arXiv 2205.14135; Flash-Decoding).

B rows, T new tokens, M entries of a table, P pages of the pool, S tokens of a page,
L layers, N query heads, K key-value heads, G = N / K, H head, R = T G, U pairs, C
tokens of a block, E pages of a block.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax import kv_cache, page_kernels
from ladder_jax.attention import MASKED, sees
from ladder_jax.kv_cache import KV, write_at
from ladder_jax.matmul import product
from ladder_jax.page_kernels import Joint

# An entry of a table without a page. It is outside of every array: JAX drops a write
# there, and a read gets another page, which attention masks.
NO_PAGE = 2**31 - 1
# (row, page) pairs that one iteration of attention's loops reads. On two CPU cores, 32
# are up to 1.6 times as fast as 4 for 16 long rows, and 4 up to 4 times as fast as 32
# for one row, whose last iteration is mostly padding.
MANY, FEW = 32, 4
BLOCK = 128  # tokens of each row that one iteration reads, if a row has many queries
GPU_BLOCK = 1024  # on GPUs, where the loop runs to the end of the longest table


class Pool(NamedTuple):
    """The pages of all requests.

    kv: a list of KVs [K, P, S, H], one a layer, if the layers are unrolled; else one KV
    [L, K, P, S, H]. For the TPU's kernel, a list of Joints [P, S, 2K, H].
    """

    kv: list[KV] | list[Joint] | KV
    users: jax.Array  # int32 [P]: how many tables, and stored prefixes, have the page


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tables:
    """The pages that a kernel reads; without one, of rows with many new tokens."""

    table_BM: jax.Array
    # int32: the last token of a row that is read. -1: none is, and the row gets zeros
    last_B: jax.Array
    kernel: str = field(default="xla", metadata=dict(static=True))  # see page_kernels


class Pairs(NamedTuple):
    """The (row, page) pairs that attention reads; `total` of them, then padding."""

    table_BM: jax.Array
    row_U: jax.Array  # int32
    entry_U: jax.Array  # int32: the page's entry in the table of its row
    page_U: jax.Array  # int32
    total: jax.Array  # int32 scalar


Reads = Pairs | Tables


# ---------------------------------------------------------------- allocation


def allocate(
    users_P: jax.Array, needs: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives free pages to those that need one, the first ones first.

    Args:
      needs: bool, of any shape.
    Returns (pages of this shape, or NO_PAGE; bool: who needs one and got none; users).
    """
    flat = needs.reshape(-1)
    free = jnp.nonzero(users_P == 0, size=flat.size, fill_value=NO_PAGE)[0]
    rank = jnp.cumsum(flat) - 1
    pages = jnp.where(flat, free[rank.clip(0)], NO_PAGE).astype(jnp.int32)
    users_P = users_P.at[pages].set(1, mode="drop")
    pages = pages.reshape(needs.shape)
    return pages, needs & (pages == NO_PAGE), users_P


def release(
    users_P: jax.Array, table_BM: jax.Array, released_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Takes the pages of these rows from them; returns (users, table)."""
    pages_BM = jnp.where(released_B[:, None], table_BM, NO_PAGE)
    users_P = users_P.at[pages_BM].add(-1, mode="drop")
    return users_P, jnp.where(released_B[:, None], NO_PAGE, table_BM)


# ---------------------------------------------------------------- the arrays


def empty(
    heads: int, page_count: int, page_size: int, head_dim: int, dtype: str, kernel: str
) -> KV | Joint:
    """One layer's pages of zeros, as a kernel of page_kernels reads them."""
    if kernel == "ragged":
        return Joint(jnp.zeros((page_count, page_size, 2 * heads, head_dim), dtype))
    return kv_cache.empty((heads, page_count, page_size, head_dim), dtype)


def page_size(kv: KV | Joint) -> int:
    """Returns S of one layer's pages, or of all layers'."""
    return kv.kv.shape[1] if isinstance(kv, Joint) else kv.k.shape[-2]


def write(
    kv: KV | Joint,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    table_BM: jax.Array,
) -> KV | Joint:
    """One layer's pages with these keys and values at these positions of the rows.

    Keys and values at positions without a page are dropped.
    """
    S = page_size(kv)
    page_BT = jnp.take_along_axis(
        table_BM, positions_BT // S, axis=1, mode="fill", fill_value=NO_PAGE
    )
    if isinstance(kv, Joint):
        B, T, K, H = k_BTKH.shape
        both = jnp.stack([k_BTKH, v_BTKH], axis=3).reshape(B, T, 2 * K, H)
        at = kv.kv.at[page_BT, positions_BT % S]
        return Joint(at.set(both.astype(kv.kv.dtype), mode="drop"))
    index = slice(None), page_BT, positions_BT % S  # [K, B, T]
    return write_at(kv, index, *(jnp.moveaxis(x, 2, 0) for x in (k_BTKH, v_BTKH)))


# ---------------------------------------------------------------- attention


def reads(
    table_BM: jax.Array,
    last_B: jax.Array,
    reads_B: jax.Array,
    page_size: int,
    page_count: int,
    kernel: str = "xla",
) -> Reads:
    """The pages with the tokens up to `last_B` of the rows that read, for a kernel."""
    if kernel == "xla":
        return pairs(table_BM, last_B, reads_B, page_size, page_count)
    return Tables(table_BM, jnp.where(reads_B, last_B, -1), kernel)


def pairs(
    table_BM: jax.Array,
    last_B: jax.Array,
    reads_B: jax.Array,
    page_size: int,
    page_count: int,
) -> Pairs:
    """Lists the pages that hold the tokens up to `last_B` of the rows that read."""
    M = table_BM.shape[1]
    count_B = jnp.where(reads_B, last_B // page_size + 1, 0)
    end_B = jnp.cumsum(count_B)
    # Rows with the same page have a pair each, so there may be more pairs than pages.
    most = -(-table_BM.size // MANY) * MANY
    pair_U = jnp.arange(most)
    row_U = jnp.searchsorted(end_B, pair_U, side="right").clip(0, last_B.size - 1)
    entry_U = pair_U - (end_B - count_B)[row_U]
    page_U = table_BM[row_U, entry_U.clip(0, M - 1)].clip(0, page_count - 1)
    return Pairs(table_BM, row_U, entry_U, page_U, end_B[-1])


def attend(
    q_BTNH: jax.Array,
    kv: KV | Joint,
    reads: Reads,
    positions_BT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attention of new tokens to the pages of their rows: attention.attend_cache.

    Args:
      q_BTNH: queries.
      kv: one layer's pages.
      reads: the pages that any query reads. A row that reads none gets zeros.
      positions_BT: the index of each query's own token in its sequence.
      window: a query sees its own token and the `window - 1` tokens before it.

    Returns [B, T, N, H] in the queries' dtype.
    """
    B, T, N, H = q_BTNH.shape
    if isinstance(kv, Joint):
        assert isinstance(reads, Tables)  # `reads` and `empty` have the same kernel
        return page_kernels.ragged(
            q_BTNH, kv, reads.table_BM, reads.last_B >= 0, positions_BT, window
        )
    few = T <= page_kernels.GPU_QUERIES
    if isinstance(reads, Tables) and reads.kernel == "triton" and few:
        return page_kernels.triton(
            q_BTNH, kv, reads.table_BM, reads.last_B >= 0, positions_BT
        )
    K = kv.k.shape[0]
    G = N // K
    # At least the cache's dtype, so that the product does not round the cache.
    dtype = q_BTNH.dtype if kv.k_scale is not None else kv.k.dtype
    dtype = jnp.promote_types(q_BTNH.dtype, dtype)
    q_BTKGH = (q_BTNH.astype(dtype) * H**-0.5).reshape(B, T, K, G, H)
    q_KBRH = q_BTKGH.transpose(2, 0, 1, 3, 4).reshape(K, B, T * G, H)
    position_BR = jnp.repeat(positions_BT, G, axis=1)
    attend_to = _attend_pairs if isinstance(reads, Pairs) else _attend_tables
    out_KBRH = attend_to(q_KBRH, kv, reads, position_BR, window)  # type: ignore[arg-type]
    out_BTKGH = out_KBRH.reshape(K, B, T, G, H).transpose(1, 2, 0, 3, 4)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


class _Part(NamedTuple):
    """Attention to some of the tokens: what joins it with the other parts."""

    largest: jax.Array  # [...]: the largest score
    sum: jax.Array  # [...]: of exp(score - largest)
    out: jax.Array  # [..., H]: the values' sum with these weights


def _attend_part(
    q_KURH: jax.Array,
    kv: KV,
    pages_UE: jax.Array,
    seen_URC: jax.Array,
) -> _Part:
    """Attention of U rows of queries to E pages each: C = E S tokens."""
    U, E = pages_UE.shape
    K, _, S, _ = kv.k.shape

    def read(leaf: jax.Array) -> jax.Array:
        return leaf[:, pages_UE.reshape(-1)].reshape(K, U, E * S, -1)

    def scale(leaf: jax.Array | None) -> jax.Array | int:
        return 1 if leaf is None else read(leaf)[..., 0][:, :, None]

    dtype = q_KURH.dtype
    score_KURC = product("kurh,kuch->kurc", q_KURH, read(kv.k).astype(dtype))
    score_KURC = jnp.where(seen_URC, score_KURC * scale(kv.k_scale), MASKED)
    largest_KUR = score_KURC.max(axis=-1)
    weight_KURC = jnp.exp(score_KURC - largest_KUR[..., None])
    weight_KURC = jnp.where(seen_URC, weight_KURC, 0)
    sum_KUR = weight_KURC.sum(axis=-1)
    weight_KURC = (weight_KURC * scale(kv.v_scale)).astype(dtype)
    out_KURH = product("kurc,kuch->kurh", weight_KURC, read(kv.v).astype(dtype))
    return _Part(largest_KUR, sum_KUR, out_KURH)


def _nothing(q_KBRH: jax.Array) -> _Part:
    """Attention to no tokens."""
    shape = q_KBRH.shape[:-1]
    return _Part(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q_KBRH.shape))


def _result(whole: _Part) -> jax.Array:
    return whole.out / jnp.where(whole.sum == 0, 1, whole.sum)[..., None]


def _attend_pairs(
    q_KBRH: jax.Array,
    kv: KV,
    pairs: Pairs,
    position_BR: jax.Array,
    window: int | None,
) -> jax.Array:
    S = kv.k.shape[2]

    def step(carry: tuple[jax.Array, _Part], count: int) -> tuple[jax.Array, _Part]:
        start, whole = carry

        def listed(values: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(values, start, count)

        row_U, entry_U = listed(pairs.row_U), listed(pairs.entry_U)
        token_UC = entry_U[:, None] * S + jnp.arange(S)
        seen_URC = sees(position_BR[row_U][:, :, None], token_UC[:, None], window)
        is_pair_U = start + jnp.arange(count) < pairs.total
        seen_URC &= is_pair_U[:, None, None]
        part = _attend_part(
            q_KBRH[:, row_U], kv, listed(pairs.page_U)[:, None], seen_URC
        )
        largest_KBR = whole.largest.at[:, row_U].max(part.largest)
        kept_KBR = jnp.exp(whole.largest - largest_KBR)
        share_KUR = jnp.exp(part.largest - largest_KBR[:, row_U])
        sum_KBR = (whole.sum * kept_KBR).at[:, row_U].add(part.sum * share_KUR)
        out_KBRH = whole.out * kept_KBR[..., None]
        out_KBRH = out_KBRH.at[:, row_U].add(part.out * share_KUR[..., None])
        return start + count, _Part(largest_KBR, sum_KBR, out_KBRH)

    def loop(end: jax.Array, count: int, carry: tuple[jax.Array, _Part]) -> Any:
        return lax.while_loop(
            lambda carry: carry[0] < end, partial(step, count=count), carry
        )

    carry = loop(pairs.total // MANY * MANY, MANY, (jnp.int32(0), _nothing(q_KBRH)))
    return _result(loop(pairs.total, FEW, carry)[1])


def _attend_tables(
    q_KBRH: jax.Array,
    kv: KV,
    tables: Tables,
    position_BR: jax.Array,
    window: int | None,
) -> jax.Array:
    _, P, S, _ = kv.k.shape
    M = tables.table_BM.shape[1]
    is_for_gpu = tables.kernel == "triton"
    E = min(-(-(GPU_BLOCK if is_for_gpu else BLOCK) // S), M)
    padding = [(0, 0), (0, -M % E)]
    table_BM = jnp.pad(tables.table_BM, padding).clip(0, P - 1)
    last = tables.last_B.max()
    start = jnp.int32(0), _nothing(q_KBRH)

    def step(carry: tuple[jax.Array, _Part]) -> tuple[jax.Array, _Part]:
        entry, whole = carry
        pages_BE = lax.dynamic_slice_in_dim(table_BM, entry, E, axis=1)
        token_C = entry * S + jnp.arange(E * S)
        seen_BRC = sees(position_BR[:, :, None], token_C, window)
        seen_BRC &= (tables.last_B >= 0)[:, None, None]
        part = _attend_part(q_KBRH, kv, pages_BE, seen_BRC)
        largest_KBR = jnp.maximum(whole.largest, part.largest)
        kept_KBR = jnp.exp(whole.largest - largest_KBR)
        share_KBR = jnp.exp(part.largest - largest_KBR)
        return entry + E, _Part(
            largest_KBR,
            whole.sum * kept_KBR + part.sum * share_KBR,
            whole.out * kept_KBR[..., None] + part.out * share_KBR[..., None],
        )

    if is_for_gpu:
        # On GPUs a loop of unknown trip count waits for the host in every iteration.
        blocks = table_BM.shape[1] // E
        _, whole = lax.fori_loop(0, blocks, lambda _, carry: step(carry), start)
    else:
        _, whole = lax.while_loop(lambda carry: carry[0] * S <= last, step, start)
    return _result(whole)
