"""How the next token is chosen from logits, for many requests at once, each with parameters of its own.

B requests, V vocabulary, E entries. Every rule acts on a row alone and is the identity where its parameter is neutral,
so a request's tokens do not depend on its neighbours; randomness depends on (seed, position) alone. Nothing is sorted:
the thresholds of top-k and top-p are found by bisection over the 32 bits of a float, exact and the same everywhere.

Order: penalties and bias, temperature, top-k, top-p, min-p, draw. Repetition penalty: CTRL (arXiv 1909.05858) over
prompt and output; presence and frequency: OpenAI's, over the output. min-p: arXiv 2407.01082.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ladder_jax.config import ConfigError


class SamplingParams(NamedTuple):
    """Sampling parameters, arrays [B]; the defaults of `make_params` leave the model's distribution alone and are greedy."""

    temperature: jax.Array  # 0: the likeliest token
    top_k: jax.Array  # int32; 0: all
    top_p: jax.Array  # in (0, 1]
    min_p: jax.Array  # of the likeliest token's probability, in [0, 1)
    repetition_penalty: jax.Array  # above 0; 1: none
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array  # uint32
    bias_ids: (
        jax.Array
    )  # int32 [B, E]; added to the logits of these ids (padding: 0, with a bias of 0)
    bias: jax.Array  # float32 [B, E]


ACCEPTED = {  # name -> (default, test, what is accepted)
    "temperature": (0.0, lambda x: 0 <= x < float("inf"), "0 (greedy) or more"),
    "top_k": (0, lambda x: x >= 0 and x == int(x), "0 (all) or more"),
    "top_p": (1.0, lambda x: 0 < x <= 1, "above 0, up to 1"),
    "min_p": (0.0, lambda x: 0 <= x < 1, "from 0 to below 1"),
    "repetition_penalty": (1.0, lambda x: 0 < x < float("inf"), "above 0 (1: none)"),
    "presence_penalty": (0.0, lambda x: -100 <= x <= 100, "from -100 to 100"),
    "frequency_penalty": (0.0, lambda x: -100 <= x <= 100, "from -100 to 100"),
    "seed": (0, lambda x: 0 <= x < 2**32 and x == int(x), "from 0 to 2 ** 32 - 1"),
}


def make_params(logit_bias=None, entries=0, vocabulary=None, **given):
    """The `SamplingParams` of one request, NumPy arrays of one row ([1], and [1, entries] for `bias`, {id: value}).

    Raises ConfigError where a value is not accepted.
    """
    values = {}
    for name, (default, accepts, accepted) in ACCEPTED.items():
        value = given.pop(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float, np.number))
            or not accepts(value)
        ):
            raise ConfigError(
                f"{name}={value!r} is not accepted: it must be {accepted}"
            )
        kind = {"top_k": np.int32, "seed": np.uint32}.get(name, np.float32)
        values[name] = np.asarray(
            [min(value, 2**31 - 1) if kind is np.int32 else value], kind
        )
    if given:
        raise ConfigError(
            f"{next(iter(given))} is not a sampling parameter: it must be one of "
            f"{', '.join(ACCEPTED)} or logit_bias"
        )
    bias = dict(logit_bias or {})
    if len(bias) > entries:
        raise ConfigError(
            f"logit_bias has {len(bias)} entries, which is not accepted: it must have at most {entries}"
        )
    for token, value in bias.items():
        if not 0 <= token < (vocabulary or 2**31) or not -1e4 <= value <= 1e4:
            raise ConfigError(
                f"logit_bias={{{token}: {value}}} is not accepted: it must be an id below {vocabulary}, "
                "and a value from -10000 to 10000"
            )
    pad = [0] * (entries - len(bias))
    return SamplingParams(
        **values,
        bias_ids=np.asarray([[*bias, *pad]], np.int32),
        bias=np.asarray([[*bias.values(), *pad]], np.float32),
    )


# What a request has said so far, [B, V] int32: 1 where the prompt has the id, plus 2 for each time it was generated.


def prompt_history(tokens_BT, vocab_size):
    """The history of prompts; ids out of range (padding) are skipped."""
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    return (
        jnp.zeros((tokens_BT.shape[0], vocab_size), jnp.int32)
        .at[rows_B1, tokens_BT]
        .set(1, mode="drop")
    )


def update_history(history_BV, token_B, said_B):
    """`history` with one more token for the requests of which `said`."""
    return history_BV.at[jnp.arange(token_B.size), token_B].add(
        2 * said_B.astype(jnp.int32)
    )


def run_always(predicate, function, value):
    """Computes `function(value)` whether or not it is asked for: for GPUs, where a branch waits for the host."""
    return function(value)


def run_if(predicate, function, value):
    """`function(value)` where a scalar predicate says so, else `value`: for rules that change nothing if unasked."""
    return lax.cond(predicate, function, lambda value: value, value)


def likeliest(logits_BV):
    """The id [B] int32 of every row's largest logit, the first among equals (some id where a row has NaNs).

    That is argmax, whose one pass over two values at a time XLA:CPU computes four times slower than two passes.
    """
    V = logits_BV.shape[1]
    top_B1 = logits_BV.max(axis=1, keepdims=True)
    return jnp.where(logits_BV == top_B1, jnp.arange(V, dtype=jnp.int32), V - 1).min(
        axis=1
    )


def sample_tokens(logits_BV, params, history_BV, position_B, vocabulary, maybe=run_if):
    """The next token [B] int32 of every request.

    Args:
      logits_BV: float32; ids from `vocabulary` on, which no token has, are never taken.
      params, history_BV: of the requests, see above.
      position_B: where in its sequence the chosen token will stand.
      maybe: `run_if` or `run_always`, equal in result.
    """
    p = params
    logits_BV = jnp.where(
        jnp.arange(logits_BV.shape[1]) < vocabulary, logits_BV, -jnp.inf
    )
    changed_B = (
        (p.repetition_penalty != 1)
        | (p.presence_penalty != 0)
        | (p.frequency_penalty != 0)
        | (p.bias != 0).any(axis=1)
    )
    logits_BV = maybe(changed_B.any(), lambda x: adjust(x, p, history_BV), logits_BV)
    greedy_B = likeliest(logits_BV)

    def draw(greedy_B):
        scaled_BV = logits_BV / jnp.where(p.temperature > 0, p.temperature, 1)[:, None]
        scaled_BV = maybe((p.top_k > 0).any(), lambda x: top_k(x, p.top_k), scaled_BV)
        scaled_BV = maybe((p.top_p < 1).any(), lambda x: top_p(x, p.top_p), scaled_BV)
        least_B1 = scaled_BV.max(axis=1, keepdims=True) + jnp.log(p.min_p)[:, None]
        scaled_BV = jnp.where(scaled_BV < least_B1, -jnp.inf, scaled_BV)
        noise_BV = jax.vmap(
            lambda seed, position: jax.random.gumbel(
                jax.random.fold_in(jax.random.key(seed), position), scaled_BV.shape[1:]
            )
        )(p.seed, position_B)
        return jnp.where(p.temperature > 0, likeliest(scaled_BV + noise_BV), greedy_B)

    return maybe((p.temperature > 0).any(), draw, greedy_B)


def adjust(logits_BV, params, history_BV):
    """Logits after penalties and bias."""
    p = params
    said_BV, times_BV = history_BV > 0, (history_BV >> 1).astype(jnp.float32)
    factor_BV = jnp.where(
        logits_BV > 0, 1 / p.repetition_penalty[:, None], p.repetition_penalty[:, None]
    )
    logits_BV = jnp.where(said_BV, logits_BV * factor_BV, logits_BV)
    logits_BV = (
        logits_BV
        - p.frequency_penalty[:, None] * times_BV
        - p.presence_penalty[:, None] * (times_BV > 0)
    )
    return logits_BV.at[jnp.arange(len(logits_BV))[:, None], p.bias_ids].add(p.bias)


def top_k(logits_BV, k_B):
    """Logits with all but the k largest of a row (and those equal to the k-th) at -inf; k 0 keeps the row."""
    kept_BV = _head(logits_BV, jnp.ones_like(logits_BV), k_B.astype(jnp.float32))
    return jnp.where(kept_BV | (k_B == 0)[:, None], logits_BV, -jnp.inf)


def top_p(logits_BV, p_B):
    """Logits with all but the fewest likeliest that together have probability p at -inf (arXiv 1904.09751)."""
    kept_BV = _head(logits_BV, jax.nn.softmax(logits_BV, axis=1), p_B)
    return jnp.where(kept_BV | (p_B >= 1)[:, None], logits_BV, -jnp.inf)


def _head(values_BV, weights_BV, enough_B):
    """Which of a row's values, largest first (of equals, the first), together reach a weight of `enough`; else all.

    Bisects the threshold over the order that a float's bits have as an integer, then the last index among its equals.
    """
    bits_BV = lax.bitcast_convert_type(
        jnp.where(values_BV == 0, 0, values_BV), jnp.uint32
    )  # -0 equals 0
    order_BV = jnp.where(bits_BV >> 31, ~bits_BV, bits_BV | jnp.uint32(1 << 31))
    reached = lambda kept_BV: jnp.where(kept_BV, weights_BV, 0).sum(axis=1) >= enough_B

    def search(bits, fits, start_B):
        def bit(i, found_B):
            tried_B = found_B | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
            return jnp.where(fits(tried_B[:, None]), tried_B, found_B)

        return lax.fori_loop(0, bits, bit, start_B)[:, None]

    zero_B, index_V = (
        jnp.zeros(values_BV.shape[0], jnp.uint32),
        jnp.arange(values_BV.shape[1], dtype=jnp.uint32),
    )
    least_B1 = search(32, lambda tried_B1: reached(order_BV >= tried_B1), zero_B)
    above_BV, equal_BV = order_BV > least_B1, order_BV == least_B1
    # the largest number of equals' indices that is not yet enough; the one after it is the last to be kept
    short_B1 = search(
        max(index_V.size.bit_length(), 1),
        lambda tried_B1: ~reached(above_BV | (equal_BV & (index_V < tried_B1))),
        zero_B,
    )
    return above_BV | (equal_BV & (index_V <= short_B1))


def log_probabilities(logits_BV, token_B, count, vocabulary):
    """The model's own log-probability, before any rule, of `token` [B], and the `count` likeliest ids and theirs."""
    logits_BV = jnp.where(
        jnp.arange(logits_BV.shape[1]) < vocabulary, logits_BV, -jnp.inf
    )
    total_B = jax.nn.logsumexp(logits_BV, axis=1)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] - total_B
    if not count:
        return (
            chosen_B,
            jnp.zeros((len(token_B), 0), jnp.int32),
            jnp.zeros((len(token_B), 0)),
        )
    top_BE, ids_BE = lax.top_k(logits_BV, count)
    return chosen_B, ids_BE.astype(jnp.int32), top_BE - total_B[:, None]
