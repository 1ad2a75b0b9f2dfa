"""The device side alone: moves of rows, the memory shuffle, reshaping, admission inside the loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import decode, kv_cache, sharding
from ladder_jax.config import Mesh, Model

CONFIG = Model(
    vocab_size=32,
    dim=16,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=8,
    ffn_dim=16,
    dtype="float32",
    max_length=16,
)


@functools.cache
def program(**changes):
    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    options = dict(unroll_layers=True, fixed=False) | changes
    return decode.DecodeSpec(CONFIG, mesh, 32, (2, 2), 0, "float32", **options)


def moves(live, width):
    """(moves, slots taken) by trying every window: the fewest live slots outside, leftmost first."""
    starts = range(len(live) - width + 1)
    outside = lambda s: [i for i, x in enumerate(live) if x and not s <= i < s + width]
    start = min(starts, key=lambda s: (len(outside(s)), s))
    movers = iter(outside(start))
    return [i if live[i] else next(movers, i) for i in range(start, start + width)]


def test_the_memory_shuffle_makes_the_fewest_moves():
    plan = jax.jit(decode.shuffle, static_argnames="width")
    for width in (1, 2, 4):
        for live in itertools.product([False, True], repeat=6):
            if sum(live) > width:
                continue
            got = plan(jnp.array(live), width=width).tolist()
            assert got == moves(live, width), (live, width)
            assert {i for i, x in enumerate(live) if x} <= set(got) and len(
                set(got)
            ) == width


@pytest.mark.parametrize("unroll_layers", [True, False])
def test_reshaping_keeps_what_is_live_and_nothing_else(unroll_layers):
    p = program(unroll_layers=unroll_layers)
    state = decode.empty(p, 4, 2, 8)
    marked = jax.tree.map(
        lambda x: x + jnp.arange(4, dtype=x.dtype).reshape(4, 1, 1, 1), state.slots.kv
    )
    row = state.slots.row._replace(
        request=jnp.array([-1, 7, -1, 9]), active=jnp.array([False, True, False, True])
    )
    state = state._replace(slots=decode.Slots(row, marked))
    held = lambda state: {
        int(r): [
            float(x[..., i, :, :, :].max()) for x in jax.tree.leaves(state.slots.kv)
        ]
        for i, r in enumerate(state.slots.state.request)
        if state.slots.state.active[i]
    }
    before = held(state)
    small = decode.reshape(state, 2, 4)
    assert held(small) == before and set(before) == {7, 9}
    assert all(
        x.shape[-2] == 4 for x in jax.tree.leaves((small.slots.kv, small.staging.kv))
    )
    large = decode.reshape(small, 4, 8)
    assert held(large) == before
    assert (
        large.slots.state.active.sum() == 2
        and (np.asarray(large.slots.state.request) == -1).sum() == 2
    )


@pytest.mark.parametrize("fixed", [True, False])
def test_whose_turn_it_is_moves_to_the_first_free_slot(fixed):
    p = program(fixed=fixed)
    state = decode.empty(p, 3, 3, 8)
    staging = state.staging.row._replace(
        request=jnp.array([5, 6, 7]),
        admission_order=jnp.array([30, 10, 20]),
        token=jnp.array([1, 2, 3]),
    )
    slots = state.slots.row._replace(
        active=jnp.array([False, True, False]), request=jnp.array([-1, 4, -1])
    )
    state = decode.DecodeState(
        decode.Slots(slots, state.slots.kv), decode.Slots(staging, state.staging.kv)
    )
    after = jax.jit(functools.partial(decode.admit_all, p))(state)
    assert after.slots.state.request.tolist() == [
        6,
        4,
        7,
    ] and after.slots.state.token.tolist()[::2] == [2, 3]
    assert after.slots.state.active.all()
    assert (
        after.staging.state.request.tolist() == [5, -1, -1]
        and after.staging.state.admission_order[0] == 30
    )
    assert after.staging.state.admission_order[1:].tolist() == [decode.NOT_WAITING] * 2


def test_cancelling_frees_slots_and_places_of_those_requests_alone():
    state = decode.empty(program(), 2, 2, 8)
    slots = state.slots.row._replace(
        request=jnp.array([3, 4]), active=jnp.ones(2, bool)
    )
    staging = state.staging.row._replace(
        request=jnp.array([5, 6]), admission_order=jnp.array([5, 6])
    )
    state = decode.DecodeState(
        decode.Slots(slots, state.slots.kv), decode.Slots(staging, state.staging.kv)
    )
    after = decode.cancel(state, jnp.array([4, 5, -1, 99]))
    assert after.slots.state.active.tolist() == [
        True,
        False,
    ] and after.slots.state.request.tolist() == [3, -1]
    assert after.staging.state.request.tolist() == [
        -1,
        6,
    ] and after.staging.state.admission_order.tolist() == [decode.NOT_WAITING, 6]


def test_int8_keys_and_values_are_near_and_attention_applies_their_scales():
    from ladder_jax import attention

    rng = np.random.default_rng(0)
    k, v, q = (
        jnp.asarray(rng.normal(size=(2, 5, 2, 8)), jnp.float32) for _ in range(3)
    )
    positions = jnp.tile(jnp.arange(5), (2, 1))
    outs = {}
    for dtype in kv_cache.DTYPES:
        filled = kv_cache.write(kv_cache.empty((2, 2, 6, 8), dtype), k, v, positions)
        outs[dtype] = attention.attend_cache(q, filled, positions)
    assert np.abs(outs["int8"] - outs["float32"]).max() < 0.03
    assert np.abs(outs["bfloat16"] - outs["float32"]).max() < 0.03
    low, scale = kv_cache.quantise(k)
    assert (
        low.dtype == jnp.int8
        and np.abs(low * scale - k).max() <= np.abs(k).max() / 254 * 1.001
    )
    assert kv_cache.bytes_per_token(CONFIG, "int8") == sum(
        x.nbytes for x in jax.tree.leaves(kv_cache.empty((2, 1, 2, 1, 8), "int8"))
    )


def test_writes_outside_the_cache_are_dropped():
    empty = kv_cache.empty((1, 1, 4, 2), "float32")
    ones = jnp.ones((1, 3, 1, 2))
    filled = kv_cache.write(empty, ones, ones, jnp.array([[3, 4, 1000]]))
    assert filled.k[0, 0, :, 0].tolist() == [0, 0, 0, 1]
