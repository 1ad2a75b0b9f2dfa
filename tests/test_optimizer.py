"""Learning rates, what decays, and the optimizer's state."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ladder_jax import config, model, sharding
from ladder_jax.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize(
    "fields, steps, expected",
    [
        (
            dict(lr_schedule="cosine", warmup_steps=10),
            110,
            {0: 0.1, 4: 0.5, 9: 1, 10: 1, 60: 0.55, 110: 0.1},
        ),
        (
            dict(lr_schedule="cosine", warmup_steps=0, final_lr_fraction=0.0),
            100,
            {0: 1, 50: 0.5, 100: 0},
        ),
        (
            dict(lr_schedule="cosine", warmup_steps=10, decay_steps=40),
            110,
            {10: 1, 30: 0.55, 50: 0.1, 109: 0.1},
        ),
        # The warm-up is longer than the run.
        (dict(lr_schedule="cosine", warmup_steps=200), 100, {0: 0.01, 99: 1}),
        (
            dict(lr_schedule="wsd", warmup_steps=10),
            100,
            {0: 0.1, 10: 1, 79: 1, 80: 1, 90: 0.55, 99: 0.145, 100: 0.1},
        ),
        (
            dict(lr_schedule="wsd", warmup_steps=10, decay_steps=50),
            100,
            {49: 1, 50: 1, 75: 0.55, 100: 0.1},
        ),
        (
            dict(lr_schedule="wsd", warmup_steps=90, decay_steps=50),
            100,
            {89: 1, 90: 1, 95: 0.55, 100: 0.1},
        ),
        # The run is too short to decay.
        (dict(lr_schedule="wsd", warmup_steps=1), 4, {0: 1, 1: 1, 3: 1}),
        (dict(lr_schedule="constant", warmup_steps=4), 100, {0: 0.25, 3: 1, 99: 1}),
        (
            dict(warmup_steps=10),
            3_000_000_000,
            {0: 0.1, 9: 1, 2**30: 0.55, 2**31 - 1: 0.1},
        ),
        (
            dict(lr_schedule="wsd", warmup_steps=10, decay_steps=4_000_000_000),
            3_000_000_000,
            {0: 0.1, 9: 1, 2**30: 0.55},
        ),
        (
            dict(lr_schedule="constant", warmup_steps=0, decay_steps=50),
            100,
            {0: 1, 99: 1},
        ),
    ],
)
def test_learning_rate(fields, steps, expected):
    rate = learning_rate(config.Optimizer(learning_rate=2.0, **fields), steps)
    assert {step: float(rate(step)) / 2 for step in expected} == pytest.approx(
        expected, abs=1e-6
    )
    assert float(rate(0)) > 0 or fields.get("final_lr_fraction") == 0


def test_only_matrices_decay():
    cfg = dataclasses.replace(
        tiny.make(Path("none")).model, qk_norm=True, qkv_bias=True
    )
    ones = lambda x: jnp.ones(x.shape, x.dtype)
    parameters = jax.tree.map(ones, model.abstract(cfg))
    optimizer = make_optimizer(
        config.Optimizer(
            learning_rate=0.5, weight_decay=0.1, warmup_steps=0, lr_schedule="constant"
        ),
        10,
    )
    updates = jax.jit(
        lambda p: optimizer.update(
            jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p
        )[0]
    )(parameters)
    names = sharding.parameter_names(parameters)
    seen = {}
    jax.tree.map(
        lambda name, update: seen.setdefault(name, set()).update(
            np.unique(update).tolist()
        ),
        names,
        updates,
    )
    assert {name for name, values in seen.items() if values == {0.0}} == {
        "norm",
        "attention.norm",
        "mlp.norm",
        "attention.q_norm",
        "attention.k_norm",
        "attention.bq",
        "attention.bk",
        "attention.bv",
    }
    assert {round(value, 6) for values in seen.values() for value in values} == {
        0.0,
        -0.05,
    }


def test_clipping_or_not_is_the_same_state():
    """So that a run can go on with another `clip_norm`."""
    parameters = {"embedding": jnp.ones((2, 2))}
    states = [
        make_optimizer(config.Optimizer(clip_norm=norm), 10).init(parameters)
        for norm in (None, 1.0)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
