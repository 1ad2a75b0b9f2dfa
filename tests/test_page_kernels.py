"""JAX's kernels for pages equal XLA's own operations, in Pallas' interpret mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_model
from jax.experimental import pallas
from jax.experimental.pallas import tpu

from ladder_jax import kv_cache, page_kernels, pages

pytestmark = pytest.mark.usefixtures("fast_compiler")


@pytest.fixture
def interpreter(monkeypatch):
    """JAX interprets the TPU's kernel.

    The kernel has no argument for it. JAX 0.10's interpreter for TPUs cannot reshape a
    reference, and its general one cannot store to a part of one with a mask: so a store
    here is a load, a selection and a store.
    """

    def store(ref, value, *, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    interpreted = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", interpreted)
    monkeypatch.setattr(tpu, "store", store)
    jax.clear_caches()
    yield
    jax.clear_caches()


def make_pages(random, kernel, heads, rows, entries, page_size, H, dtype):
    """One layer's pages of random keys and values, and tables without a page twice.

    Returns (KV, the kernel's own pages, tables).
    """
    count = rows * entries + 2
    table = random.permutation(count)[: rows * entries].reshape(rows, entries)
    table = jnp.asarray(table.astype(np.int32))
    length = entries * page_size
    shape = rows, length, heads, H
    k, v = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    made = []
    for name in ("xla", kernel):
        empty = pages.empty(heads, count, page_size, H, dtype, name)
        made.append(pages.write(empty, k, v, positions, table))
    return *made, table


def check(kernel, kv, own, table, q, last, reads, window=None, tolerance=1e-6):
    """A kernel's attention to its own pages equals attention to the same KV."""
    T = q.shape[1]
    S, P = pages.page_size(kv), kv.k.shape[1]
    positions = jnp.asarray(last)[:, None] + jnp.arange(1 - T, 1)
    arguments = table, jnp.asarray(last), jnp.asarray(reads), S, P
    expected = pages.attend(q, kv, pages.reads(*arguments), positions, window)
    got = pages.attend(
        q, own, pages.reads(*arguments, kernel), positions, window, interpret=True
    )
    assert got.dtype == q.dtype
    got, expected = np.float32(got), np.float32(expected)
    assert not got[~np.asarray(reads)].any()
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


CASES = [  # heads, groups, tokens, page size, entries, window, dtype
    (2, 2, 1, 16, 9, None, "float32"),
    (8, 1, 1, 64, 3, None, "bfloat16"),
    (1, 4, 3, 16, 9, None, "bfloat16"),
    (1, 3, 5, 32, 6, 40, "float32"),
]


@pytest.mark.parametrize("heads, groups, tokens, page_size, entries, window, dtype", CASES)
def test_the_kernel_of_tpus(
    interpreter, heads, groups, tokens, page_size, entries, window, dtype
):
    random = np.random.default_rng(groups)
    rows, H = 5, 128
    kv, own, table = make_pages(
        random, "ragged", heads, rows, entries, page_size, H, dtype
    )
    q = random.standard_normal((rows, tokens, heads * groups, H), np.float32)
    # The first tokens; the end of a page; the middle of one; all.
    last = np.array([tokens - 1, 2 * page_size - 1, 50, 77, entries * page_size - 1])
    reads = np.array([True, True, False, True, False])
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    for shared in (table, table.at[3, :2].set(table[1, :2])):
        check(
            "ragged", kv, own, shared, jnp.asarray(q, dtype), last, reads, window, tolerance
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "heads, groups, tokens, page_size, entries, H",
    [(2, 2, 1, 16, 9, 64), (1, 4, 3, 32, 70, 16), (8, 1, 1, 128, 2, 128)],
)
def test_the_kernel_of_gpus(heads, groups, tokens, page_size, entries, H, dtype):
    random = np.random.default_rng(groups)
    rows = 5
    kv, own, table = make_pages(
        random, "triton", heads, rows, entries, page_size, H, dtype
    )
    q = random.standard_normal((rows, tokens, heads * groups, H), np.float32)
    last = np.array([tokens - 1, 2 * page_size - 1, 50, 77, entries * page_size - 1])
    reads = np.array([True, True, False, True, True])
    for shared in (table, table.at[3, :2].set(table[1, :2])):
        check(
            "triton", kv, own, shared, jnp.asarray(q, "bfloat16"), last, reads, None, 2e-2
        )
