"""JAX's kernels for pages equal XLA's own operations, in Pallas' interpret mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import carry_always, finish, submit_all
from engines import check as check_tokens
from helpers import ENGINE_MODEL, make_engine, small_model
from jax.experimental import pallas
from jax.experimental.pallas import tpu

# Before `fast_compiler` replaces the jax.jit that these modules use.
from jax.experimental.pallas.ops.gpu import paged_attention  # noqa: F401
from jax.experimental.pallas.ops.tpu import ragged_paged_attention  # noqa: F401
from page_attention import check

from ladder_jax import page_kernels
from ladder_jax.bench.workloads import make_workload

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


@pytest.fixture
def interpreter_of_triton(monkeypatch):
    """JAX interprets the GPU's kernel."""
    interpreted = functools.partial(page_kernels.triton, interpret=True)
    monkeypatch.setattr(page_kernels, "triton", interpreted)


@pytest.mark.parametrize(
    "heads, groups, tokens, page_size, entries, dtype, window",
    [
        (2, 2, 1, 16, 9, "float32", None),
        (8, 1, 1, 64, 3, "bfloat16", None),
        (1, 4, 3, 16, 9, "bfloat16", None),
        (1, 3, 5, 32, 6, "float32", 40),
    ],
)
def test_the_kernel_of_tpus(
    interpreter, heads, groups, tokens, page_size, entries, dtype, window
):
    check("ragged", heads, groups, tokens, page_size, entries, 128, dtype, window)


@pytest.mark.parametrize(
    "heads, groups, tokens, page_size, entries, H, dtype",
    [
        (2, 2, 1, 16, 9, 64, "bfloat16"),
        (1, 4, 3, 32, 70, 16, "int8"),
        (4, 1, 1, 128, 2, 32, "int8"),
        (1, 2, 2, 16, 9, 64, "float8_e4m3fn"),
        (1, 2, 9, 32, 40, 16, "bfloat16"),  # more tokens than the kernel takes
    ],
)
def test_the_kernel_of_gpus(
    interpreter_of_triton, heads, groups, tokens, page_size, entries, H, dtype
):
    check("triton", heads, groups, tokens, page_size, entries, H, dtype)


LARGE = small_model(dtype="bfloat16", head_dim=128)  # 8 key-value heads


@pytest.mark.parametrize(
    "platform, fields, arguments, expected",
    [
        ("tpu", {}, {}, "ragged"),
        ("tpu", dict(dtype="float32"), dict(kv_dtype="float32"), "ragged"),
        ("tpu", dict(sliding_window=64), dict(tensor=8), "ragged"),
        ("tpu", dict(head_dim=64), {}, "not model.head_dim=64"),
        ("tpu", {}, dict(kv_dtype="int8"), "model.dtype=bfloat16, not in int8"),
        ("tpu", dict(kv_heads=6, heads=12), dict(tensor=2), "tile 3 key-value heads"),
        ("tpu", {}, dict(unroll_layers=False), "decode.unroll_layers=False"),
        ("cuda", {}, {}, "triton"),
        ("cuda", dict(head_dim=64), dict(kv_dtype="int8"), "triton"),
        ("cuda", {}, dict(kv_dtype="float8_e4m3fn"), "triton"),
        ("cuda", dict(head_dim=96), {}, "wide, not 96"),
        ("cuda", dict(sliding_window=64), {}, "model.sliding_window=64"),
        ("cuda", dict(dtype="float32"), {}, "its queries are bfloat16"),
        ("cuda", {}, dict(kv_dtype="float32"), "not float32"),
        ("rocm", {}, {}, "no kernel for rocm"),
        ("cpu", {}, {}, "no kernel for cpu"),
    ],
)
def test_the_kernel_or_why_there_is_none(platform, fields, arguments, expected):
    model_config = dataclasses.replace(LARGE, **fields)
    arguments = dict(kv_dtype="bfloat16") | arguments
    name, reason = page_kernels.kernel_for(platform, model_config, **arguments)
    if name == "xla":
        assert expected in reason
    else:
        assert (name, reason) == (expected, "")


@pytest.mark.parametrize(
    "kernel, heads, most",
    [("triton", 8, 1.15), ("ragged", 8, 1.15), ("ragged", 1, 1.45)],
)
def test_few_tokens_are_read_beside_the_live_ones(kernel, heads, most):
    """In every step of ShareGPT-like requests of at most 1024 tokens."""
    requests = make_workload(
        "sharegpt",
        requests=200,
        prompt=512,
        outputs=(1, 512),
        length=1024,
        vocabulary=100,
        seed=0,
    )
    alive = [n for r in requests for n in len(r.prompt) + 1 + np.arange(r.max_tokens)]
    size = page_kernels.PAGE_SIZES[kernel]
    block = page_kernels.block_tokens(kernel, size, 2 * heads * 128 * 2)
    read = sum(page_kernels.tokens_read(int(n), block) for n in alive)
    assert 1 < read / sum(alive) <= most


@pytest.mark.parametrize("kernel, tensor", [("ragged", 2), ("triton", 1)])
def test_an_engine_whose_pages_a_kernel_reads(
    interpreter, interpreter_of_triton, monkeypatch, kernel, tensor
):
    """Tokens are exact, with prompts in pieces, some of which iterations carry, and a
    request that loses its pages."""
    monkeypatch.setattr(page_kernels, "kernel_for", lambda *_: (kernel, ""))
    model_config = dataclasses.replace(
        ENGINE_MODEL, dim=16, heads=4, kv_heads=2, head_dim=128, layers=1
    )
    page_bytes = 16 * 2 * 2 * 128 * 4 // tensor
    engine = make_engine(
        model_config,
        tensor,
        slots=2,
        page_size=16,
        kv_memory=str(5 * page_bytes),
        carry_tokens=16,
    )
    carry_always(engine)
    assert engine.spec.page_kernel == kernel
    requests = [([i, 7, i] * (5 + i), dict(max_tokens=38)) for i in range(3)]
    submitted = submit_all(engine, requests)
    finish(engine)
    assert engine.counters.preempted and engine.counters.carried
    check_tokens(engine, submitted, model_config=model_config, tensor=tensor)
