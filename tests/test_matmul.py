"""Products: float32 sums of bfloat16 operands, of one row as of many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations

from ladder_jax.matmul import einsum, product


def operands(spec, sizes, dtype):
    random = np.random.default_rng(0)
    return [
        random.normal(size=[sizes[letter] for letter in letters]).astype(dtype)
        for letters in spec.split("->")[0].split(",")
    ]


@pytest.mark.parametrize(
    "spec", ["btd,df->btf", "btd,dnh->btnh", "btnh,nhd->btd", "bkrh,bksh->bkrs"]
)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_bfloat16_products_are_summed_in_float32(spec, rows):
    a, b = operands(
        spec, dict(b=1, t=rows, r=rows, d=24, f=7, n=3, h=5, k=2, s=6), jnp.bfloat16
    )
    actual = jax.jit(lambda a, b: product(spec, a, b))(a, b)
    exact = np.einsum(spec, *(np.asarray(x, np.float64) for x in (a, b)))
    assert actual.dtype == jnp.float32 and actual.shape == exact.shape
    np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- einsum

PRODUCTS = [
    "btd,dnh->btnh",
    "btnh,nhd->btd",
    "btd,vd->btv",
    "btkgh,bskh->bkgts",
    "bkgts,bskh->btkgh",
]
SIZES = dict(b=2, t=3, s=4, d=5, n=2, h=6, v=7, k=2, g=3)


def small_operands(spec, a_dtype, b_dtype):
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.normal(size=[SIZES[d] for d in dims]), dtype)
        for dims, dtype in zip(spec.split("->")[0].split(","), (a_dtype, b_dtype))
    ]


@pytest.mark.parametrize("spec", PRODUCTS)
def test_einsum_is_jnps_in_float32_gradients_too(spec):
    a, b = small_operands(spec, jnp.float32, jnp.float32)
    expected, back = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a, b)
    actual, our_back = jax.vjp(lambda a, b: einsum(spec, a, b), a, b)
    for ours, theirs in zip((actual, *our_back(expected)), (expected, *back(expected))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    precisions = [
        eqn.params["precision"]
        for eqn, _ in equations(jax.make_jaxpr(our_back)(expected).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert precisions == [(jax.lax.Precision.HIGHEST,) * 2] * 2, (
        f"TPUs and TF32 would round float32: {precisions}"
    )


@pytest.mark.parametrize("spec", PRODUCTS)
@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_einsum_multiplies_bfloat16_and_sums_in_float32(spec, out_dtype):
    # activations, and a float32 parameter
    a, b = small_operands(spec, jnp.bfloat16, jnp.float32)

    def both(a, b):
        out, back = jax.vjp(lambda a, b: einsum(spec, a, b, out_dtype), a, b)
        return out, *back(out)

    out, a_bar, b_bar = both(a, b)
    assert (out.dtype, a_bar.dtype, b_bar.dtype) == (
        out_dtype or jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
    )
    assert_bfloat16_products(jax.make_jaxpr(both)(a, b), 3)
    np.testing.assert_allclose(
        np.float32(out), jnp.einsum(spec, np.float32(a), b), rtol=0.03, atol=0.05
    )


def assert_bfloat16_products(program, count):
    products = [
        eqn
        for eqn, _ in equations(program.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert len(products) == count, (
        f"{count} matrix products were expected, there are {len(products)}"
    )
    for eqn in products:
        kinds = [var.aval.dtype for var in (*eqn.invars, *eqn.outvars)]
        assert kinds == [jnp.bfloat16, jnp.bfloat16, jnp.float32], f"{kinds} in {eqn}"
