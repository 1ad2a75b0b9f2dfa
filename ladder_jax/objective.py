"""What a training step minimises: cross-entropy, or the divergence from a parent too.

It computes the loss and its gradients over the whole batch, in one `jax.shard_map`
around the models.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax import attention, distill, model, sharding
from ladder_jax.config import Config, Model
from ladder_jax.hardware import chips
from ladder_jax.residual import choose

# The arrays of a batch, each [B, T] (see data/batches.py).
BATCH_FIELDS = ("tokens", "targets", "segments", "positions", "weights")
BATCH_SPECS = dict.fromkeys(BATCH_FIELDS, sharding.TOKENS)

Batch = Mapping[str, Any]  # of jax or NumPy arrays, by BATCH_FIELDS


class Extras(NamedTuple):
    """What a program takes beside the parameters and a batch, as a dict of arrays.

    Attributes:
      parent: the parent's shape. The dict then has "parent": its parameters.
      freshness: whether the dict has "freshness": the share of the fresh stream in what
        blocks read, a scalar or one value a block (residual/layers.run).
    """

    parent: Model | None = None
    freshness: bool = False

    def specs(self) -> tuple[dict[str, Any], ...]:
        """The PartitionSpecs of the dict, as an argument; no argument if it is empty.

        So programs without extras take the same arguments as ever.
        """
        specs: dict[str, Any] = {}
        if self.parent is not None:
            specs["parent"] = sharding.parameter_specs(model.abstract(self.parent))
        if self.freshness:
            specs["freshness"] = sharding.REPLICATED
        return (specs,) if specs else ()


NO_EXTRAS = Extras()


def loss_and_gradients(
    config: Config,
    mesh: jax.sharding.Mesh,
    kernel: attention.Kernel | None = None,
    extras: Extras = NO_EXTRAS,
) -> Callable[..., Any]:
    """(model, batch, the dict of extras, if any) -> (losses, gradients).

    Both are over the whole batch. `losses` are means in nats a token: loss, whose
    gradients these are; with a parent also its terms divergence and cross_entropy.

    Args:
      config: the run's.
      mesh: of the global arrays that the function takes and returns.
      kernel: of attention. None: see attention.kernel_for.
      extras: what else the function takes.
    """
    terms_of = make_terms(config, mesh, kernel, extras)
    parts = config.train.grad_accum_steps

    def local(parameters: Any, batch: Batch, *inputs: dict[str, Any]) -> Any:
        weight = jnp.maximum(lax.psum(batch["weights"].sum(), sharding.BATCH_AXES), 1)

        def mean(parameters: Any, part: Batch) -> Any:
            terms = terms_of(parameters, part, dict(*inputs))
            return jax.tree.map(lambda x: x / weight, terms)

        gradients_of = jax.value_and_grad(mean, has_aux=True)
        if parts == 1:
            (loss, terms), gradients = gradients_of(parameters, batch)
        else:
            (loss, terms), gradients = accumulate(
                gradients_of, parameters, batch, parts
            )
        losses = lax.psum(dict(loss=loss, **terms), sharding.BATCH_AXES)
        return losses, sharding.sum_gradients(gradients, specs)

    specs = sharding.parameter_specs(model.abstract(config.model))
    return sharding.shard_map(
        local,
        mesh,
        (specs, BATCH_SPECS, *extras.specs()),
        (sharding.REPLICATED, specs),
    )


def make_terms(
    config: Config,
    mesh: jax.sharding.Mesh,
    kernel: attention.Kernel | None,
    extras: Extras,
) -> Callable[..., Any]:
    """(model, batch, the dict of extras) -> (loss, its terms), inside `shard_map`.

    They are sums over this data shard's tokens. Arguments: see `loss_and_gradients`.
    """
    options = model_options(config, config.model, mesh, kernel)
    options |= dict(remat=config.train.remat)
    chunk, hyper = config.train.loss_chunk, config.distill

    def cross_entropy(parameters: Any, batch: Batch, inputs: dict[str, Any]) -> Any:
        own = options | inputs  # perhaps a freshness
        loss = model.loss(parameters, config.model, batch, chunk=chunk, **own)
        return loss, {}

    if extras.parent is None:
        return cross_entropy
    parent_config = extras.parent
    parent_options = model_options(config, parent_config, mesh, kernel)

    def distillation(parameters: Any, batch: Batch, inputs: dict[str, Any]) -> Any:
        fresh = dict(inputs)
        parent = fresh.pop("parent")
        divergence, entropy = distill.losses(
            parameters,
            config.model,
            parent,
            parent_config,
            batch,
            top_k=hyper.top_k,
            temperature=hyper.temperature,
            chunk=chunk,
            options=options | fresh,
            parent_options=parent_options,
        )
        loss = divergence + hyper.cross_entropy * entropy
        return loss, dict(divergence=divergence, cross_entropy=entropy)

    return distillation


def model_options(
    config: Config,
    model_config: Model,
    mesh: jax.sharding.Mesh,
    kernel: attention.Kernel | None,
) -> dict[str, Any]:
    """The options of `model.hidden` for a model, the run's own or its parent."""
    platform, length = chips.platform(mesh), config.train.seq_len
    return dict(
        kernel=kernel or attention.kernel_for(platform, model_config, length),
        reduction=choose.reduction_for(config.mesh.reduction, model_config, mesh),
        # On a CPU, XLA converts a scan's whole stack of bfloat16 activations at every
        # layer. Unrolled layers have no such stack, but take longer to compile. An
        # emulated mesh is for trials, where a short compilation matters more.
        unroll=platform == "cpu" and mesh.size == 1,
        sequence_parallel=config.mesh.sequence_parallel,
    )


def accumulate(
    objective: Callable[..., Any], parameters: Any, batch: Batch, parts: int
) -> Any:
    """Splits a batch into `parts`, and sums the results of `objective` over them.

    `objective`: (parameters, part of the batch) -> a tree of arrays.
    """

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, objective(parameters, part)), None

    batches = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(objective, parameters, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(add, zeros, batches)[0]
