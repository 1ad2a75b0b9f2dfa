"""Every reduction gives psum's sum and derivatives, and equal bits on all shards."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAST, make_mesh

from ladder_jax import sharding
from ladder_jax.residual.overlap import AsyncReduction, BackwardReduction
from ladder_jax.residual.reductions import (
    REDUCTIONS,
    Policy,
    copy_to_tensor_axis,
    reduce,
    with_gradient_of,
)

SHAPES = [(3, 5, 7), (1,), (), (2, 1, 384)]
SIZES = [2, 3, 6, 8]


def over(size, function, options=FAST):
    """`function` of each of `size` tensor shards' own values, compiled with `options`.

    Values and results lead with the shard.
    """

    def local(values):
        results = function(jax.tree.map(lambda x: x[0], values))
        return jax.tree.map(lambda x: x[None], results)

    spec = sharding.P("tensor")
    mapped = sharding.shard_map(local, make_mesh(tensor=size), spec, spec)
    return jax.jit(mapped, compiler_options=options)


def partials(size, shape, dtype=jnp.float32):
    return np.random.default_rng(size).normal(size=(size, *shape)).astype(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_sum_is_psums_and_the_same_bits_everywhere(name, size):
    reduce_all = lambda values: [reduce(x, name) for x in values]
    given_arrays = [partials(size, shape) for shape in SHAPES]
    # As users compile it: another order of the sums would have other bits.
    totals = over(size, reduce_all, options={})(given_arrays)
    for shape, given, total in zip(SHAPES, given_arrays, map(np.asarray, totals)):
        assert all((row == total[0]).all() for row in total), (
            f"{name}, {size} shards, {shape}: not the same bits"
        )
        np.testing.assert_allclose(
            total[0],
            given.sum(axis=0),
            rtol=1e-5,
            atol=1e-6,
            err_msg=f"{name}, {size} shards, {shape}",
        )


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bfloat16_is_rounded_as_little_as_exchanges_need(name):
    """Eight shards round three times; psum on CPUs and one-shot sum in float32."""
    given = partials(8, (4, 384), jnp.bfloat16)
    total = np.float32(over(8, lambda x: reduce(x, name))(given))[0]
    exact = np.float32(given).sum(axis=0)
    assert (
        np.abs(total - exact).max()
        <= (8 if name == "ring" else 4) * 2**-8 * np.abs(exact).max()
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_sum_passes_its_cotangent_on_and_a_shared_value_sums_its_cotangents(
    name, size
):
    """A sum passes its cotangent on; a shared value sums its shards' cotangents."""
    given, scale = partials(size, (2, 3)), jnp.arange(1.0, size + 1)

    def grads(x):
        mine = scale[jax.lax.axis_index("tensor")]
        passed = jax.grad(lambda x: (mine * reduce(x, name)).sum())(x)
        summed = jax.grad(lambda x: (mine * copy_to_tensor_axis(x, name)).sum())(x)
        return passed, summed

    passed, summed = over(size, grads)(given)
    assert (np.asarray(passed) == np.asarray(scale)[:, None, None]).all()
    np.testing.assert_allclose(np.asarray(summed), scale.sum(), rtol=1e-6)


IN_ORDER = Policy(lambda message: "psum", in_order=True)
# Every reduction with every number of products and of shards, and every two of these.
ROUNDS = [
    (name, (2, 3, 8)[(i + j) % 3], products)
    for i, name in enumerate([*REDUCTIONS, IN_ORDER])
    for j, products in enumerate([0, 1, 3, 5])
]


@pytest.mark.parametrize("name, size, products", ROUNDS)
def test_rounds_that_end_between_products_change_nothing(name, size, products):
    """However many products a block has, forward and backward."""
    given, scale = partials(size, (2, 3)), jnp.arange(1.0, size + 1)

    def block(x, y):
        """The sum of x, and x + y, whose cotangent is reduced beside the products."""
        mine, forward = scale[jax.lax.axis_index("tensor")], AsyncReduction(x, name)
        backward, product = BackwardReduction((x, y), name), y
        for _ in range(products):
            product = backward.progress(product)
            product = forward.progress(3 * product)
        stale = with_gradient_of(x + y, backward.next_input())
        return (mine * stale).sum() + 0 * product.sum(), forward.wait()

    def run(x):
        (_, total), (dx, dy) = jax.value_and_grad(block, argnums=(0, 1), has_aux=True)(
            x, jnp.ones_like(x)
        )
        return total, dx, dy

    total, dx, dy = map(np.asarray, over(size, run)(given))
    np.testing.assert_allclose(
        total,
        np.broadcast_to(given.sum(axis=0), total.shape),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(dx, scale.sum(), rtol=1e-6)
    np.testing.assert_allclose(dy, scale.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "name, waiting",
    [
        ("psum", [False]),
        (IN_ORDER, [True]),
        ("recursive-doubling", [False, True, True]),
    ],
)
def test_the_backward_pass_waits_for_a_round_at_the_product_that_ends_it(name, waiting):
    """By product, in the order of the forward pass: whether the backward pass goes on
    only after the round that the product's cotangent ends. After the last round it does
    if blocks must keep their order (Policy.in_order)."""

    def cotangents(x, *operands):
        def block(*operands):
            backward = BackwardReduction((x,), name)
            marked = [backward.progress(operand) for operand in operands]
            stale = with_gradient_of(x, backward.next_input())
            return stale.sum() + sum(jnp.sin(value).sum() for value in marked)

        return jax.grad(block, argnums=range(len(operands)))(*operands)

    jaxpr = jax.make_jaxpr(cotangents, axis_env=[("tensor", 8)])(
        *[jnp.ones(())] * (1 + len(waiting))
    ).jaxpr

    def waits(cotangent):
        reached = {cotangent}
        for equation in reversed(jaxpr.eqns):
            if reached.intersection(equation.outvars):
                if equation.primitive.name == "optimization_barrier":
                    return True
                reached |= {
                    value
                    for value in equation.invars
                    if not isinstance(value, jax.extend.core.Literal)
                }
        return False

    assert [waits(cotangent) for cotangent in jaxpr.outvars] == waiting


def test_one_shard_has_nothing_to_reduce():
    given = partials(1, (2, 3))
    assert (over(1, functools.partial(reduce, reduction="ring"))(given) == given).all()
