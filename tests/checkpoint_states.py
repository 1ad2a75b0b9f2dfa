"""A small model and its optimizer's state to save, and what damages a checkpoint."""

import json
import random

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ladder_jax import config
from ladder_jax.saving import Checkpoints

META = {
    "config": json.loads(json.dumps(config.to_dict(config.Config()))),
    "tokenizer": '{"version": "1.0"}',
}


class Attention(nnx.Module):
    def __init__(self, seed, dim):
        random_wq = np.random.default_rng(seed).normal(size=(dim, 16))
        self.wq = nnx.Param(jnp.asarray(random_wq, jnp.float32))
        # Flax uses this name itself.
        self.value = nnx.Param(jnp.arange(dim, dtype=jnp.int32))


class Model(nnx.Module):
    def __init__(self, seed=0, dim=8):
        self.attention = Attention(seed, dim)
        self.norm = nnx.Param(jnp.linspace(0, 1, 8, dtype=jnp.bfloat16))
        self.blocks = nnx.List([nnx.Param(jnp.full(3, float(seed)))])


def data():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).batch(2).to_iter_dataset())


def make_state(seed=0, dim=8, optimizer=None):
    """A model and its optimizer's state, with values that depend on `seed`."""
    model = Model(seed, dim)
    state = (optimizer or optax.adamw(1e-3)).init(
        jax.tree.map(lambda x: x.astype(jnp.float32), model)
    )
    normal = np.random.default_rng(seed).normal
    noise = lambda x: np.asarray(x) + (normal(size=x.shape) if x.ndim else seed)
    state = jax.tree.map(lambda x: jnp.asarray(noise(x), x.dtype), state)
    return {"model": model, "optimizer": state}


def abstract(state, mesh=None, spec=lambda x: P()):
    """Shapes, dtypes and shardings: on `mesh` by `spec`, or on the first device."""
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def describe(x):
        place = NamedSharding(mesh, spec(x)) if mesh else one_device
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(describe, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(folder, *steps, keep=9, **kind):
    """A run with a checkpoint at each of `steps`, whose parameters have that seed."""
    with Checkpoints(folder, keep) as run:
        position = data()
        for step in steps:
            next(position)
            run.save(step, make_state(step, **kind), position, META)
    return folder


def harm(folder, name, how):
    for path in [p for p in folder.glob(name) if p.is_file()]:
        content = path.read_bytes()
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(
                {
                    "truncate": content[: len(content) // 2],
                    "empty": b"",
                    "garbage": random.Random(0).randbytes(len(content)),
                }[how]
            )
