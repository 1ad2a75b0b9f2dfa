"""What a plan counts for an attention kernel that no compiler estimates."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ladder_jax import attention
from ladder_jax.config import Config, Model, Train
from ladder_jax.hardware import aot
from ladder_jax.planner import fused, report
from ladder_jax.planner.plan import Request


def test_the_stand_in_depends_on_all_three_arrays_and_has_no_scores():
    q = jax.ShapeDtypeStruct((2, 64, 4, 8), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 64, 2, 8), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def total(q, k, v, segments):
        out = attention.attend(q, k, v, segments, fused.stand_in)
        return out.astype(jnp.float32).sum()

    gradients = jax.eval_shape(jax.grad(total, (0, 1, 2)), q, kv, kv, segments)
    assert [one.shape for one in gradients] == [q.shape, kv.shape, kv.shape]
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), (q, kv, kv, segments))
    assert all(jnp.all(one != 0) for one in jax.grad(total, (0, 1, 2))(*ones))
    text = str(jax.make_jaxpr(total)(q, kv, kv, segments))
    assert "64,64" not in text and "dot_general" not in text


def test_its_time_is_that_of_the_causal_half_forward_and_backward():
    sizes = dict(dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn_dim=64)
    config = Config(model=Model(**sizes), train=Train(remat="none"))
    target = aot.parse("h100:1x8")
    request = Request("x", config, target, "train", 2, 1000, fused=True)
    rate = fused.EFFICIENCY * target.chip.peak_flops
    # Two products of T x T / 2 x (heads x head_dim), 2 FLOPs each, forward.
    forward = 3 * 2 * 4 * 64 * 1000**2 / 2
    assert report.fused_attention_s(request, 8) == pytest.approx(
        3.5 * forward / 8 / rate, rel=2e-3
    )
    again = dataclasses.replace(config, train=Train(remat="reductions"))
    assert report.fused_attention_s(request._replace(config=again), 8) == pytest.approx(
        4.5 * forward / 8 / rate, rel=2e-3
    )
    assert report.fused_attention_s(request._replace(fused=False), 8) == 0
