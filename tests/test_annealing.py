"""A delayed model with `freshness`: its blocks read a blend of the stale and the whole
stream. It equals the reference, on every mesh and in every form of the program.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import FAST, make_mesh, random_parameters
from jax import lax
from model_cases import (
    BATCH,
    BATCH_SPECS,
    READ,
    B,
    T,
    assert_same,
    case_model,
    computed,
    on_mesh,
    run_unrolled,
)

from ladder_jax import kv_cache, model, sharding
from ladder_jax.config import ConfigError
from ladder_jax.residual import layers as residual

pytestmark = pytest.mark.usefixtures("fast_compiler")


def annealed(model_config, mesh, unrolled=False, **options):
    """(parameters, batch, freshness) -> (mean loss, gradients), compiled once."""
    specs = sharding.parameter_specs(model.abstract(model_config))

    def local(parameters, batch, freshness):
        weight = lax.psum(batch["weights"].sum(), sharding.BATCH_AXES)
        loss, gradients = jax.value_and_grad(
            lambda m: (
                model.loss(m, model_config, batch, freshness=freshness, **options)
                / weight
            )
        )(parameters)
        return lax.psum(loss, sharding.BATCH_AXES), sharding.sum_gradients(
            gradients, specs
        )

    run = sharding.shard_map(
        local,
        make_mesh(*mesh),
        (specs, BATCH_SPECS, sharding.REPLICATED),
        (sharding.REPLICATED, specs),
    )
    chosen = run_unrolled if unrolled else residual.run
    with mock.patch.object(residual, "run", chosen):
        arguments = random_parameters(model_config), BATCH, np.float32(0)
        return jax.jit(run).lower(*arguments).compile(compiler_options=FAST)


@functools.cache
def reference_of(model_config):
    """(parameters, freshness) -> (loss, gradients) of the reference."""
    return jax.jit(
        jax.value_and_grad(
            lambda m, freshness: reference.loss(
                m, model_config, BATCH, freshness=freshness
            )
        ),
        compiler_options=FAST,
    )


CASES = [
    pytest.param("ladder", 3, (2, 2, 2), {}, marks=pytest.mark.slow),
    ("ladder", 3, (1, 1, 8), dict(remat="reductions", reduction="recursive-doubling")),
    pytest.param("ladder", 3, (1, 1, 1), {}, marks=pytest.mark.slow),
    pytest.param(
        "ladder:1,2", 3, (1, 2, 4), dict(unrolled=True), marks=pytest.mark.slow
    ),
    pytest.param(
        "ladder:1,2",
        3,
        (2, 2, 2),
        dict(remat="full", chunk=5),
        marks=pytest.mark.slow,
    ),
    ("delays:2,2,2,0,1,1,1,1", 4, (1, 2, 4), dict(reduction="direct", remat="dots")),
]


@pytest.mark.parametrize("name, layers, mesh, options", CASES)
def test_loss_and_gradients_are_the_references_at_every_freshness(
    name, layers, mesh, options
):
    """One compiled program; at 1 it is schedule standard, and at 0 the delayed one."""
    model_config = case_model(name, layers=layers)
    standard = dataclasses.replace(model_config, residual="standard")
    run = annealed(model_config, mesh, **options)
    parameters = random_parameters(model_config)
    for freshness in (0.0, 0.3, 1.0):
        actual = run(parameters, BATCH, np.float32(freshness))
        expected = reference_of(model_config)(parameters, freshness)
        assert_same(actual, expected, 1e-5, f"{name} at {freshness}")
        if freshness == 1:
            expected = reference_of(standard)(parameters, 0.0)
            assert_same(actual, expected, 1e-5, f"{name} at 1 against standard")


@pytest.mark.parametrize(
    "name, delays",
    [
        ("hybrid:last1", "0,0,1,1"),
        pytest.param("hybrid:0", "1,1,0,0", marks=pytest.mark.slow),
    ],
)
def test_a_hybrid_anneals_its_ladder_layers(name, delays):
    model_config = case_model(name, layers=2)
    same = dataclasses.replace(model_config, residual=f"delays:{delays}")
    run, parameters = annealed(model_config, (1, 2, 4)), random_parameters(model_config)
    for freshness in (0.0, 0.6):
        expected = reference_of(same)(parameters, freshness)
        actual = run(parameters, BATCH, np.float32(freshness))
        assert_same(actual, expected, 1e-5, f"{name} at {freshness}")


def test_freshness_0_is_the_overlapped_program_and_none_adds_no_operation():
    model_config = case_model("ladder:1,2")
    actual = annealed(model_config, (2, 2, 2))(
        random_parameters(model_config), BATCH, np.float32(0)
    )
    assert_same(actual, computed(model_config, (2, 2, 2)), 2e-6, "freshness 0")
    arguments = random_parameters(model_config), BATCH
    with_none, without = (
        str(jax.make_jaxpr(on_mesh(model_config, (2, 2, 2), **options))(*arguments))
        for options in (dict(freshness=None), {})
    )
    assert with_none == without


@pytest.mark.parametrize(
    "name, mesh", [("standard", (1, 1, 2)), ("parallel", (1, 1, 2))]
)
@pytest.mark.slow
def test_schedules_without_a_delay_ignore_it(name, mesh):
    model_config = case_model(name)
    actual = annealed(model_config, mesh)(
        random_parameters(model_config), BATCH, np.float32(0.5)
    )
    assert_same(actual, computed(model_config, mesh), 2e-6, name)


@pytest.mark.parametrize("unstacked", [False, True])
def test_a_prefill_that_reads_some_positions_is_the_annealed_model(unstacked):
    """Its logits are the reference's, and the caches are those of all positions."""
    model_config, freshness = case_model("ladder:1,2"), 0.4
    tree = random_parameters(model_config)
    positions_BT = np.tile(np.arange(T), (B, 1))
    logits_of = jax.jit(
        lambda tree, row: reference.logits(
            tree, model_config, row, jnp.arange(T), jnp.ones(T), 1, freshness
        ),
        compiler_options=FAST,
    )
    expected_BTV = np.stack([logits_of(tree, row) for row in BATCH["tokens"]])
    shape = B, model_config.kv_heads, T, model_config.head_dim
    zeros = np.zeros(shape, np.float32)
    empty = [kv_cache.KV(zeros, zeros)] * model_config.layers
    if unstacked:
        tree = model.unstack(tree)
    else:
        empty = jax.tree.map(lambda *xs: np.stack(xs), *empty)
    cache_spec = sharding.P(*[None] * (1 if unstacked else 2), "tensor")

    def local(tree, cache, share):
        outputs = []
        for read in (None, READ):
            x_BRD, filled = model.hidden(
                tree,
                model_config,
                BATCH["tokens"],
                positions_BT,
                cache=cache,
                read_BR=read,
                freshness=share,
            )
            outputs.append((model.logits(tree, model_config, x_BRD), filled))
        return outputs

    specs = sharding.parameter_specs(tree)
    run = sharding.shard_map(
        local,
        make_mesh(1, 1, 2),
        (specs, cache_spec, sharding.REPLICATED),
        [(sharding.P(None, None, "tensor"), cache_spec)] * 2,
    )
    (whole_BTV, whole), (some_BRV, some) = jax.jit(run, compiler_options=FAST)(
        tree, empty, np.float32(freshness)
    )
    np.testing.assert_allclose(whole_BTV, expected_BTV, atol=1e-5)
    read_BRV = np.take_along_axis(expected_BTV, READ[..., None], axis=1)
    np.testing.assert_allclose(some_BRV, read_BRV, atol=1e-5)
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["desync:2", "dtp:1", "upper-bound"])
def test_a_schedule_of_own_streams_refuses_in_one_line(name):
    model_config = case_model(name, layers=2)
    with pytest.raises(ConfigError) as error:
        model.hidden(None, model_config, None, None, freshness=0.5)
    assert f"model.residual='{name}' cannot be annealed" in str(error.value)
    assert "a residual stream of its own" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), 2])
def test_a_freshness_out_of_its_range_is_one_line(value):
    with pytest.raises(ConfigError, match=f"freshness={value} is not accepted"):
        model.hidden(None, case_model("ladder"), None, None, freshness=value)
