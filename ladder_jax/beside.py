"""Tokens of slots and of prompts in one forward pass: each has its own pages.

Such a pass has one row of N tokens: one of every slot, and then the pieces of the
prompts, one after another (decode_prompts.carry).

W slots, P prompts, T tokens of a piece, N = W + P T tokens, N query heads, K key-value
heads, H head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax import pages
from ladder_jax.kv_cache import KV
from ladder_jax.page_kernels import Joint


class Beside(NamedTuple):
    """The pages that slots read, and those that the prompts beside them read."""

    slots: pages.Reads  # of W rows
    prompts: pages.Tables  # of P rows

    def split(self, x_1N: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns values of the slots [W, 1, ...] and of the prompts [P, T, ...]."""
        W, P = (len(reads.table_BM) for reads in self)
        x_N = x_1N[0]
        return x_N[:W, None], x_N[W:].reshape(P, -1, *x_N.shape[1:])


def write(
    kv: KV | Joint,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    reads: pages.Reads | Beside,
) -> KV | Joint:
    """One layer's pages with the keys and values of these tokens: pages.write."""
    if not isinstance(reads, Beside):
        return pages.write(kv, k_BTKH, v_BTKH, positions_BT, reads.table_BM)
    parts = zip(*map(reads.split, (k_BTKH, v_BTKH, positions_BT)), reads)
    for k, v, positions, part in parts:
        kv = pages.write(kv, k, v, positions, part.table_BM)
    return kv


def attend(
    q_BTNH: jax.Array,
    kv: KV | Joint,
    reads: pages.Reads | Beside,
    positions_BT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attention of these tokens to the pages of their rows: pages.attend."""
    if not isinstance(reads, Beside):
        return pages.attend(q_BTNH, kv, reads, positions_BT, window)
    parts = zip(*map(reads.split, (q_BTNH, positions_BT)), reads)
    outs = [pages.attend(q, kv, part, at, window) for q, at, part in parts]
    return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in outs])[None]
