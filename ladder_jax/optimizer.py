"""AdamW, its learning-rate schedules and gradient clipping."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ladder_jax import sharding
from ladder_jax.config import Optimizer

# Optax counts steps in int32 and stays at the largest one.
LAST_STEP = jnp.iinfo(jnp.int32).max


def learning_rate(optimizer_config: Optimizer, steps: int) -> Callable[..., jax.Array]:
    """The learning rate as a function of the step, an int32 from 0.

    Args:
      optimizer_config: its schedule.
      steps: of the whole run. It may exceed what optax can count: a run that a user
        means to stop by hand has a very large number of steps.
    """
    steps = min(steps, LAST_STEP)
    peak, kind = optimizer_config.learning_rate, optimizer_config.lr_schedule
    final = optimizer_config.final_lr_fraction
    warmup = min(optimizer_config.warmup_steps, steps)
    decay = {"cosine": steps - warmup, "wsd": steps // 5, "constant": 0}[kind]
    if optimizer_config.decay_steps is not None and kind != "constant":
        decay = optimizer_config.decay_steps
    decay = max(min(decay, steps - warmup), 0)

    def rise(step: jax.Array) -> jax.Array:
        # Warm-up of w steps takes 1/w, 2/w, ... 1 of the peak: the first is not 0.
        return peak * (step + 1) / max(warmup, 1)

    if kind == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(decay, 1), final)
        return optax.join_schedules([rise, fall], [warmup])
    end = peak * (final if decay else 1)
    fall = optax.linear_schedule(peak, end, max(decay, 1))
    flat = optax.constant_schedule(peak)
    return optax.join_schedules([rise, flat, fall], [warmup, steps - decay])


def make_optimizer(
    optimizer_config: Optimizer, steps: int
) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101) after clipping by norm. Only matrices decay.

    Args:
      optimizer_config: its hyperparameters.
      steps: of the whole run, for the learning-rate schedule.
    Returns an optimizer whose state is the same with and without clipping. Its
    `update` takes `norm`, the gradients' global norm, where the caller knows it.
    """

    def decayed(parameters: Any) -> Any:
        roles = sharding.parameter_roles(parameters)
        return jax.tree.map(lambda role: role in ("matrix", "embedding"), roles)

    adamw = optax.adamw(
        learning_rate(optimizer_config, steps),
        optimizer_config.beta1,
        optimizer_config.beta2,
        optimizer_config.eps,
        weight_decay=optimizer_config.weight_decay,
        mask=decayed,
    )
    limit = optimizer_config.clip_norm
    clip = optax.identity() if limit is None else clip_by_norm(limit)
    return optax.with_extra_args_support(optax.chain(clip, adamw))


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` whose `update` takes the norm if it is known."""

    def init(parameters: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        gradients: Any,
        state: optax.EmptyState,
        parameters: Any = None,
        *,
        norm: jax.Array | None = None,
        **_: Any,
    ) -> tuple[Any, optax.EmptyState]:
        norm = optax.tree.norm(gradients) if norm is None else norm
        clipped = jax.tree.map(
            lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit),
            gradients,
        )
        return clipped, state

    return optax.GradientTransformationExtraArgs(init, update)
