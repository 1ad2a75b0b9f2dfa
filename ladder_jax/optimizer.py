"""AdamW, its learning-rate schedules and gradient clipping."""

import jax
import jax.numpy as jnp
import optax

from ladder_jax import sharding


def learning_rate(config, steps):
    """The learning rate as a function of the step (config: config.Optimizer; steps: of the whole run)."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    decay = {"cosine": steps - warmup, "wsd": steps // 5, "constant": 0}[
        config.lr_schedule
    ]
    if config.decay_steps is not None and config.lr_schedule != "constant":
        decay = config.decay_steps
    decay = max(min(decay, steps - warmup), 0)
    if config.lr_schedule == "cosine":
        tail = optax.cosine_decay_schedule(
            peak, max(decay, 1), config.final_lr_fraction
        )
        parts, bounds = [tail], [warmup]
    else:
        tail = optax.linear_schedule(
            peak, peak * (config.final_lr_fraction if decay else 1), max(decay, 1)
        )
        parts, bounds = [optax.constant_schedule(peak), tail], [warmup, steps - decay]
    # the first step already learns: warm-up takes values 1/w, 2/w, ... 1
    return optax.join_schedules(
        [lambda step: peak * (step + 1) / max(warmup, 1), *parts], bounds
    )


def make_optimizer(config, steps):
    """AdamW (arXiv 1711.05101) with decay of matrices alone, after clipping by the global norm."""

    def decayed(parameters):
        roles = sharding.parameter_roles(parameters)
        return jax.tree.map(lambda role: role in ("matrix", "embedding"), roles)

    adamw = optax.adamw(
        learning_rate(config, steps),
        config.beta1,
        config.beta2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    clip = (
        optax.identity() if config.clip_norm is None else clip_by_norm(config.clip_norm)
    )
    return optax.with_extra_args_support(
        optax.chain(clip, adamw)
    )  # the same state with and without clipping


def clip_by_norm(limit):
    """`optax.clip_by_global_norm` that takes the norm from who knows it already: update(..., norm=norm)."""

    def update(gradients, state, parameters=None, *, norm=None, **_):
        norm = optax.tree.norm(gradients) if norm is None else norm
        return jax.tree.map(
            lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit),
            gradients,
        ), state

    return optax.GradientTransformationExtraArgs(
        lambda parameters: optax.EmptyState(), update
    )
