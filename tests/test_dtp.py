"""Delayed tensor parallelism: loss, gradients, streams and messages are the equations'.

model_cases.CASES has dtp:2 on every mesh, with its prefill and what a token sees.
"""

from unittest import mock

import jax
import numpy as np
import pytest
import reference
from helpers import FAST, make_mesh, random_parameters
from model_cases import (
    BATCH,
    assert_same,
    case_model,
    computed,
    forward,
    on_mesh,
    reductions,
    reference_of,
    run_unrolled,
)

from ladder_jax import model, schedule, sharding
from ladder_jax.planner.stack import shorten
from ladder_jax.residual import layers as residual
from ladder_jax.residual.dtp import mean_of_streams
from ladder_jax.residual.overlap import AsyncReduction

pytestmark = pytest.mark.usefixtures("fast_compiler")


def blocks(notation, layers):
    return [
        block for layer in schedule.parse(notation, layers).layers for block in layer
    ]


@pytest.mark.parametrize(
    "notation, layers, in_flight, lands, sent",
    [
        ("dtp:1", 2, [0, 1, 1, 1], "FTTT", "TTTF"),
        ("dtp:2", 3, [0, 1, 2, 2, 2, 1], "FFTTTT", "TTTTFF"),
        ("dtp:3", 4, [0, 1, 2, 3, 3, 3, 2, 1], "FFFTTTTT", "TTTTTFFF"),
        ("dtp:2", 2, [0, 1, 2, 1], "FFTT", "TTFF"),
    ],
)
def test_what_is_in_flight_lands_after_d_blocks(
    notation, layers, in_flight, lands, sent
):
    plan = blocks(notation, layers)
    assert [block.in_flight for block in plan] == in_flight
    assert "".join("FT"[block.lands] for block in plan) == lands
    assert "".join("FT"[block.reduce] for block in plan) == sent
    assert schedule.parse(notation, layers).local


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_plan_finds_a_short_stack_that_stands_for_a_deep_one(delay):
    stack = shorten(case_model(f"dtp:{delay}", layers=80), 4)
    assert stack.notation == f"dtp:{delay}" and sum(stack.counts) == 80
    assert len(stack.counts) < 10


def test_no_delay_is_the_standard_schedule():
    assert schedule.parse("dtp:0", 3) == schedule.parse("standard", 3)


@pytest.mark.parametrize(
    "name, layers, mesh, options",
    [
        ("dtp:1", 4, (1, 1, 8), {}),
        ("dtp:1", 2, (2, 2, 2), dict(unrolled=True)),
        (
            "dtp:3",
            5,
            (1, 2, 4),
            dict(remat="full", reduction="recursive-doubling"),
        ),
        pytest.param("dtp:3", 3, (1, 1, 8), {}, marks=pytest.mark.slow),
        pytest.param(
            "dtp:4", 6, (2, 1, 4), dict(remat="full", chunk=5), marks=pytest.mark.slow
        ),
        pytest.param(
            "dtp:2",
            4,
            (1, 1, 8),
            dict(remat="dots", reduction="direct"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_loss_and_gradients_are_the_equations(name, layers, mesh, options):
    """Scans of the middle layers, with their first and last blocks outside."""
    model_config = case_model(name, layers=layers, qk_norm=True)
    assert_same(
        computed(model_config, mesh, **options),
        reference_of(model_config, mesh[2]),
        1e-5,
        f"{name} on {mesh} with {options}",
    )


def test_one_shard_is_the_standard_model():
    shape = dict(layers=3, qkv_bias=True)
    assert_same(
        computed(case_model("dtp:2", **shape), (1, 1, 1)),
        reference_of(case_model("standard", **shape), 1),
        1e-5,
        "dtp:2 on one shard",
    )


def test_every_shard_has_its_own_final_stream():
    """`hidden` returns it; `logits` are equal on all shards after the mean."""
    model_config, ranks = case_model("dtp:2", layers=3), 4
    tree = random_parameters(model_config)
    row = {name: x[:1] for name, x in BATCH.items()}
    sequence = [row[name] for name in ("tokens", "positions", "segments")]

    def local(tree, *sequence):
        x_BTD, _ = model.hidden(tree, model_config, *sequence)
        return x_BTD[None]

    run = sharding.shard_map(
        local,
        make_mesh(1, 1, ranks),
        (sharding.parameter_specs(tree), *[sharding.REPLICATED] * 3),
        sharding.P("tensor"),
    )
    run = jax.jit(run, compiler_options=FAST)
    actual_RTD = jax.device_get(run(tree, *sequence))[:, 0]
    one = [x[0] for x in sequence]
    expected_RTD = reference.stream(tree, model_config, *one, ranks)
    np.testing.assert_allclose(actual_RTD, expected_RTD, atol=1e-5)
    assert len({float(x) for x in np.abs(actual_RTD).sum(axis=(1, 2))}) == ranks


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_the_last_blocks_send_nothing(delay, unrolled):
    """Forward: the embedding, N - d blocks and the mean of the streams.

    Backward: the transpose of each, and remat="reductions" repeats no communication.
    """
    model_config, mesh = case_model(f"dtp:{delay}", layers=4), (1, 1, 8)
    chosen = run_unrolled if unrolled else residual.run
    abstract = model.abstract(model_config)
    with mock.patch.object(residual, "run", chosen):
        ahead = reductions(forward(model_config, mesh), abstract, BATCH)
        both = reductions(
            on_mesh(model_config, mesh, remat="reductions"), abstract, BATCH
        )
    assert ahead == 8 - delay + 2
    assert both == 2 * ahead


def test_the_streams_mean_is_equal_on_all_shards():
    """JAX's own types prove it, without the barriers (see test_communication)."""
    model_config = case_model("dtp:2", layers=3)
    sequence = [BATCH[name] for name in ("tokens", "positions", "segments")]

    def local(tree, *sequence):
        x_BTD, _ = model.hidden(tree, model_config, *sequence)
        return mean_of_streams(x_BTD)

    specs = sharding.parameter_specs(model.abstract(model_config))
    run = jax.shard_map(
        local,
        mesh=make_mesh(2, 2, 2),
        in_specs=(specs, *[sharding.TOKENS] * 3),
        out_specs=sharding.TOKENS,
        check_vma=True,
    )
    free = mock.patch.object(AsyncReduction, "progress", lambda self, product: product)
    with mock.patch.object(residual, "run", run_unrolled), free:
        jax.eval_shape(run, model.abstract(model_config), *sequence)
