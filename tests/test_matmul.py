"""Products: float32 sums of bfloat16 operands, of one row as of many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax.matmul import product


def operands(spec, sizes, dtype):
    keys = jax.random.split(jax.random.key(0))
    left, right = spec.split("->")[0].split(",")
    return [
        jax.random.normal(key, [sizes[letter] for letter in letters]).astype(dtype)
        for key, letters in zip(keys, (left, right))
    ]


@pytest.mark.parametrize(
    "spec", ["btd,df->btf", "btd,dnh->btnh", "btnh,nhd->btd", "bkrh,bksh->bkrs"]
)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_bfloat16_products_are_summed_in_float32(spec, rows):
    a, b = operands(
        spec, dict(b=1, t=rows, r=rows, d=24, f=7, n=3, h=5, k=2, s=6), jnp.bfloat16
    )
    got = jax.jit(lambda a, b: product(spec, a, b))(a, b)
    want = np.einsum(spec, *(np.asarray(x, np.float64) for x in (a, b)))
    assert got.dtype == jnp.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
