"""Keys and values of past tokens: sizes, writes, and the error of int8 and float8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import config, kv_cache
from ladder_jax.quantised import LARGEST, quantise, scaled

B, T, K, S, H = 2, 3, 2, 6, 8


def keys_and_values(dtype=jnp.float32):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(B, T, K, H)), dtype) for _ in range(2)]


def read(cache):
    """Keys and values in float32, [B, S, K, H]."""
    arrays = []
    for values, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        values = values.astype(jnp.float32)
        values = values if scale is None else values * scale
        arrays.append(np.asarray(values.transpose(0, 2, 1, 3)))
    return arrays


@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_bytes_per_token_is_what_a_token_takes(dtype):
    model_config = config.Model(layers=3, kv_heads=K, head_dim=H)
    one_token = kv_cache.empty((3, 1, K, 1, H), dtype)
    size = sum(x.nbytes for x in jax.tree.leaves(one_token))
    assert kv_cache.bytes_per_token(model_config, dtype) == size


@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_an_empty_cache_has_the_dtype_and_is_zero(dtype):
    cache = kv_cache.empty((B, K, S, H), dtype)
    assert cache.k.dtype == cache.v.dtype == dtype
    assert (cache.k_scale is not None) == (dtype in LARGEST)
    assert not any(x.any() for x in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    "dtype, error",
    [("float32", 0), ("bfloat16", 2**-8), ("int8", 1 / 254), ("float8_e4m3fn", 1 / 28)],
)
def test_every_row_writes_at_its_own_positions_and_nowhere_else(dtype, error):
    """`error` is the largest one, as a share of the head's largest value."""
    new = keys_and_values()
    positions = np.array([[0, 1, 2], [5, 3, 4]])
    cache = kv_cache.write(kv_cache.empty((B, K, S, H), dtype), *new, positions)
    for written, values in zip(read(cache), map(np.asarray, new)):
        largest = np.abs(values).max(axis=-1, keepdims=True)
        for row in range(B):
            read_back = written[row, positions[row]]
            assert np.all(
                np.abs(read_back - values[row]) <= error * largest[row] * 1.001
            )
        assert not written[0, 3:].any() and not written[1, :3].any()


def test_a_position_is_written_again():
    first, second = keys_and_values()
    positions = np.tile(np.arange(T), (B, 1))
    cache = kv_cache.empty((B, K, S, H), "float32")
    cache = kv_cache.write(cache, first, first, positions)
    cache = kv_cache.write(cache, second, second, positions)
    np.testing.assert_array_equal(read(cache)[0][:, :T], second)


def test_positions_outside_the_cache_are_dropped():
    k, v = keys_and_values()
    positions = np.array([[S - 1, S, 1000], [0, S, S + 1]])
    written, _ = read(
        kv_cache.write(kv_cache.empty((B, K, S, H), "float32"), k, v, positions)
    )
    np.testing.assert_array_equal(written[0, S - 1], k[0, 0])
    np.testing.assert_array_equal(written[1, 0], k[1, 0])
    assert not written[0, : S - 1].any() and not written[1, 1:].any()


def test_int8_of_zeros_is_zeros():
    made = quantise(jnp.zeros((2, H)), [-1])
    assert made.int8.dtype == jnp.int8 and made.scale.shape == (2, 1)
    assert not (made.int8 * made.scale).any() and jnp.isfinite(made.scale).all()


def test_int8_reaches_its_whole_range():
    made = quantise(jnp.array([[-3.0, 0.0, 1.5, 3.0]]), [-1])
    np.testing.assert_array_equal(made.int8, [[-127, 0, 64, 127]])
    np.testing.assert_allclose(made.scale, 3 / 127)


def test_float8_is_near_small_values_too():
    """It rounds to four significant bits: an error is a share of the value itself."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)), jnp.float32)
    numbers, scale = scaled(x, [-1], "float8_e4m3fn")
    assert numbers.dtype == jnp.float8_e4m3fn
    assert float(jnp.abs(numbers.astype(jnp.float32)).max()) == 448
    smallest = np.abs(scale) * 2.0**-9  # of the numbers that float8 has near 0
    error = np.abs(numbers.astype(jnp.float32) * scale - x)
    assert np.all(error <= np.maximum(np.abs(x) / 16, smallest) * 1.001)
