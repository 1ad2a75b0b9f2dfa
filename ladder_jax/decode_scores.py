"""Scores a piece of a prompt: how likely the model finds each next token of it.

P prompts, T prompt tokens, C tokens whose logits exist at a time, D model, V
vocabulary, E alternatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax import sampling, sharding
from ladder_jax.decode_state import DecodeSpec
from ladder_jax.model import Transformer, Unstacked, logits
from ladder_jax.sampling import Array

# The logits that exist at a time take about this many bytes on one device.
LOGITS_BYTES = 2**27


class Scores(NamedTuple):
    """Log-probabilities of prompt tokens, of the model alone, before any sampling rule.

    Entry t of a piece is about the prompt's token at index start + t + 1: it is what
    the model expects after the piece's token t. So the last entry of a piece is about
    the first token of the next piece, and the last one of a prompt means nothing.
    """

    logprob: Array  # float32 [P, T]
    top_ids: Array  # int32 [P, T, E]: the likeliest ids
    top_logprobs: Array  # float32 [P, T, E]: their log-probabilities


def score(
    spec: DecodeSpec,
    weights: Transformer | Unstacked,
    x_PTD: jax.Array,
    targets_PT: jax.Array,
) -> Scores:
    """Returns the scores of targets, inside `shard_map`.

    Args:
      x_PTD: the final residual stream, see model.hidden.
      targets_PT: the id after each token; another number stands for no token.
    """
    P, T, _ = x_PTD.shape
    V = spec.model_config.vocab_size
    C = min(max(LOGITS_BYTES // 4 // V, 1), P * T)
    parts = -(-P * T // C)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(P * T, *x.shape[2:])
        x = jnp.pad(x, [(0, parts * C - P * T)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(parts, C, *x.shape[1:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(parts * C, *x.shape[2:])[: P * T]
        return x.reshape(P, T, *x.shape[1:])

    def score_part(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x_CD, target_C = arrays
        logits_1CV = logits(weights, spec.model_config, x_CD[None])
        logits_CV = sharding.gather_vocabulary(logits_1CV)[0]
        return sampling.log_probabilities(
            logits_CV, target_C.clip(0, V - 1), spec.max_logprobs, spec.vocabulary
        )

    results = lax.map(score_part, (split(x_PTD), split(targets_PT)))
    return Scores(*map(join, results))
