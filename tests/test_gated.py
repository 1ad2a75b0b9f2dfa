"""The gated MLP: JAX's own derivative, from two arrays that the forward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ladder_jax import config, gated, matmul, model

B, T, D, F = 2, 3, 4, 8


def plain(activation, gate_BTF, up_BTF, weight_FD):
    """The same by JAX's own rules."""
    gated_BTF = activation(gate_BTF.astype(jnp.float32)) * up_BTF
    return matmul.einsum("btf,fd->btd", gated_BTF.astype(gate_BTF.dtype), weight_FD)


def ours(activation, gate_BTF, up_BTF, weight_FD):
    gated_BTF = gated.gated(activation, gate_BTF, up_BTF)
    return gated.down(activation, gate_BTF, up_BTF, gated_BTF, weight_FD)


def operands(dtype):
    draw = np.random.default_rng(0).normal
    shapes = (B, T, F), (B, T, F), (F, D)
    gate_BTF, up_BTF, weight_FD = (jnp.float32(2 * draw(size=x)) for x in shapes)
    return gate_BTF.astype(dtype), up_BTF.astype(dtype), weight_FD


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", model.ACTIVATIONS)
def test_values_and_derivatives_are_jaxs_own(name, dtype):
    activation, arguments = model.ACTIVATIONS[name], operands(dtype)
    results = {}
    for function in (plain, ours):
        value, vjp = jax.vjp(lambda *args, f=function: f(activation, *args), *arguments)
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=value.shape))
        results[function] = value, *vjp(cotangent.astype(value.dtype))
    # float32: rounding in another order; bfloat16: the same, before it is rounded.
    tolerance = 2e-6 if dtype == "float32" else 2**-8
    for expected, actual in zip(results[plain], results[ours]):
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(
            np.float32(actual), np.float32(expected), tolerance, tolerance
        )


def kept(function, dtype):
    """The numbers of elements of the arrays with F that the backward pass reads."""
    activation = model.ACTIVATIONS["silu"]
    arguments = operands(dtype)
    _, vjp = jax.vjp(lambda *args: function(activation, *args), *arguments)
    return sorted(x.dtype.name for x in jax.tree.leaves(vjp) if x.shape == (B, T, F))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backward_pass_reads_two_arrays(dtype):
    assert kept(ours, dtype) == [dtype, dtype]
    assert len(kept(plain, dtype)) > 2  # what the rules above are for


def test_no_derivative_is_lost_on_the_way_around():
    """`down` has no derivative for gate and up: they reach it through `gated` alone."""
    activation, (gate_BTF, up_BTF, weight_FD) = (
        model.ACTIVATIONS["silu"],
        operands("float32"),
    )
    fixed_BTF = gated.gated(activation, gate_BTF, up_BTF)
    apart = jax.grad(
        lambda gate, up: gated.down(activation, gate, up, fixed_BTF, weight_FD).sum(),
        argnums=(0, 1),
    )(gate_BTF, up_BTF)
    assert all(not x.any() for x in apart)


def test_the_model_keeps_two_arrays_a_layer():
    """One layer, so that nothing is stacked; everything else has other sizes."""
    shape = config.Model(
        vocab_size=32,
        dim=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=4,
        ffn_dim=24,
        dtype="float32",
    )
    parameters = model.init(shape, jax.random.key(0))
    u_BTD = jnp.ones((2, 5, 16))
    layer = jax.tree.map(lambda x: x[0], parameters.layers)
    progress = lambda x, saved=True: x
    _, vjp = jax.vjp(lambda u: layer.mlp(u, progress), u_BTD)
    wide = [x for x in jax.tree.leaves(vjp) if x.shape == (2, 5, 24)]
    assert len(wide) == 2
