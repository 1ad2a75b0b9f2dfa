"""A prefill whose caller reads few positions: the same logits and caches as of all, and
its last reductions are of these positions alone.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAST, make_mesh, random_parameters
from jaxprs import equations
from model_cases import BATCH, CASES, READ, B, T, case_model

from ladder_jax import kv_cache, model, sharding

pytestmark = pytest.mark.usefixtures("fast_compiler")


def prefilled(model_config, unstacked, tensor, read):
    """(program, arguments) of a prefill.

    It returns the logits at the positions `read` (None: at all), and caches by layer.
    """
    tree = random_parameters(model_config)
    tree = model.unstack(tree) if unstacked else tree
    shape = B, model_config.kv_heads, T, model_config.head_dim
    if not unstacked:
        shape = model_config.layers, *shape
    zeros = np.zeros(shape, np.float32)
    empty = kv_cache.KV(zeros, zeros)
    if unstacked:
        empty = [empty] * model_config.layers
    cache_spec = sharding.P(*[None] * (1 if unstacked else 2), "tensor")

    def local(tree, empty):
        positions_BT = jnp.tile(jnp.arange(T), (B, 1))
        x_BRD, filled = model.hidden(
            tree, model_config, BATCH["tokens"], positions_BT, cache=empty, read_BR=read
        )
        return model.logits(tree, model_config, x_BRD), jax.tree.map(
            lambda *xs: jnp.stack(xs), *filled
        ) if unstacked else filled

    run = sharding.shard_map(
        local,
        make_mesh(1, 1, tensor),
        (sharding.parameter_specs(tree), cache_spec),
        (sharding.P(None, None, "tensor"), sharding.P(None, None, "tensor")),
    )
    return run, (tree, empty)


@pytest.mark.parametrize(
    "name, tensor, unstacked",
    [
        pytest.param(
            name,
            tensor,
            unstacked,
            marks=[]
            if tensor == 2 and unstacked or name == "ladder"
            else pytest.mark.slow,
        )
        for name in CASES
        if name != "desync:3"
        for tensor in (1, 2, 8)
        for unstacked in (False, True)
    ],
)
def test_a_prefill_that_reads_some_positions_has_the_logits_and_caches_of_all(
    name, tensor, unstacked
):
    model_config = case_model(name)

    def run(read):
        program, arguments = prefilled(model_config, unstacked, tensor, read)
        return jax.device_get(jax.jit(program, compiler_options=FAST)(*arguments))

    (whole_BTV, whole_caches), (some_BRV, caches) = run(None), run(READ)
    np.testing.assert_allclose(
        some_BRV, np.take_along_axis(whole_BTV, READ[..., None], axis=1), atol=1e-5
    )
    for expected, cache in zip(
        jax.tree.leaves(whole_caches), jax.tree.leaves(caches), strict=True
    ):
        np.testing.assert_allclose(cache, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, unstacked, whole, read",
    [
        ("standard", True, 5, 2),
        ("ladder", True, 4, 3),
        ("ladder:1,2", True, 4, 3),
        ("parallel", True, 3, 1),
        ("desync:2", True, 3, 1),
        ("ladder", False, 7, 1),
    ],
)
def test_a_reduction_that_only_the_read_positions_need_is_of_these_positions(
    name, unstacked, whole, read
):
    """3 layers and the embedding reduce. A scan with delays has one reduction more."""
    run, arguments = prefilled(case_model(name, layers=3), unstacked, 8, READ)
    lengths = collections.Counter(
        eqn.outvars[0].aval.shape[1]
        for eqn, times in equations(jax.make_jaxpr(run)(*arguments).jaxpr)
        for _ in range(times)
        if eqn.primitive.name.startswith("psum")
    )
    assert lengths == {T: whole, READ.shape[1]: read}
