"""Attention: every kernel against a loop over tokens, gradients included."""

import functools
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations

from ladder_jax import attention, config, kv_cache

FAST = {} if jax.default_backend() == "gpu" else helpers.FAST
HEADS = [(4, 4), (4, 2), (6, 1)]  # query and key-value heads


def inputs(B=2, T=10, N=4, K=2, H=8, dtype=jnp.float32):
    """Queries, keys, values, and segment numbers of packed rows.

    The first row is one document, the others are several.
    """
    random = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(random.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K)
    )
    segments = np.sort(random.integers(0, 4, (B, T)), axis=1)
    segments[0] = 1
    assert (segments[1:] != segments[1:, :1]).any(), (
        "the other rows should hold several documents"
    )
    return q, k, v, jnp.asarray(segments, jnp.int32)


def looped(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=None):
    """Attention written for reading: one softmax for every row, head and token."""
    q, k, v, segments = (
        np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    )
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(t - window + 1, 0)
        seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
        # Consecutive query heads share a key-value head.
        head = n * k.shape[2] // q.shape[2]
        scores = k[b, seen, head] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


def compiled(attend, **options):
    return jax.jit(functools.partial(attend, **options), compiler_options=FAST)


def value_and_gradients(attend, q, k, v, segments):
    """The output, and the gradients of a random weighting of it."""
    probe = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), q.dtype)

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(q, k, v):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return out, *back(probe)

    return both(q, k, v)


def assert_close(actual, expected, tolerance, what):
    for name, a, b in zip(
        ("output", "query gradient", "key gradient", "value gradient"), actual, expected
    ):
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{what}: {name} is {a.dtype}{a.shape}"
        )
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= tolerance, (
            f"{what}: the {name} differs by {error:.1e} of its largest value"
        )


@pytest.mark.parametrize("N, K", HEADS)
def test_attention_in_xla_is_the_loop(N, K):
    tensors = inputs(N=N, K=K)
    actual = compiled(attention.attend)(*tensors)
    np.testing.assert_allclose(actual, looped(*tensors), rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 10, 99])
def test_with_a_window_a_token_sees_no_token_further_back(window):
    tensors = inputs(N=4, K=2)
    actual = compiled(attention.attend, window=window)(*tensors)
    np.testing.assert_allclose(actual, looped(*tensors, window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [100, 200])
def test_slices_of_a_window_are_one_softmax_over_all_keys(window):
    """384 tokens are three slices: the last ones leave out keys before their window."""
    tensors = inputs(N=2, K=1, T=384)

    def whole(q, k, v, segments):
        """A mask over all scores."""
        distance = jnp.arange(384)[:, None] - jnp.arange(384)
        mask = (distance >= 0) & (distance < window)
        mask &= segments[:, :, None] == segments[:, None, :]
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], implementation="xla"
        )

    assert_close(
        value_and_gradients(
            functools.partial(attention.attend, window=window), *tensors
        ),
        value_and_gradients(whole, *tensors),
        1e-5,
        f"a window of {window}",
    )


@pytest.mark.parametrize(
    "N, K, T",
    [
        (4, 2, 384),
        pytest.param(4, 1, 512, marks=pytest.mark.slow),
        pytest.param(2, 2, 128, marks=pytest.mark.slow),
    ],
)
def test_splash_in_pallas_interpret_mode_is_the_xla_path(N, K, T):
    """384 tokens are three blocks: above the diagonal, on it, and with segment ends."""
    tensors = inputs(N=N, K=K, T=T, H=16)
    splash = functools.partial(attention.splash, interpret=True)
    assert_close(
        value_and_gradients(splash, *tensors),
        value_and_gradients(attention.attend, *tensors),
        2e-5,
        f"splash, {N} query and {K} key-value heads, {T} tokens",
    )


@pytest.mark.parametrize("window", [5, 130])
def test_splash_has_the_same_window(window):
    tensors = inputs(N=2, K=1, T=256, H=16)
    splash = functools.partial(attention.splash, window=window, interpret=True)
    attend = functools.partial(attention.attend, window=window)
    assert_close(
        value_and_gradients(splash, *tensors),
        value_and_gradients(attend, *tensors),
        2e-5,
        f"splash with a window of {window}",
    )


def test_splash_does_not_repeat_keys_and_values():
    q, k, v, segments = inputs(N=8, K=2, T=128, H=16)
    program = jax.make_jaxpr(functools.partial(attention.splash, interpret=True))(
        q, k, v, segments
    )
    calls = [
        eqn
        for eqn, _ in equations(program.jaxpr)
        if eqn.primitive.name == "pallas_call"
    ]
    shapes = [var.aval.shape for eqn in calls for var in eqn.invars]
    assert (
        calls
        and shapes.count((2, 8, 128, 16)) == 1
        and shapes.count((2, 2, 128, 16)) == 2
    ), f"the kernel should take 8 query heads, 2 key and value heads; it takes {shapes}"


@pytest.mark.parametrize("window", [None, 4])
def test_cudnns_arguments_give_the_same_result_in_xla(window):
    """The call for cuDNN goes to the same function's XLA implementation instead.

    So any platform can check what it means.
    """
    tensors = inputs(N=4, K=2)
    original, implementations = jax.nn.dot_product_attention, []

    def anywhere(*args, implementation, **kwargs):
        implementations.append(implementation)
        return original(*args, implementation="xla", **kwargs)

    with mock.patch.object(jax.nn, "dot_product_attention", anywhere):
        actual = value_and_gradients(
            functools.partial(attention.attend, kernel="cudnn", window=window), *tensors
        )
    assert set(implementations) == {"cudnn"}
    assert_close(
        actual,
        value_and_gradients(
            functools.partial(attention.attend, window=window), *tensors
        ),
        1e-5,
        "cudnn's arguments",
    )


@pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="cuDNN needs an NVIDIA GPU (run with JAX_PLATFORMS=cuda)",
)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("N, K, H", [(4, 4, 64), (4, 2, 128), (4, 1, 8), (4, 2, 72)])
def test_cudnn_is_the_xla_path(N, K, H, window):
    tensors = inputs(N=N, K=K, T=64, H=H, dtype=jnp.bfloat16)
    settings = config.Model(heads=N, kv_heads=K, head_dim=H)
    assert attention.kernel_for("cuda", settings, 64) == "cudnn"
    attend = functools.partial(attention.attend, window=window)
    actual = value_and_gradients(functools.partial(attend, kernel="cudnn"), *tensors)
    assert_close(actual, value_and_gradients(attend, *tensors), 2e-2, "cudnn")


@pytest.mark.parametrize(
    "platform, length, settings, expected",
    [
        ("tpu", 2048, {}, "splash"),
        ("tpu", 128, dict(dtype="float32"), "splash"),
        ("tpu", 100, {}, "xla"),
        ("cuda", 2048, {}, "cudnn"),
        ("cuda", 2048, dict(head_dim=128), "cudnn"),
        ("cuda", 100, {}, "cudnn"),
        ("cuda", 2048, dict(dtype="float32"), "xla"),
        ("cuda", 2048, dict(head_dim=12), "xla"),
        ("cuda", 2048, dict(head_dim=264), "xla"),
        ("cpu", 2048, {}, "xla"),
    ],
)
def test_the_kernel_is_one_that_takes_the_model(platform, length, settings, expected):
    """cuDNN takes bfloat16 and heads of a multiple of 8, up to 128.

    (jax._src.cudnn, check_is_flash_attention.)
    """
    assert attention.kernel_for(platform, config.Model(**settings), length) == expected


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("N, K", HEADS)
def test_a_query_on_the_cache_sees_what_it_sees_in_the_sequence(N, K, window):
    """Rows are at positions of their own; entries beyond them are never read."""
    q, k, v, _ = inputs(N=N, K=K)
    segments = np.zeros(q.shape[:2], np.int32)
    whole = np.asarray(compiled(attention.attend, window=window)(q, k, v, segments))
    cached = lambda x: np.pad(x, [(0, 0), (0, 6), (0, 0), (0, 0)], constant_values=1e3)
    positions = np.array([[3, 4, 5], [7, 8, 9]])
    rows = np.arange(2)[:, None]
    heads_first = lambda x: cached(x).transpose(0, 2, 1, 3)
    actual = compiled(attention.attend_cache, window=window)(
        np.asarray(q)[rows, positions],
        kv_cache.KV(heads_first(k), heads_first(v)),
        positions,
    )
    np.testing.assert_allclose(actual, whole[rows, positions], rtol=0, atol=1e-6)
