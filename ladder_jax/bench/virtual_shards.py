"""Trains a model of several tensor shards on one device.

The tensor axis is an axis of `jax.vmap`, which has the same collectives as a mesh. So
the schedules whose model depends on the number of shards (desync, dtp) train anywhere,
at the cost of the standard model. It is for studies of quality: nothing overlaps.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ladder_jax import model, sharding
from ladder_jax.config import Config
from ladder_jax.train_programs import State

Batch = Mapping[str, jax.Array]


def on_virtual_shards(
    local: Callable[..., Any], parameters: model.Transformer, batch: Batch, shards: int
) -> Any:
    """`local(parameters, batch)` on `shards` tensor shards; results by shard.

    Args:
      local: the program of one shard, as for sharding.shard_map. Its results are arrays
        or trees whose leaves get a first dimension, the shard's.
      parameters: whole arrays.
      batch: whole arrays, the same for all shards.
      shards: how many.
    """
    leaves, tree = jax.tree.flatten(parameters)
    dims = tensor_dims(parameters)
    # An axis of every mesh: the programs of shards sum over all of them.
    mesh = jax.sharding.Mesh([[jax.devices()[0]]], (sharding.DATA, sharding.FSDP))

    def program(leaves: list[jax.Array], batch: Batch) -> Any:
        def shard(*shard_leaves: jax.Array) -> Any:
            return local(jax.tree.unflatten(tree, shard_leaves), batch)

        return jax.vmap(
            shard, in_axes=dims, axis_name=sharding.TENSOR, axis_size=shards
        )(*leaves)

    return jax.shard_map(
        program,
        mesh=mesh,
        in_specs=sharding.REPLICATED,
        out_specs=sharding.REPLICATED,
        check_vma=False,
    )([_split(x, dim, shards) for x, dim in zip(leaves, dims)], batch)


def tensor_dims(parameters: model.Transformer) -> tuple[int | None, ...]:
    """The dimension of every leaf that tensor shards divide, or None."""
    specs = jax.tree.leaves(sharding.parameter_specs(parameters))
    return tuple(
        spec.index(sharding.TENSOR) if sharding.TENSOR in spec else None
        for spec in map(tuple, specs)
    )


def _split(x: jax.Array, dim: int | None, shards: int) -> jax.Array:
    """`x` with dimension `dim` as two: shards, and the share of each."""
    if dim is None:
        return x
    return x.reshape(*x.shape[:dim], shards, -1, *x.shape[dim + 1 :])


def _join(x: jax.Array, dim: int | None) -> jax.Array:
    """A whole array from the shards [shard, ...]; one without `dim` is equal on all."""
    if dim is None:
        return x[0]
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def loss_and_gradients(
    config: Config, shards: int, parameters: model.Transformer, batch: Batch
) -> tuple[jax.Array, model.Transformer]:
    """The mean loss in nats a token, and its gradients: whole arrays."""

    def local(parameters: model.Transformer, batch: Batch) -> Any:
        weight = jnp.maximum(batch["weights"].sum(), 1)
        loss, gradients = jax.value_and_grad(
            lambda m: model.loss(m, config.model, batch, **_options(config)) / weight
        )(parameters)
        specs = sharding.parameter_specs(parameters)
        return loss, sharding.sum_gradients(gradients, specs)

    loss_R, gradients = on_virtual_shards(local, parameters, batch, shards)
    leaves, tree = jax.tree.flatten(gradients)
    joined = map(_join, leaves, tensor_dims(parameters))
    return loss_R[0], jax.tree.unflatten(tree, joined)


def _options(config: Config) -> dict[str, Any]:
    return dict(remat=config.train.remat, chunk=config.train.loss_chunk)


def make_step(
    config: Config, shards: int, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[..., Any]:
    """The compiled step (state, batch) -> (state, loss); it donates the state."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        loss, gradients = loss_and_gradients(config, shards, state.model, batch)
        norm = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.model, norm=norm
        )
        return State(optax.apply_updates(state.model, updates), optimizer_state), loss

    return step


def make_evaluation(config: Config, shards: int) -> Callable[..., Any]:
    """(model, batch) -> (sum of losses in nats, sum of weights), compiled."""

    def local(parameters: model.Transformer, batch: Batch) -> Any:
        loss = model.loss(parameters, config.model, batch, **_options(config))
        return lax.psum((loss, batch["weights"].sum()), sharding.BATCH_AXES)

    @jax.jit
    def evaluate(parameters: model.Transformer, batch: Batch) -> Any:
        results = on_virtual_shards(local, parameters, batch, shards)
        return jax.tree.map(lambda x: x[0], results)

    return evaluate
