"""Compares a kernel's attention to pages with XLA's own operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ladder_jax import pages
from ladder_jax.quantised import LARGEST


def check(kernel, heads, groups, tokens, page_size, entries, H, dtype, window=None):
    """A kernel's attention to its own pages equals attention to the same KV by XLA.

    Five rows: the first tokens; a whole page; two that end inside a page, of which one
    reads nothing and the other shares a page with the second row; all tokens.
    """
    random = np.random.default_rng(groups)
    rows, length = 5, entries * page_size
    count = rows * entries + 2
    table = random.permutation(count)[: rows * entries].reshape(rows, entries)
    table = jnp.asarray(table.astype(np.int32))
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    shape = rows, length, heads, H
    k, v = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(2))
    write = jax.jit(pages.write)
    kv, own = (
        write(
            pages.empty(heads, count, page_size, H, dtype, name), k, v, positions, table
        )
        for name in ("xla", kernel)
    )
    table = table.at[3, 0].set(table[1, 0])
    last = jnp.asarray(
        [tokens - 1, page_size - 1, page_size // 2, length - 7, length - 1]
    )
    reads = jnp.asarray([True, True, False, True, True])
    q_dtype = "bfloat16" if dtype in LARGEST else dtype
    q = random.standard_normal((rows, tokens, heads * groups, H), np.float32)
    q = jnp.asarray(q, q_dtype)

    @functools.partial(jax.jit, static_argnames="name")
    def attend(q, kv, name):
        listed = pages.reads(table, last, reads, page_size, count, name)
        positions = last[:, None] + jnp.arange(1 - tokens, 1)
        return pages.attend(q, kv, listed, positions, window)

    expected, got = attend(q, kv, "xla"), attend(q, own, kernel)
    assert got.dtype == q.dtype and not got[2].any()
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.float32(got), np.float32(expected), rtol=tolerance, atol=tolerance
    )
