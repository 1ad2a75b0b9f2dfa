"""A stream divided by tokens: the same loss, gradients and logits as the whole one."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAST, make_mesh, random_parameters
from jaxprs import equations
from model_cases import (
    BATCH,
    BATCH_SPECS,
    CASES,
    OWN_STREAMS,
    READ,
    B,
    T,
    assert_same,
    case_model,
    computed,
    on_mesh,
    reference_of,
)

from ladder_jax import kv_cache, model, sharding
from ladder_jax.config import Config, ConfigError, Distill, Mesh, Model, Train

pytestmark = pytest.mark.usefixtures("fast_compiler")

SHARED = [name for name in CASES if not name.startswith(OWN_STREAMS)]
MESHES = [(1, 1, 8), (2, 2, 2), (1, 2, 4)]  # data, fsdp, tensor


@pytest.mark.parametrize(
    "name, mesh",
    [
        pytest.param(
            name,
            mesh,
            id=f"{name}-{'x'.join(map(str, mesh))}",
            marks=[] if (i + j) % 3 == 0 else pytest.mark.slow,
        )
        for i, name in enumerate(SHARED)
        for j, mesh in enumerate(MESHES)
    ],
)
def test_loss_and_every_gradient_are_the_references(name, mesh):
    """Rows hold several documents."""
    model_config = case_model(name)
    assert_same(
        computed(model_config, mesh, sequence_parallel=True),
        reference_of(model_config, 1),
        1e-5,
        f"{name} by tokens on data, fsdp, tensor = {mesh}",
    )


@pytest.mark.parametrize(
    "name, layers, options",
    [
        ("ladder:1,2", 3, dict(remat="dots", chunk=5)),
        ("ladder", 3, dict(remat="reductions", unrolled=True)),
        ("delays:2,2,2,0,1,1,1,1", 4, dict(remat="full")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("delays:1,1,1,1,2,2", 3, dict(remat="full")),
                ("delays:2,2,2,2,2,2,1,1", 4, dict()),
                ("delays:1,1,1,1,2,2,3,3", 4, dict(unrolled=True)),
                ("hybrid:0-1", 4, dict()),
            )
        ),
    ],
    ids=str,
)
def test_remat_unrolled_layers_and_changing_delays_change_nothing(
    name, layers, options
):
    model_config = case_model(name, layers=layers)
    assert_same(
        computed(model_config, (1, 2, 4), sequence_parallel=True, **options),
        reference_of(model_config, 1),
        1e-5,
        f"{name} by tokens with {options}",
    )


def test_one_tensor_shard_has_all_tokens():
    """Then the option changes nothing, not even the program."""
    model_config = case_model("ladder", layers=2)
    texts = [
        jax.jit(on_mesh(model_config, (4, 2, 1), **options))
        .lower(model.abstract(model_config), BATCH)
        .as_text()
        for options in ({}, dict(sequence_parallel=True))
    ]
    assert texts[0] == texts[1]


def sent(model_config, **options):
    """How often the forward pass sends a stream, by JAX's collective and shape."""
    specs = sharding.parameter_specs(model.abstract(model_config))
    inputs = [BATCH[name] for name in ("tokens", "positions", "segments")]

    def local(parameters, *inputs):
        return model.hidden(parameters, model_config, *inputs, **options)[0]

    run = sharding.shard_map(
        local,
        make_mesh(1, 1, 8),
        (specs, *[sharding.TOKENS] * 3),
        sharding.P(sharding.BATCH_AXES, None, None),
    )
    count = collections.Counter()
    jaxpr = jax.make_jaxpr(run)(model.abstract(model_config), *inputs).jaxpr
    for equation, times in equations(jaxpr):
        name = equation.primitive.name
        if name in ("psum", "psum_invariant", "reduce_scatter", "all_gather"):
            count[name, equation.outvars[0].aval.shape] += times
    return dict(count)


def test_what_is_carried_from_block_to_block_is_a_shards_share():
    """Beside two of each in a layer: scatters of the embedding's partial and of the
    last block's; gathers of the first block's input and of the result. The first
    iteration of a scan scatters zeros, and the last gathers what no block reads."""
    model_config = case_model("ladder", layers=3)
    D, M = model_config.dim, B * T // 8
    assert sent(model_config) == {("psum", (B, T, D)): 2 * 3 + 2}
    assert sent(model_config, sequence_parallel=True) == {
        ("reduce_scatter", (M, D)): 2 * 3 + 2,
        ("all_gather", (B * T, D)): 2 * 3 + 2,
    }


def test_the_backward_pass_keeps_shares_of_the_stream():
    """A layer keeps one whole [B, T, D] array, the input of its first block, and four
    shares: the total, a sum, and two reduced partials. Without shares it keeps three
    whole arrays."""

    def kept(**options):
        model_config = case_model("ladder", layers=3, dim=64)
        run = on_mesh(model_config, (1, 1, 8), remat="reductions", **options)
        jaxpr = jax.make_jaxpr(run)(model.abstract(model_config), BATCH).jaxpr
        scan = next(
            equation
            for equation, _ in equations(jaxpr)
            if equation.primitive.name == "scan"
        )
        stacked = scan.outvars[scan.params["num_carry"] :]
        shapes = [value.aval.shape for value in stacked]
        # A scan's pattern of one layer has a dimension of 1.
        return collections.Counter(tuple(d for d in x if d != 1) for x in shapes)

    whole, share = (3, B, T, 64), (3, B * T // 8, 64)
    assert kept()[whole] == 3
    divided = kept(sequence_parallel=True)
    assert (divided[whole], divided[share]) == (1, 4)


@pytest.mark.parametrize("name, unstacked", [("ladder", True), ("standard", False)])
def test_a_prefill_gives_the_same_logits_and_caches(name, unstacked):
    """Of all positions, of which the caller reads two a row."""
    model_config = case_model(name)
    tree = random_parameters(model_config)
    tree = model.unstack(tree) if unstacked else tree
    shape = B, model_config.kv_heads, T, model_config.head_dim
    stack = [] if unstacked else [model_config.layers]
    zeros = np.zeros((*stack, *shape), np.float32)
    empty = kv_cache.KV(zeros, zeros)
    if unstacked:
        empty = [empty] * model_config.layers
    cache_spec = sharding.P(*[None] * (1 + len(stack)), "tensor")

    def results(**options):
        def local(tree, empty):
            positions_BT = jnp.tile(jnp.arange(T), (B, 1))
            x_BRD, filled = model.hidden(
                tree,
                model_config,
                BATCH["tokens"],
                positions_BT,
                cache=empty,
                read_BR=READ,
                **options,
            )
            return model.logits(tree, model_config, x_BRD), filled

        logits_spec = sharding.P(None, None, "tensor")
        run = sharding.shard_map(
            local,
            make_mesh(tensor=4),
            (sharding.parameter_specs(tree), cache_spec),
            (logits_spec, cache_spec),
        )
        return jax.jit(run, compiler_options=FAST)(tree, empty)

    for ours, theirs in zip(
        *map(jax.tree.leaves, (results(sequence_parallel=True), results()))
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model=Model(residual="desync:2")), "model.residual='desync:2'"),
        (dict(model=Model(residual="dtp:1")), "model.residual='dtp:1'"),
        (dict(distill=Distill(anneal_steps=5)), "distill.anneal_steps=5"),
    ],
)
def test_what_cannot_be_divided_by_tokens_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        Config(mesh=Mesh(sequence_parallel=True), train=Train(seq_len=64), **fields)
    assert "\n" not in str(error.value)


def test_another_reduction_is_refused():
    with pytest.raises(ConfigError, match="mesh.reduction='ring' is not accepted"):
        Mesh(sequence_parallel=True, reduction="ring")


@pytest.mark.parametrize(
    "options, rows, message",
    [
        (dict(), 3, "3 x 1 tokens on a data shard: mesh.tensor=8 must divide them"),
        (dict(freshness=0.5), 8, "with an annealed delay"),
    ],
)
def test_a_program_that_cannot_be_is_refused_while_it_is_traced(options, rows, message):
    model_config = case_model("ladder", layers=2)
    batch = {name: x[:rows, :1] for name, x in BATCH.items()}
    run = on_mesh(model_config, (1, 1, 8), sequence_parallel=True, **options)
    assert set(batch) == set(BATCH_SPECS)
    with pytest.raises(ConfigError, match=message):
        jax.make_jaxpr(run)(model.abstract(model_config), batch)
