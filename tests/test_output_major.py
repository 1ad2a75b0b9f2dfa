"""Weights with their outputs first: products, specs, and who has them."""

import dataclasses
import functools
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import decode_weights, sharding
from ladder_jax.matmul import MOST_COLUMNS, einsum
from ladder_jax.output_major import OutputMajor, output_major
from ladder_jax.serve.design import design

SIZES = dict(b=2, d=24, e=24, f=13, n=3, h=5, v=29)
SPECS = ["btd,df->btf", "btd,dnh->btnh", "bte,ed->btd", "btd,dv->btv"]


def operands(spec, rows, dtype=np.float32):
    """`a`, with so many rows in each half of the batch, and the weight."""
    random = np.random.default_rng(0)
    sizes = SIZES | dict(t=rows)
    a, b, _ = spec.replace("->", ",").split(",")
    shapes = ([sizes[dim] for dim in dims] for dims in (a, b))
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def turned(spec, weight):
    right, out = spec.split(",")[1].split("->")
    return output_major(weight, right, "".join(dim for dim in right if dim not in out))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [1, 5, MOST_COLUMNS // 2, MOST_COLUMNS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_and_its_derivatives_are_those_of_the_plain_weight(spec, rows, dtype):
    a, weight = operands(spec, rows, dtype)

    def product(a, weight):
        return einsum(spec, a, weight, jnp.float32)

    @jax.jit
    def both(a, weight):
        out, back = jax.vjp(product, a, weight)
        return out, *back(jnp.cos(out))

    expected = both(a, weight)
    actual = both(a, turned(spec, weight))
    assert actual[2].shape == weight.shape
    order = turned(spec, expected[2]).output_major
    tolerance = dict(float32=1e-5, bfloat16=0.02)[dtype]
    for x, y in zip(actual[:2] + (actual[2].output_major,), expected[:2] + (order,)):
        assert x.dtype == y.dtype
        x, y = np.float32(x), np.float32(y)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("spec", [*SPECS, "btd,vd->btv"])
@pytest.mark.parametrize("rows", [2, MOST_COLUMNS, 2 * MOST_COLUMNS])
def test_a_cpu_computes_few_rows_as_columns_and_never_copies_the_weight(spec, rows):
    a, weight = operands(spec, rows // 2)
    # A tied embedding has its outputs first already.
    b = weight if spec == "btd,vd->btv" else turned(spec, weight)
    compiled = jax.jit(functools.partial(einsum, spec)).lower(a, b).compile()
    depth = SIZES["d"]
    outputs = weight.size // depth
    (dot,) = [x for x in compiled.as_text().splitlines() if " dot(" in x]
    has_columns = f"f32[{outputs},{rows}]" in dot.split(" dot(")[0]
    assert has_columns == (rows <= MOST_COLUMNS), dot
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 4 * rows * (outputs + depth) + 256


def test_other_platforms_multiply_as_before():
    spec = "btd,vd->btv"
    traced = jax.jit(functools.partial(einsum, spec)).trace(*operands(spec, 2))
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "optimization_barrier" not in text and "dot_general" in text
    assert "optimization_barrier" in traced.lower().as_text()


def test_shape_and_reshape_are_the_matrixs():
    weight = jnp.arange(6 * 2 * 5.0).reshape(6, 2, 5)
    made = output_major(weight, "NHD", "NH")
    assert made[...] is made and made.shape == (6, 2, 5)
    flat = made.reshape(-1, 5)
    assert flat.shape == (12, 5)
    np.testing.assert_array_equal(flat.output_major.T, weight.reshape(12, 5))
    with pytest.raises(TypeError, match="no index"):
        made[0]
    stacked = output_major(jnp.stack([weight, weight + 1]), "NHD", "NH")
    one = jax.tree.map(lambda x: x[1], stacked)
    np.testing.assert_array_equal(one.output_major, jnp.moveaxis(weight + 1, -1, 0))


# ---------------------------------------------------------------- models


def made_spec(tensor=1, **fields):
    model_config = dataclasses.replace(helpers.ENGINE_MODEL, **fields)
    mesh = helpers.make_mesh(tensor=tensor)
    return design(model_config, mesh, helpers.ENGINE_OPTIONS).spec


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_matrix_is_sharded_over_the_same_dimensions(tensor):
    spec = made_spec(tensor, dtype="float32")
    given = helpers.initial_parameters(spec.model_config, spec.mesh)
    weights = decode_weights.prepare_weights(spec, given)
    layer, axis = weights.layers[1], sharding.TENSOR
    for parameter, axes in (
        (layer.attention.wk, (axis, None, sharding.FSDP)),
        (layer.attention.wo, (sharding.FSDP, axis, None)),
        (layer.mlp.gate, (axis, sharding.FSDP)),
        (layer.mlp.down, (sharding.FSDP, axis)),
        (weights.unembedding, (axis, sharding.FSDP)),
    ):
        made = parameter[...]
        assert isinstance(made, OutputMajor)
        assert tuple(made.output_major.sharding.spec) == axes
    np.testing.assert_array_equal(
        layer.attention.wo[...].output_major,
        np.moveaxis(np.asarray(given.layers.attention.wo[...])[1], -1, 0),
    )


@pytest.mark.parametrize(
    "dtype, weights_dtype, platform, has",
    [
        ("float32", "auto", "cpu", True),
        ("bfloat16", "auto", "cpu", False),
        ("float32", "int8", "cpu", False),
        ("float32", "auto", "tpu", False),
        ("float32", "auto", "gpu", False),
    ],
)
def test_only_cpus_have_them_and_only_in_float32(dtype, weights_dtype, platform, has):
    devices = np.array([types.SimpleNamespace(platform=platform)])
    spec = made_spec(dtype=dtype)._replace(
        mesh=types.SimpleNamespace(devices=devices), weights_dtype=weights_dtype
    )
    shapes = decode_weights._weights_shapes(spec)
    is_made = lambda x: isinstance(x, OutputMajor)
    matrices = [x for x in jax.tree.leaves(shapes, is_leaf=is_made) if is_made(x)]
    layers = spec.model_config.layers
    assert len(matrices) == (7 * layers + 1 if has else 0)
