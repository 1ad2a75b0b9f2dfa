"""Drafts the next tokens of requests from their own text (prompt lookup decoding).

Text often repeats itself: an answer quotes its prompt, a program its names. If the last
tokens of a request have occurred before, its **draft** is what followed them then. The
model computes the logits of all drafted tokens together, in one pass over its weights.

The draft is a guess, and the tokens stay those of decoding one by one. The next token
of a request depends on the tokens before it, on its parameters and on (seed, position)
alone. So the program samples a token from the logits after the last token, and goes on
to the logits after the draft's first token if the sample is that token, and so on. The
first sample that differs from the draft is the request's next token all the same. With
a draft that is certain of each token, this is the rejection sampling of speculative
decoding (arXiv 2211.17192; 2302.01318), whose samples have the model's distribution.

A pass with drafts costs more than one without: little while reading the weights takes
the time, up to 1 + D times as much with many requests. Each request has a moving mean
of the share of its drafted tokens that are accepted, and a pass has drafts only if they
promise more tokens than they cost.

B requests (rows), S tokens of a row, D drafted tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax.sampling import Array

LONGEST, SHORTEST = 4, 2  # the tokens at a request's end that are looked up
# How many rows a product of activations and weights has if its FLOPs take as long as
# reading the weights. An accelerator's peak FLOP/s in bfloat16 over its bytes/s is 166
# (v5p) to 560 (v6e). For two CPU cores, the number fits the times of a pass with 4
# drafted tokens over one without: 1.5, 1.9 and 3.2 for 1, 4 and 16 requests (`small`).
BALANCE_CPU, BALANCE_ACCELERATOR = 12, 256
FIRST_RATE = 0.75  # of a new request
LEARNING = 0.3  # how much of `rate` the last draft replaces
# How much of the way back to 1 `rate` goes when a draft was not tried: so a request
# tries again, after many passes.
RECOVERY = 1 / 256
NO_TOKEN = -1  # unlike every id


class Drafting(NamedTuple):
    """What the device needs to draft tokens of requests, arrays [B]."""

    tokens: Array  # int32 [B, S]: prompt and output; later entries mean nothing
    allowed: Array  # bool: the request's option `speculate`
    rate: Array  # float32: a moving mean of the accepted share of its drafts


class Drafts(NamedTuple):
    """The drafts of requests."""

    tokens: jax.Array  # int32 [B, D]
    length: jax.Array  # int32 [B]: how many of them are drafted, 0 to D


def empty(count: int, length: int) -> Drafting:
    """Returns the Drafting of rows that belong to no request."""
    return Drafting(
        jnp.zeros((count, length), jnp.int32),
        jnp.zeros(count, bool),
        jnp.zeros(count, jnp.float32),
    )


def with_prompts(drafting: Drafting, prompts_BC: jax.Array, length: int) -> Drafting:
    """Returns the Drafting of new requests with these prompts, C <= S = `length`."""
    missing = length - prompts_BC.shape[1]
    return drafting._replace(tokens=jnp.pad(prompts_BC, [(0, 0), (0, missing)]))


def append(
    drafting: Drafting, position_B: jax.Array, token_B: jax.Array, emits_B: jax.Array
) -> Drafting:
    """Writes a token at its position in every row where `emits_B` is True."""
    rows_B, S = jnp.arange(token_B.size), drafting.tokens.shape[1]
    index_B = jnp.where(emits_B, position_B, S)  # JAX drops a write at S
    tokens_BS = drafting.tokens.at[rows_B, index_B].set(token_B, mode="drop")
    return drafting._replace(tokens=tokens_BS)


def propose(
    drafting: Drafting, position_B: jax.Array, most_B: jax.Array, size: int
) -> Drafts:
    """Returns the drafts of requests whose last token is at `position_B`.

    A draft is what followed the latest of those earlier places where most of the last
    LONGEST tokens occur, counted from the end, and at least SHORTEST. If it would go
    beyond the last token, it goes on as if the text repeated itself from that place.

    most_B: the most tokens of a draft; 0 for rows that are no requests.
    size: D.
    """
    tokens_BS = drafting.tokens
    S = tokens_BS.shape[1]
    index_S, position_B1 = jnp.arange(S), position_B[:, None]
    same_BS = index_S < position_B1
    length_BS = jnp.zeros_like(tokens_BS)
    for back in range(min(LONGEST, S)):
        before_BS = jnp.pad(
            tokens_BS[:, : S - back], [(0, 0), (back, 0)], constant_values=NO_TOKEN
        )
        last_B1 = jnp.take_along_axis(before_BS, position_B1, axis=1, mode="clip")
        same_BS &= (before_BS == last_B1) & (before_BS != NO_TOKEN)
        length_BS += same_BS
    best_B1 = jnp.where(length_BS >= SHORTEST, length_BS * S + index_S, NO_TOKEN).max(
        axis=1, keepdims=True
    )
    place_B1 = best_B1 % S
    period_B1 = jnp.maximum(position_B1 - place_B1, 1)
    source_BD = place_B1 + 1 + jnp.arange(size) % period_B1
    draft_BD = jnp.take_along_axis(tokens_BS, source_BD, axis=1, mode="clip")
    drafts_B = drafting.allowed & (best_B1[:, 0] != NO_TOKEN)
    return Drafts(draft_BD, jnp.where(drafts_B, most_B.clip(0, size), 0))


def least_gain(width: int, size: int, balance: int) -> float:
    """Returns the accepted tokens a request at which drafts of `size` tokens pay.

    A pass over n rows takes a time in proportion to `balance` + n. With drafts it has
    `width` (1 + D) rows instead of `width`, and it must give as many tokens a second.
    """
    return size * width / (balance + width)


def pays(
    drafting: Drafting, drafts: Drafts, runs_B: jax.Array, least: float
) -> jax.Array:
    """Returns a bool scalar: whether a pass should have these drafts.

    Args:
      runs_B: bool, the requests that the pass advances.
      least: see `least_gain`.
    """
    expected = (drafting.rate * drafts.length).sum()
    return (expected > 0) & (expected >= least * runs_B.sum())


def learn(drafting: Drafting, drafts: Drafts, accepted_B: jax.Array) -> Drafting:
    """Updates `rate` after a pass that accepted so many tokens of these drafts."""
    share_B = accepted_B / jnp.maximum(drafts.length, 1)
    rate_B = drafting.rate + (share_B - drafting.rate) * LEARNING
    return drafting._replace(rate=jnp.where(drafts.length > 0, rate_B, drafting.rate))


def recover(drafting: Drafting, drafts: Drafts) -> Drafting:
    """Updates `rate` after a pass without these drafts."""
    rate_B = drafting.rate + (1 - drafting.rate) * RECOVERY
    return drafting._replace(rate=jnp.where(drafts.length > 0, rate_B, drafting.rate))
