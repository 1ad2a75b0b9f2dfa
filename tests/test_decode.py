"""The device side alone: admission, cancelling, the memory shuffle, other shapes."""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import decode, decode_shapes, decode_state, decode_step, kv_cache
from ladder_jax.config import Model
from ladder_jax.quantised import quantise

MODEL_CONFIG = Model(
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
def make_spec(unroll_layers=True, fixed_trip_count=False):
    return decode.DecodeSpec(
        model_config=MODEL_CONFIG,
        mesh=helpers.make_mesh(),
        vocabulary=32,
        max_stop_ids=2,
        max_logit_bias=2,
        max_logprobs=0,
        kv_dtype="float32",
        unroll_layers=unroll_layers,
        fixed_trip_count=fixed_trip_count,
    )


def with_state(rows, **fields):
    """`rows` (decode.Slots) with these fields of its state."""
    fields = {name: jnp.array(value) for name, value in fields.items()}
    return rows._replace(state=rows.state._replace(**fields))


def sources_by_trying(active, width):
    """Every window is tried: the leftmost with the fewest active slots outside it."""

    def outside(start):
        inside = range(start, start + width)
        return [i for i, x in enumerate(active) if x and i not in inside]

    starts = range(len(active) - width + 1)
    start = min(starts, key=lambda start: (len(outside(start)), start))
    movers = iter(outside(start))
    return [i if active[i] else next(movers, i) for i in range(start, start + width)]


def test_the_memory_shuffle_makes_the_fewest_moves():
    source_slots = jax.jit(decode_shapes.source_slots, static_argnames="width")
    for width in (1, 2, 4):
        for active in itertools.product([False, True], repeat=6):
            if sum(active) > width:
                continue
            sources = source_slots(jnp.array(active), width=width).tolist()
            assert sources == sources_by_trying(active, width), (active, width)
            assert {i for i, x in enumerate(active) if x} <= set(sources), (
                active,
                width,
            )
            assert len(set(sources)) == width, (active, width)


def test_the_memory_shuffle_keeps_every_slot_when_there_are_more():
    got = decode_shapes.source_slots(jnp.array([True, False, True]), 5)
    assert got.tolist() == [0, 1, 2, 3, 3], "the new slots have no source: 3"


@pytest.mark.parametrize("unroll_layers", [True, False])
def test_reshaping_keeps_active_requests_and_nothing_else(unroll_layers):
    state = decode_state.empty(make_spec(unroll_layers), 4, 2, 8)
    marks = lambda x: x + jnp.arange(4, dtype=x.dtype).reshape(4, 1, 1, 1)
    slots = state.slots._replace(kv=jax.tree.map(marks, state.slots.kv))
    slots = with_state(slots, request=[-1, 7, -1, 9], active=[False, True, False, True])
    state = state._replace(slots=slots)

    def marks_by_request(state):
        return {
            int(request): [
                float(x[..., i, :, :, :].max()) for x in jax.tree.leaves(state.slots.kv)
            ]
            for i, request in enumerate(state.slots.state.request)
            if state.slots.state.active[i]
        }

    before = marks_by_request(state)
    assert set(before) == {7, 9}
    small = decode_shapes.reshape(state, 2, 4)
    assert marks_by_request(small) == before
    for x in jax.tree.leaves((small.slots.kv, small.staging.kv)):
        assert x.shape[-2] == 4
    large = decode_shapes.reshape(small, 4, 8)
    assert marks_by_request(large) == before
    assert large.slots.state.active.sum() == 2
    assert (large.slots.state.request == decode.NO_REQUEST).sum() == 2


@pytest.mark.parametrize("fixed_trip_count", [True, False])
def test_the_lowest_admission_order_takes_the_first_free_slot(fixed_trip_count):
    spec = make_spec(fixed_trip_count=fixed_trip_count)
    state = decode_state.empty(spec, 3, 3, 8)
    state = decode.DecodeState(
        with_state(state.slots, active=[False, True, False], request=[-1, 4, -1]),
        with_state(
            state.staging,
            request=[5, 6, 7],
            admission_order=[30, 10, 20],
            token=[1, 2, 3],
        ),
        None,
    )
    after = jax.jit(functools.partial(decode_step.admit_all, spec))(state)
    slots, staging = after.slots.state, after.staging.state
    assert slots.request.tolist() == [6, 4, 7]
    assert slots.token.tolist()[::2] == [2, 3]
    assert slots.active.all()
    assert staging.request.tolist() == [5, -1, -1]
    left = [30, decode.NOT_WAITING, decode.NOT_WAITING]
    assert staging.admission_order.tolist() == left


def test_cancelling_frees_slots_and_places_of_those_requests_alone():
    state = decode_state.empty(make_spec(), 2, 2, 8)
    state = decode.DecodeState(
        with_state(state.slots, request=[3, 4], active=[True, True]),
        with_state(state.staging, request=[5, 6], admission_order=[5, 6]),
        None,
    )
    after = decode.cancel(state, jnp.array([4, 5, decode.NO_REQUEST, 99]))
    assert after.slots.state.active.tolist() == [True, False]
    assert after.slots.state.request.tolist() == [3, -1]
    assert after.staging.state.request.tolist() == [-1, 6]
    assert after.staging.state.admission_order.tolist() == [decode.NOT_WAITING, 6]


def test_rounded_keys_and_values_are_near_and_attention_applies_their_scales():
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
    assert np.abs(outs["float8_e4m3fn"] - outs["float32"]).max() < 0.15
    made = quantise(k, [-1])
    assert made.int8.dtype == jnp.int8
    assert np.abs(made.int8 * made.scale - k).max() <= np.abs(k).max() / 254 * 1.001
    one_token = jax.tree.leaves(kv_cache.empty((2, 1, 2, 1, 8), "int8"))
    bytes_per_token = kv_cache.bytes_per_token(MODEL_CONFIG, "int8")
    assert bytes_per_token == sum(x.nbytes for x in one_token)


def test_writes_outside_the_cache_are_dropped():
    empty = kv_cache.empty((1, 1, 4, 2), "float32")
    ones = jnp.ones((1, 3, 1, 2))
    filled = kv_cache.write(empty, ones, ones, jnp.array([[3, 4, 1000]]))
    assert filled.k[0, 0, :, 0].tolist() == [0, 0, 0, 1]
