"""What a model sends: its reductions are counted, and their operands' dtypes and the
streams that they leave are checked, in the traced program.
"""

import collections
import contextlib
from unittest import mock

import jax
import pytest
from helpers import FAST, make_mesh
from jaxprs import equations
from model_cases import (
    BATCH,
    CASES,
    case_model,
    forward,
    on_mesh,
    reductions,
    run_unrolled,
    scanned,
)

from ladder_jax import model, schedule, sharding
from ladder_jax.residual import layers as residual
from ladder_jax.residual.overlap import AsyncReduction


@pytest.mark.parametrize(
    "name, unrolled, blocks",
    [
        ("standard", False, 8),
        ("ladder", False, 9),
        ("ladder", True, 8),
        ("ladder:1,2", False, 9),
        ("hybrid:last2", False, 8),
        ("parallel", False, 4),
        ("desync:2", False, 4),
        ("desync:4", False, 2),
        ("desync:3", True, 3),
        ("upper-bound", False, 0),
    ],
)
def test_the_number_of_reductions_is_the_schedules(name, unrolled, blocks):
    """The forward pass of 4 layers has one reduction for the embedding's partial and
    one for every block that reduces. The backward pass has one for every read of the
    stream. A scan with delays has one more in each direction, which reduces zeros:
    forward in its first repetition, backward in its last one.
    """
    model_config, mesh = case_model(name, layers=4), (1, 1, 8)
    plan = schedule.parse(name, 4)
    delayed = any(block.delay for layer in plan.layers for block in layer)
    back = (
        1
        + (blocks if plan.local else sum(map(len, plan.layers)))
        + (delayed and not unrolled)
    )
    with mock.patch.object(residual, "run", run_unrolled if unrolled else scanned):
        count = reductions(
            forward(model_config, mesh), model.abstract(model_config), BATCH
        )
        both = reductions(
            on_mesh(model_config, mesh, remat="reductions"),
            model.abstract(model_config),
            BATCH,
        )
    assert count == 1 + blocks, f"{name}: {count} reductions forward, not 1 + {blocks}"
    assert both == count + back, (
        f"{name}, with remat='reductions': {both - count} reductions backward, "
        f"not {back}"
    )


def known_failure(reason):
    return pytest.mark.xfail(strict=True, reason=f"AsyncReduction.progress: {reason}")


@pytest.mark.parametrize(
    "name, remat",
    [
        ("standard", "none"),
        ("standard", "reductions"),
        ("ladder", "none"),
        pytest.param(
            "ladder",
            "reductions",
            marks=known_failure(
                "products come out of a barrier with the state; XLA drops the results "
                "that are not used, JAX does not"
            ),
        ),
    ],
)
def test_a_reduction_of_three_rounds_sends_three_times_what_psum_does(name, remat):
    """Recursive doubling over 8 shards. remat="reductions" repeats no communication."""
    model_config = case_model(name, layers=4)
    counts = {
        reduction: reductions(
            on_mesh(model_config, (1, 1, 8), remat=remat, reduction=reduction),
            model.abstract(model_config),
            BATCH,
        )
        for reduction in ("psum", "recursive-doubling")
    }
    assert counts["recursive-doubling"] == 3 * counts["psum"], counts


def test_the_upper_bound_compiles_to_no_reduction_in_the_layers():
    counts = {}
    for name in ("upper-bound", "standard"):
        model_config = case_model(name, layers=2)
        specs = sharding.parameter_specs(model.abstract(model_config))
        sequence = [BATCH[name] for name in ("tokens", "positions", "segments")]

        def local(m, *sequence, model_config=model_config):
            return model.hidden(m, model_config, *sequence)[0]

        run = sharding.shard_map(
            local,
            make_mesh(1, 1, 8),
            (specs, *[sharding.TOKENS] * 3),
            sharding.REPLICATED,
        )
        text = (
            jax.jit(run, compiler_options=FAST)
            .lower(model.abstract(model_config), *sequence)
            .compile()
            .as_text()
        )
        counts[name] = text.count(" all-reduce(") + text.count(" all-reduce-start(")
    assert counts["upper-bound"] == 1, (
        f"the embedding's alone should be left; there are {counts['upper-bound']}"
    )
    assert counts["standard"] >= 3, (
        f"the same count finds {counts['standard']} in standard: it does not look right"
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_all_matrix_products_are_of_bfloat16_summed_in_float32(remat):
    model_config = case_model("ladder", dtype="bfloat16")
    program = jax.make_jaxpr(on_mesh(model_config, (2, 2, 2), remat=remat, chunk=5))(
        model.abstract(model_config), BATCH
    )
    kinds = collections.Counter(
        tuple(str(var.aval.dtype) for var in (*eqn.invars, *eqn.outvars))
        for eqn, _ in equations(program.jaxpr)
        if eqn.primitive.name == "dot_general"
    )
    assert set(kinds) == {("bfloat16", "bfloat16", "float32")}, kinds
    assert kinds.total() >= 3 * 10


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name not in ("desync:3", "dtp:2")] + ["upper-bound"],
)
def test_no_partial_is_left_in_the_final_stream(name):
    """JAX's types of the unrolled forward pass prove that shards' streams are equal.

    The pass has no barriers: they change no value, but each result of a barrier gets
    the types of all its operands.
    """
    model_config = case_model(name, layers=2 if name == "upper-bound" else None)
    sequence = [BATCH[name] for name in ("tokens", "positions", "segments")]
    run = jax.shard_map(
        lambda m, *sequence: model.hidden(m, model_config, *sequence)[0],
        mesh=make_mesh(2, 2, 2),
        in_specs=(
            sharding.parameter_specs(model.abstract(model_config)),
            *[sharding.TOKENS] * 3,
        ),
        out_specs=sharding.TOKENS,
        check_vma=True,
    )
    refused = (
        pytest.raises(ValueError, match="tensor")
        if name == "upper-bound"
        else contextlib.nullcontext()
    )
    free = mock.patch.object(AsyncReduction, "progress", lambda self, product: product)
    with mock.patch.object(residual, "run", run_unrolled), free, refused:
        jax.eval_shape(run, model.abstract(model_config), *sequence)
