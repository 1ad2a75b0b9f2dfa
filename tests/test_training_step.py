"""A training step is the same on every mesh and in parts, and updates in place."""

import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ladder_jax import sharding, train_programs, training
from ladder_jax.data import tokenizer
from ladder_jax.data.batches import train_iterator
from ladder_jax.data.corpus import prepare
from ladder_jax.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("fast_compiler")


def steps_of(cfg, shape, state, batches):
    """(results of every step, parameters at the end) of `cfg` from `state`."""
    mesh = helpers.make_mesh(*shape)
    optimizer = make_optimizer(cfg.optimizer, cfg.train.steps)
    place = lambda tree, like: jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding), tree, like
    )
    state = place(state, train_programs.abstract_state(cfg, mesh, optimizer))
    batches = [
        jax.device_put(batch, sharding.named_shardings(mesh, sharding.TOKENS))
        for batch in batches
    ]
    step = (
        train_programs.make_step(cfg, mesh, optimizer)
        .lower(state, batches[0])
        .compile(helpers.FAST)
    )
    results = []
    for batch in batches:
        state, result = step(state, batch)
        results.append({name: float(value) for name, value in result.items()})
    return results, jax.device_get(state.model)


@pytest.fixture(scope="module")
def state(tiny_folder):
    """The state that the runs start from, on the host."""
    cfg = tiny.make(tiny_folder)
    return jax.device_get(
        train_programs.init_state(
            cfg, sharding.make_mesh(cfg.mesh), make_optimizer(cfg.optimizer, 20)
        )
    )


@pytest.fixture(scope="module")
def batches(tiny_folder):
    """Three batches of 16 rows with a different number of zero weights in each row."""
    cfg = tiny.make(tiny_folder)
    iterator = train_iterator(
        prepare(cfg.data, tokenizer.load("bytes")), batch=16, length=32, seed=0
    )
    lengths = np.random.default_rng(0).integers(1, 33, (16, 1))
    return [
        {**batch, "weights": batch["weights"] * (np.arange(32) < lengths)}
        for batch, _ in zip(iterator, range(3))
    ]


def clipped(tiny_folder, **fields):
    """A config that clips gradients, which have a norm above 1."""
    fields = dict(train_global_batch=16, optimizer_clip_norm=0.5) | fields
    return tiny.make(tiny_folder, **fields)


@pytest.fixture(scope="module")
def one_device(tiny_folder, state, batches):
    return steps_of(clipped(tiny_folder), (1, 1, 1), state, batches)


@pytest.mark.parametrize(
    "shape, accumulate, by_tokens",
    [
        ((2, 2, 2), 1, False),
        ((1, 1, 8), 1, False),
        ((2, 2, 2), 4, False),
        ((1, 1, 1), 2, False),
        ((2, 2, 2), 2, True),
    ],
)
def test_a_step_is_the_same_on_every_mesh_and_in_parts(
    tiny_folder, state, batches, one_device, shape, accumulate, by_tokens
):
    """Losses, norms and clipped updates; parts of different weights give one mean."""
    fields = dict(train_grad_accum_steps=accumulate, mesh_sequence_parallel=by_tokens)
    results, parameters = steps_of(
        clipped(tiny_folder, **fields), shape, state, batches
    )
    for result, expected in zip(results, one_device[0]):
        assert expected["gradient_norm"] > 1 and result == pytest.approx(
            expected, rel=2e-5
        )
    for left, right in zip(jax.tree.leaves(parameters), jax.tree.leaves(one_device[1])):
        np.testing.assert_allclose(left, right, atol=2e-5)


def test_a_step_updates_in_place(tiny_folder):
    cfg = tiny.make(tiny_folder)
    mesh = helpers.make_mesh(2, 2, 2)
    optimizer = make_optimizer(cfg.optimizer, 20)
    state = train_programs.abstract_state(cfg, mesh, optimizer)
    tokens = sharding.named_shardings(mesh, sharding.TOKENS)
    batch = {
        name: jax.ShapeDtypeStruct(
            (8, 32), jnp.float32 if name == "weights" else jnp.int32, sharding=tokens
        )
        for name in training.BATCH_FIELDS
    }
    train_step = train_programs.make_step(cfg, mesh, optimizer)
    compiled = train_step.lower(state, batch).compile()
    local = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    assert compiled.memory_analysis().alias_size_in_bytes >= local


def test_the_first_state_is_the_same_on_every_mesh(tiny_folder, state):
    cfg = tiny.make(tiny_folder)
    mesh = helpers.make_mesh()
    first = train_programs.init_state(cfg, mesh, make_optimizer(cfg.optimizer, 20))
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(state)):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_parameters_that_overflow_are_seen_before_they_are_saved(
    tiny_folder, state, batches
):
    cfg = clipped(tiny_folder, optimizer_learning_rate=1e30, optimizer_warmup_steps=0)
    results, _ = steps_of(cfg, (1, 1, 1), state, batches[:1])
    assert math.isfinite(results[0]["loss"]) and math.isfinite(
        results[0]["gradient_norm"]
    )
    assert not math.isfinite(results[0]["parameter_norm"])
