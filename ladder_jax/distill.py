"""Distillation: the loss of a model beside the predictions of its parent.

Both models' logits are computed in one step and sharded in the same way: a tensor shard
has those of its share of the vocabulary, and gathers no others.

B batch, T tokens, D model, V vocabulary, K the parent's most probable tokens. Inside
`shard_map` B and V are this shard's share.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax import config, model, sharding
from ladder_jax.cross_entropy import cross_entropy, sum_over_tokens
from ladder_jax.residual.reductions import reduce

EXCLUDED = -1e30  # the logit of a token that is counted elsewhere


def losses(
    student: model.Transformer,
    student_config: config.Model,
    parent: model.Transformer,
    parent_config: config.Model,
    batch: Mapping[str, jax.Array],
    *,
    top_k: int = 0,
    temperature: float = 1.0,
    chunk: int = 0,
    options: Mapping[str, Any] | None = None,
    parent_options: Mapping[str, Any] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sums of this data shard's divergences and cross-entropies, nats.

    Source: Hinton et al. 2015 (arXiv 1503.02531); the divergence is KL(parent ||
    student). No gradient reaches the parent.

    Args:
      student: the trained model's parameters' shards.
      student_config: its shape and residual schedule.
      parent: the parent's parameters' shards.
      parent_config: its shape and residual schedule; the vocabulary is the student's.
      batch: as in `model.loss`. Its weights count for both losses.
      top_k, temperature: see `divergence`.
      chunk: as in `model.loss`.
      options: options of `model.hidden` for the student.
      parent_options: the same for the parent.

    Returns:
      (divergence, cross-entropy), scalars, the same on all tensor shards.
    """
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    x_BTD, _ = model.hidden(student, student_config, *inputs, **(options or {}))
    with jax.named_scope("parent"):
        y_BTD, _ = model.hidden(
            parent, parent_config, *inputs, **(parent_options or {})
        )
        y_BTD = lax.stop_gradient(y_BTD)

    def sums(
        x_BTD: jax.Array,
        y_BTD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
    ) -> jax.Array:
        logits_BTV = model.logits(student, student_config, x_BTD)
        with jax.named_scope("parent"):
            parent_BTV = model.logits(parent, parent_config, y_BTD)
        divergence_BT = divergence(logits_BTV, parent_BTV, temperature, top_k)
        entropy_BT = cross_entropy(logits_BTV, targets_BT)
        return jnp.stack([jnp.sum(x * weights_BT) for x in (divergence_BT, entropy_BT)])

    arrays = x_BTD, y_BTD, batch["targets"], batch["weights"]
    totals = sum_over_tokens(sums, arrays, chunk)
    return totals[0], totals[1]


def divergence(
    logits_BTV: jax.Array,
    parent_BTV: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
) -> jax.Array:
    """KL(parent || student) of every token [B, T], nats, the same on all shards.

    Args:
      logits_BTV: the student's.
      parent_BTV: the parent's, which get no gradient.
      temperature: divides both models' logits. The divergence is multiplied by its
        square, so that gradients keep their size (arXiv 1503.02531, section 2.1).
      top_k: if not 0, the divergence between the distributions over the parent's
        `top_k` most probable tokens and one entry for all other tokens together. It is
        at most the whole divergence, and smaller than the vocabulary.
    """
    logits_BTV = logits_BTV / temperature
    parent_BTV = lax.stop_gradient(parent_BTV) / temperature
    if top_k:
        ids_BTK = _most_probable(parent_BTV, top_k)
        log_q = jax.nn.log_softmax(_merged(logits_BTV, ids_BTK))
        log_p = lax.stop_gradient(jax.nn.log_softmax(_merged(parent_BTV, ids_BTK)))
        return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    terms = _divergence_terms(
        logits_BTV,
        sharding.largest(logits_BTV.max(axis=-1)),
        parent_BTV,
        sharding.largest(parent_BTV.max(axis=-1)),
    )
    total_BT, parent_total_BT, dot_BT = reduce(jnp.stack(terms), "psum")
    log_ratio_BT = jnp.log(total_BT) - jnp.log(parent_total_BT)
    return temperature**2 * (dot_BT / parent_total_BT + log_ratio_BT)


@jax.custom_vjp
def _divergence_terms(
    logits_BTV: jax.Array,
    largest_BT: jax.Array,
    parent_BTV: jax.Array,
    parent_largest_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """This shard's sums over its tokens, [B, T] each, of e^s, e^t and e^t (t - s).

    s and t are the student's and the parent's logits less their largest. The backward
    pass computes the exponentials again, so that no array of the logits' size is stored
    beside the logits.
    """
    s_BTV = logits_BTV - largest_BT[..., None]
    t_BTV = parent_BTV - parent_largest_BT[..., None]
    dot_BT = jnp.sum(jnp.exp(t_BTV) * (t_BTV - s_BTV), axis=-1)
    return jnp.exp(s_BTV).sum(axis=-1), jnp.exp(t_BTV).sum(axis=-1), dot_BT


def _divergence_terms_forward(*args: jax.Array) -> tuple[Any, Any]:
    return _divergence_terms(*args), args


def _divergence_terms_backward(
    operands: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, None, None, None]:
    logits_BTV, largest_BT, parent_BTV, parent_largest_BT = operands
    dtotal_BT1, _, ddot_BT1 = (cotangent[..., None] for cotangent in cotangents)
    dlogits_BTV = dtotal_BT1 * jnp.exp(logits_BTV - largest_BT[..., None])
    dlogits_BTV -= ddot_BT1 * jnp.exp(parent_BTV - parent_largest_BT[..., None])
    return dlogits_BTV, None, None, None


_divergence_terms.defvjp(_divergence_terms_forward, _divergence_terms_backward)


def _most_probable(logits_BTV: jax.Array, count: int) -> jax.Array:
    """The ids [B, T, K] of the `count` largest logits of the whole vocabulary.

    All tensor shards get the same ids. Of equal logits the lowest id comes first.
    """
    V = logits_BTV.shape[-1]
    values_BTK, rows_BTK = lax.top_k(logits_BTV, min(count, V))
    ids_BTK = rows_BTK + sharding.vocabulary_offset(V)
    values, ids = map(sharding.gather_vocabulary, (values_BTK, ids_BTK))
    _, order_BTK = lax.top_k(values, count)
    return jnp.take_along_axis(ids, order_BTK, axis=-1)


def _merged(logits_BTV: jax.Array, ids_BTK: jax.Array) -> jax.Array:
    """Logits [B, T, K + 1] of the tokens `ids_BTK`, and of all others together."""
    V = logits_BTV.shape[-1]
    rows_BTK = ids_BTK - sharding.vocabulary_offset(V)
    is_local_BTK = (rows_BTK >= 0) & (rows_BTK < V)
    safe_BTK = jnp.where(is_local_BTK, rows_BTK, 0)
    chosen_BTK = jnp.take_along_axis(logits_BTV, safe_BTK, axis=-1)
    chosen_BTK = reduce(jnp.where(is_local_BTK, chosen_BTK, 0), "psum")
    B, T, _ = ids_BTK.shape
    b, t = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None]
    outside_BTK = jnp.where(is_local_BTK, rows_BTK, V)  # dropped: there is no row V
    others_BTV = logits_BTV.at[b, t, outside_BTK].set(EXCLUDED, mode="drop")
    largest_BT = sharding.largest(others_BTV.max(axis=-1))
    total_BT = reduce(jnp.exp(others_BTV - largest_BT[..., None]).sum(axis=-1), "psum")
    rest_BT = jnp.log(total_BT) + largest_BT
    return jnp.concatenate([chosen_BTK, rest_BT[..., None]], axis=-1)
