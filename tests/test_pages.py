"""Pages: attention equals that of rows; every page has as many users as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import kv_cache, pages
from ladder_jax.attention import attend_cache
from ladder_jax.bench.workloads import make_workload
from ladder_jax.page_kernels import PAGE_SIZES
from ladder_jax.serve import reads

pytestmark = pytest.mark.usefixtures("fast_compiler")
PAGE_SIZE = PAGE_SIZES["xla"]

H = 8


def make_rows(random, rows, heads, length, dtype):
    """One layer's keys and values, as rows of `length` tokens."""
    shape = rows, length, heads, H
    k, v = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
    cache = kv_cache.empty((rows, heads, length, H), dtype)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return kv_cache.write(cache, jnp.asarray(k), jnp.asarray(v), positions)


def in_pages(random, rows, page_size, spare):
    """The same in pages, in random places, and the tables."""
    count, _, length, _ = rows.k.shape
    entries = -(-length // page_size)
    places = random.permutation(count * entries + spare)[: count * entries]
    table = jnp.asarray(places.reshape(count, entries).astype(np.int32))

    def put(leaf):
        shape = leaf.shape[1], count * entries + spare, page_size, leaf.shape[3]
        pool = np.full(shape, 7, np.float32)
        for row, entry in np.ndindex(count, entries):
            tokens = np.asarray(leaf, np.float32)[row, :, entry * page_size :]
            tokens = tokens[:, :page_size]
            pool[:, table[row, entry], : tokens.shape[1]] = tokens
        return jnp.asarray(pool).astype(leaf.dtype)

    return jax.tree.map(put, rows), table


def read_rows(leaf, table, length):
    """The tokens of these tables as rows [B, K, length, H]."""
    leaf = np.asarray(leaf)
    rows = [np.concatenate(list(leaf[:, row].swapaxes(0, 1)), axis=1) for row in table]
    return np.stack(rows)[:, :, :length]


@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
@pytest.mark.parametrize(
    "rows, heads, groups, tokens, length, page_size, window",
    [
        (1, 1, 1, 1, 5, 4, None),
        (5, 2, 2, 1, 70, 8, None),
        (3, 2, 1, 4, 33, 16, None),
        (3, 1, 3, 1, 64, 32, 10),
        (17, 1, 2, 2, 40, 2, 33),  # more pairs than one iteration reads
        (2, 1, 1, 7, 300, 16, None),  # more tokens than one block
    ],
)
def test_attention_equals_that_of_rows(
    rows, heads, groups, tokens, length, page_size, window, dtype
):
    random = np.random.default_rng(rows + length)
    cache = make_rows(random, rows, heads, length, dtype)
    kv, table = in_pages(random, cache, page_size, spare=3)
    last = random.integers(tokens - 1, length, rows)
    positions = jnp.asarray(last[:, None] - np.arange(tokens)[::-1])
    shape = rows, tokens, heads * groups, H
    q = jnp.asarray(random.standard_normal(shape).astype(np.float32))
    reads = np.ones(rows, bool)
    reads[1:2] = False  # the second row reads nothing
    listed = pages.pairs(
        table, jnp.asarray(last), jnp.asarray(reads), page_size, kv.k.shape[1]
    )
    assert listed.total == (last[reads] // page_size + 1).sum()
    expected = np.array(attend_cache(q, cache, positions, window))
    expected[1:2] = 0
    attend = jax.jit(pages.attend, static_argnames="window")
    tolerance = 2e-6 if dtype == "float32" else 2e-5
    got = attend(q, kv, listed, positions, window=window)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    tables = pages.Tables(table, jnp.asarray(last))
    got = np.array(attend(q, kv, tables, positions, window=window))
    got[1:2] = 0
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_a_write_reaches_the_page_of_its_position(dtype):
    random = np.random.default_rng(0)
    cache = make_rows(random, 3, 2, 20, dtype)
    kv, table = in_pages(random, cache, 8, spare=1)
    new_k, new_v = jnp.asarray(random.standard_normal((2, 3, 2, 2, H), np.float32))
    positions = jnp.asarray([[0, 1], [19, 20], [7, 8]])
    table = table.at[0].set(pages.NO_PAGE)  # this row has no pages
    expected = kv_cache.write(cache, new_k, new_v, positions.at[0].set(99))
    got = pages.write(kv, new_k, new_v, positions, table)
    for page, row in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(read_rows(page, table[1:], 20), row[1:])
    before, after = jax.tree.leaves(kv), jax.tree.leaves(got)
    changed = sum(int((a != b).any(-1).sum()) for a, b in zip(before, after))
    per_token = len(before) * 2  # heads
    assert changed <= 4 * per_token  # two rows, two tokens


@pytest.mark.parametrize("length, most", [(256, 1.35), (1024, 1.15), (4096, 1.05)])
def test_few_bytes_are_read_beside_those_of_live_tokens(length, most):
    """In every step of ShareGPT-like requests, of which a row has `length` tokens."""
    requests = make_workload(
        "sharegpt",
        requests=200,
        prompt=length // 2,
        outputs=(1, length // 2),
        length=length,
        vocabulary=100,
        seed=0,
    )
    last = np.concatenate([len(r.prompt) + np.arange(r.max_tokens) for r in requests])
    table = jnp.zeros((last.size, length // PAGE_SIZE + 1), jnp.int32)
    listed = pages.pairs(
        table, jnp.asarray(last), jnp.ones(last.size, bool), PAGE_SIZE, 1
    )
    read = reads.in_pages(last + 1, PAGE_SIZE)
    assert int(listed.total) * PAGE_SIZE == read
    ratio = read / (last + 1).sum()
    assert 1 < ratio <= most


def test_padding_of_the_last_iteration_is_a_part_of_what_sixteen_slots_read():
    """At random steps of ShareGPT-like requests of up to 1024 tokens."""
    requests = make_workload(
        "sharegpt",
        requests=500,
        prompt=512,
        outputs=(1, 512),
        length=1024,
        vocabulary=100,
    )
    lengths = np.concatenate(
        [len(r.prompt) + np.arange(1, r.max_tokens + 1) for r in requests]
    )
    steps = np.random.default_rng(0).choice(lengths, (400, 16))
    read = [reads.in_pages(step, PAGE_SIZE, pages.FEW) for step in steps]
    whole = [reads.in_pages(step, PAGE_SIZE) for step in steps]
    assert all(tokens % (PAGE_SIZE * pages.FEW) == 0 for tokens in read)
    assert 1.04 < sum(whole) / steps.sum() < 1.06
    assert 1.04 < sum(read) / steps.sum() < 1.07


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.lists(st.booleans(), min_size=3, max_size=3),
            st.lists(st.booleans(), min_size=3, max_size=3),
        ),
        max_size=12,
    ),
    count=st.integers(1, 9),
)
def test_every_page_has_the_users_that_it_counts(steps, count):
    users = jnp.zeros(count, jnp.int32)
    table = jnp.full((3, 4), pages.NO_PAGE, jnp.int32)
    filled = [0, 0, 0]
    for grows, ends in steps:
        needs = jnp.asarray([g and n < 4 for g, n in zip(grows, filled)])
        free = int((users == 0).sum())
        new, lacks, users = pages.allocate(users, needs)
        assert int(lacks.sum()) == max(int(needs.sum()) - free, 0)
        for row in np.flatnonzero(np.asarray(needs & ~lacks)):
            table = table.at[row, filled[row]].set(new[row])
            filled[row] += 1
        users, table = pages.release(users, table, jnp.asarray(ends))
        filled = [0 if end else n for end, n in zip(ends, filled)]
        in_tables = np.asarray(table)[np.asarray(table) != pages.NO_PAGE]
        assert in_tables.size == sum(filled)
        counts = np.bincount(in_tables, minlength=count)
        assert counts.tolist() == users.tolist() and counts.max(initial=0) <= 1
