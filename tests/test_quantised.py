"""Int8 weights: bounds, products, meshes, schedules, the engine and the memory plan."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladder_jax import config, decode_weights, generate, loading, matmul, sharding
from ladder_jax.config import ConfigError
from ladder_jax.matmul import einsum
from ladder_jax.quantised import (
    Quantised,
    quantise,
    quantise_on_mesh,
    quantise_parameters,
    take_rows,
)
from ladder_jax.serve import memory
from ladder_jax.serve.design import design


def dequantised(matrix):
    return np.asarray(matrix.int8, np.float64) * np.asarray(matrix.scale, np.float64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(1e-30, 1e30),
    summed=st.sampled_from([(0,), (1,), (0, 1), (2,)]),
    zeros=st.booleans(),
)
def test_no_element_changes_by_more_than_half_a_step(seed, size, summed, zeros):
    random = np.random.default_rng(seed)
    x = (size * random.standard_cauchy((3, 4, 5))).clip(-1e37, 1e37).astype(np.float32)
    if zeros:
        x[:, :, 1] = 0
    made = quantise(jnp.asarray(x), summed)
    assert made.int8.dtype == jnp.int8 and made.scale.dtype == jnp.float32
    assert made.shape == x.shape
    assert made.scale.shape == tuple(
        1 if i in summed else n for i, n in enumerate(x.shape)
    )
    error = np.abs(dequantised(made) - x)
    assert (error <= 0.5001 * np.asarray(made.scale, np.float64)).all()
    largest = np.abs(x).max(axis=summed, keepdims=True)
    reached = np.abs(np.asarray(made.int8, np.int32)).max(axis=summed, keepdims=True)
    assert (reached == np.where(largest > 0, 127, 0)).all()


@pytest.mark.parametrize(
    "spec", ["btd,df->btf", "btd,dnh->btnh", "btd,vd->btv", "bte,ed->btd"]
)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("slice_elements", [2**20, 40, 1])
def test_a_product_is_that_of_the_dequantised_matrix(
    spec, rows, slice_elements, monkeypatch
):
    """Slices of a prime dimension overlap; slices of one element are rows."""
    monkeypatch.setattr(matmul, "SLICE_ELEMENTS", slice_elements)
    left, right, out = spec.replace("->", ",").split(",")
    sizes = dict(b=1, t=rows, d=23, e=23, f=12, n=3, h=4, v=29)
    random = np.random.default_rng(0)
    a = random.normal(size=[sizes[dim] for dim in left]).astype(np.float32)
    weight = random.normal(size=[sizes[dim] for dim in right])
    summed = [i for i, dim in enumerate(right) if dim not in out]
    matrix = quantise(jnp.asarray(weight), summed)
    expected = np.einsum(spec, np.float64(a), dequantised(matrix))
    actual = jax.jit(lambda a, b: einsum(spec, a, b))(a, matrix)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    in_bfloat16 = jax.jit(lambda a, b: einsum(spec, a, b, jnp.float32))(
        jnp.asarray(a, jnp.bfloat16), matrix
    )
    assert in_bfloat16.dtype == jnp.float32
    np.testing.assert_allclose(in_bfloat16, expected, rtol=0.03, atol=0.1)


def test_a_cpu_never_holds_a_whole_matrix_in_another_dtype():
    """4 MiB of a cast matrix of 64 MiB exist at a time."""
    a = jax.ShapeDtypeStruct((1, 4, 1024), jnp.float32)
    matrix = Quantised(
        jax.ShapeDtypeStruct((1024, 16384), jnp.int8),
        jax.ShapeDtypeStruct((1, 16384), jnp.float32),
    )
    program = jax.jit(functools.partial(einsum, "btd,df->btf")).lower(a, matrix)
    temporary = program.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 6 * 2**20, f"{temporary / 2**20:.0f} MiB"


def test_other_platforms_cast_the_matrix_in_the_product():
    """They fuse the cast; there is no loop."""
    a = jax.ShapeDtypeStruct((1, 4, 64), jnp.bfloat16)
    matrix = Quantised(
        jax.ShapeDtypeStruct((64, 32), jnp.int8),
        jax.ShapeDtypeStruct((1, 32), jnp.float32),
    )
    traced = jax.jit(functools.partial(einsum, "btd,df->btf")).trace(a, matrix)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "while" not in text and "xi8>) -> tensor<64x32xbf16>" in text


def test_rows_and_reshape():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 5)), jnp.float32)
    matrix = quantise(weight, (0, 1))
    flat = matrix.reshape(-1, 5)
    assert flat.shape == (12, 5) and flat.scale.shape == (1, 5)
    assert matrix[...] is matrix
    with pytest.raises(TypeError, match="take_rows"):
        matrix[0]
    table = quantise(weight[:, 0], (1,))
    index = jnp.array([[3, 0], [5, 5]])
    rows = np.float32(dequantised(table))[np.asarray(index)]
    np.testing.assert_allclose(take_rows(table, index), rows, rtol=1e-6)
    np.testing.assert_array_equal(take_rows(weight, index), weight[index])


def test_rows_of_bfloat16_and_their_derivative_are_those_of_an_index():
    random = np.random.default_rng(1)
    table = jnp.asarray(random.normal(size=(7, 4)), jnp.bfloat16)
    odd = jnp.asarray([np.nan, np.inf, -0.0, 1e-40], jnp.bfloat16)
    table = table.at[0].set(odd)
    index = jnp.array([[0, 3], [3, 6]])
    rows = jax.jit(take_rows)(table, index)
    assert rows.dtype == jnp.bfloat16
    bits = [np.asarray(x).view(np.uint16) for x in (rows, table[index])]
    np.testing.assert_array_equal(*bits)

    def total(take, table):
        weights = jnp.arange(16.0).reshape(2, 2, 4)
        return (take(table[1:], index.clip(0, 5)).astype(jnp.float32) * weights).sum()

    by_rows = jax.jit(jax.grad(functools.partial(total, take_rows)))(table)
    by_index = jax.grad(functools.partial(total, lambda x, i: x[i]))(table)
    np.testing.assert_array_equal(np.float32(by_rows), np.float32(by_index))
    assert np.abs(np.float32(by_rows)).sum() > 0


# ---------------------------------------------------------------- models

TIED = dict(tie_embeddings=True, **helpers.BIASES)


def forward_logits(parameters, model_config, mesh):
    tokens = np.tile(np.arange(12, dtype=np.int32) % model_config.vocab_size, (2, 1))
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    cache = generate.empty_cache(model_config, mesh, 2, 16)
    forward = generate.make_forward(model_config, mesh)
    return np.asarray(forward(parameters, tokens, positions, cache)[0])


def dequantised_model(quantised):
    return jax.tree.map(
        lambda x: x.int8 * x.scale if isinstance(x, Quantised) else x,
        quantised,
        is_leaf=lambda x: isinstance(x, Quantised),
    )


@pytest.fixture(autouse=True, scope="module")
def fast():
    with helpers.fast_compilation():
        yield


@pytest.mark.parametrize(
    "residual, fields, sizes",
    [
        ("standard", dict(), dict(tensor=4)),
        ("ladder", TIED, dict(data=2, tensor=2)),
        ("ladder", dict(), dict(fsdp=2)),
        ("parallel", dict(), dict(tensor=2)),
    ],
)
def test_logits_are_those_of_the_dequantised_model_on_a_mesh(residual, fields, sizes):
    model_config = helpers.small_model(residual, **fields)
    one, mesh = helpers.make_mesh(), helpers.make_mesh(**sizes)
    plain = helpers.random_parameters(model_config, one)
    quantised = quantise_on_mesh(plain, one)
    assert quantise_on_mesh(quantised, one) is quantised
    expected = forward_logits(dequantised_model(quantised), model_config, one)
    specs = sharding.parameter_specs(quantised)
    placed = jax.device_put(quantised, sharding.named_shardings(mesh, specs))
    actual = forward_logits(placed, model_config, mesh)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    # and near those of full precision
    full = forward_logits(plain, model_config, one)
    error = np.square(expected - full).mean() / np.square(full).mean()
    assert 0 < error < 0.01


@pytest.mark.parametrize("residual", ["desync:2", "dtp:1"])
def test_schedules_with_a_stream_of_each_shard_decode_as_the_dequantised_model(
    residual,
):
    model_config = helpers.small_model(residual)
    mesh = helpers.make_mesh(tensor=2)
    plain = helpers.random_parameters(model_config, mesh)
    quantised = quantise_on_mesh(plain, mesh)
    specs = sharding.named_shardings(mesh, sharding.parameter_specs(plain))
    exact = jax.device_put(dequantised_model(quantised), specs)
    np.testing.assert_allclose(
        forward_logits(quantised, model_config, mesh),
        forward_logits(exact, model_config, mesh),
        rtol=1e-3,
        atol=1e-3,
    )


def test_scales_are_sharded_as_the_outputs_of_their_matrix():
    model_config = helpers.small_model()
    mesh = helpers.make_mesh(tensor=4)
    made = quantise_on_mesh(helpers.initial_parameters(model_config, mesh), mesh)
    layer, tensor = made.layers, sharding.TENSOR
    assert layer.attention.wq[...].scale.sharding.spec[2] == tensor
    assert tensor not in layer.attention.wo[...].scale.sharding.spec
    assert tensor not in layer.mlp.down[...].scale.sharding.spec
    assert layer.mlp.up[...].scale.sharding.spec[2] == tensor
    assert made.embedding[...].scale.sharding.spec[0] == tensor
    assert made.unembedding[...].scale.sharding.spec[1] == tensor
    assert made.norm[...].dtype == jnp.float32
    on_one = quantise_on_mesh(
        helpers.initial_parameters(model_config, helpers.make_mesh()),
        helpers.make_mesh(),
    )
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(on_one), strict=True):
        assert np.array_equal(x, y)


# ---------------------------------------------------------------- the engine


def tokens_of(engine, count=4):
    requests = [
        engine.submit(prompt, max_tokens=6)
        for prompt, _ in helpers.make_requests(count)
    ]
    while engine.step():
        pass
    return [request.tokens for request in requests]


def test_an_engine_with_int8_weights_decodes_as_one_request_alone_on_any_mesh():
    expected = None
    for tensor, unroll in ((1, True), (1, False), (4, True)):
        engine = helpers.make_engine(
            tensor=tensor, unroll_layers=unroll, weights_dtype="int8"
        )
        tokens = tokens_of(engine)
        expected = expected or tokens
        assert tokens == expected
    model_config, mesh = helpers.ENGINE_MODEL, helpers.make_mesh()
    parameters = helpers.initial_parameters(model_config, mesh)
    alone = [
        list(
            generate.generate(
                quantise_on_mesh(parameters, mesh),
                model_config,
                mesh,
                prompt,
                max_tokens=6,
            )
        )
        for prompt, _ in helpers.make_requests(4)
    ]
    assert alone == expected


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("fields", [dict(), TIED])
def test_the_plan_is_what_the_weights_take(unroll, tensor, fields):
    mesh = helpers.make_mesh(tensor=tensor)
    small = dataclasses.replace(helpers.ENGINE_MODEL, dtype="bfloat16", **fields)
    options = dataclasses.replace(
        helpers.ENGINE_OPTIONS, unroll_layers=unroll, weights_dtype="int8"
    )
    made = design(small, mesh, options)
    plan = memory.plan(made)
    given = jax.jit(
        lambda x: x,
        out_shardings=sharding.named_shardings(
            mesh, sharding.parameter_specs(memory.loaded_model(made))
        ),
    )(
        jax.tree.map(
            lambda x, like: x.astype(like.dtype),
            helpers.initial_parameters(small, mesh),
            memory.loaded_model(made),
        )
    )

    def taken(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert plan.loaded == taken(given)
    weights = decode_weights.prepare_weights(made.spec, given, consume=True)
    assert plan.weights == taken(weights) < 0.75 * plan.loaded
    assert plan.loading > plan.loaded
    shapes = decode_weights.abstract_weights(made.spec)
    assert jax.tree.structure(shapes) == jax.tree.structure(weights)
    for x, y in zip(jax.tree.leaves(shapes), jax.tree.leaves(weights)):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    # What became int8 is gone; norms were not copied.
    kept = {id(x) for x in jax.tree.leaves(weights)}
    for x in jax.tree.leaves(given):
        assert x.is_deleted() or id(x) in kept


def test_int8_is_an_advice_where_it_makes_the_plan_fit():
    mesh = helpers.make_mesh(tensor=4)
    large = config.Model(
        vocab_size=128256,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        max_length=8192,
        dtype="bfloat16",
    )
    options = config.Decode(slots=32, kv_dtype="bfloat16")
    made = design(large, mesh, options)
    plan = memory.plan(made)
    limit = plan.serving - plan.weights // 3
    assert plan.loading < limit
    assert "choose decode.weights_dtype=int8" in memory.advice(plan, made, limit)
    smaller = design(large, mesh, dataclasses.replace(options, weights_dtype="int8"))
    assert memory.plan(smaller).total <= limit


# ---------------------------------------------------------------- loading


def test_a_loaded_model_with_int8_weights_generates_and_is_measured(tmp_path):
    run = helpers.write_engine_checkpoint(tmp_path)
    plain, small = loading.load(run), loading.load(run, weights_dtype="int8")
    bytes_of = lambda loaded: sum(x.nbytes for x in jax.tree.leaves(loaded.model))
    assert bytes_of(small) < 0.4 * bytes_of(plain)
    text = "".join(small.generate("abc", max_tokens=4))
    assert text == "".join(small.generate("abc", max_tokens=4, temperature=0.0))
    logits = [np.asarray(each.logits("some text")[0]) for each in (plain, small)]
    error = np.square(logits[1] - logits[0]).mean() / np.square(logits[0]).mean()
    assert 0 < error < 0.01
    with pytest.raises(ConfigError, match="weights_dtype='int4' is not accepted"):
        loading.load(run, weights_dtype="int4")


def test_the_trees_of_shapes_and_arrays_agree():
    model_config = helpers.small_model(**TIED)
    given = helpers.random_parameters(model_config)
    shapes = jax.eval_shape(quantise_parameters, given)
    assert jax.tree.structure(shapes) == jax.tree.structure(quantise_parameters(given))
    with pytest.raises(ConfigError, match=r"decode.weights_dtype='int4'"):
        config.Decode(weights_dtype="int4")
