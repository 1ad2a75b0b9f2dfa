"""A lone row that a decode step computes twice gives what it gives once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ladder_jax.config import Mesh, Model
from ladder_jax.hardware import chips
from ladder_jax.planner import plan
from ladder_jax.sharding import make_mesh

MODEL = Model(
    vocab_size=64,
    dim=32,
    layers=3,
    heads=8,
    kv_heads=4,
    head_dim=128,
    ffn_dim=48,
    dtype="float32",
)


def test_the_chips_say_where_it_pays():
    assert {kind for kind, chip in chips.CHIPS.items() if chip.doubles_row} == {
        "v5p",
        "v6e",
    }
    assert not chips.doubles_row(make_mesh(Mesh(tensor=8), jax.devices()[:8]))


@pytest.mark.parametrize("schedule", ["standard", "ladder", "parallel", "desync:2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_computed_twice_gives_the_same_logits_and_cache(
    monkeypatch, schedule, batch
):
    """A batch of two has no lone row, and standard hides nothing: the same program."""
    mesh = make_mesh(Mesh(data=1, tensor=4), jax.devices()[:4])
    model_config = Model(**vars(MODEL) | dict(residual=schedule))
    random = np.random.default_rng(0)

    def value(x):
        array = random.normal(0, 0.3, x.shape).astype(x.dtype)
        if x.dtype == jnp.int32:
            array = np.full(x.shape, 5, np.int32)
        return jax.device_put(array, NamedSharding(mesh, x.sharding.spec))

    def run(twice):
        monkeypatch.setattr(chips, "doubles_row", lambda mesh: twice)
        program = plan.forward_pass(
            model_config, mesh, batch, 1, 16, "recursive-doubling", reads_all=True
        )
        text = str(jax.make_jaxpr(program.function)(*program.arguments))
        nonlocal random
        random = np.random.default_rng(0)
        arguments = jax.tree.map(value, program.arguments)
        return text, program.function(*arguments)

    (once_text, once), (twice_text, twice) = run(False), run(True)
    has_delays = schedule == "ladder"
    assert (once_text != twice_text) == (batch == 1 and has_delays)
    assert jax.tree.structure(once) == jax.tree.structure(twice)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
