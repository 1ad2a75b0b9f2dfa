"""Chooses the next token of many requests at once, each with parameters of its own.

Every rule works on one row alone and leaves it as it is if its parameter is neutral.
So the tokens of a request do not depend on its neighbours. Randomness depends on (seed,
position) alone. Nothing is sorted: top-k and top-p find their threshold by bisection
over the 32 bits of a float, which is exact and has the same result everywhere.

The rules apply in this order: penalties and bias, banned ids, temperature, top-k,
top-p, min-p, draw. The repetition penalty (CTRL, arXiv 1909.05858) looks at prompt and
output; the presence and the frequency penalty (OpenAI's API) look at the output. min-p:
arXiv 2407.01082.

To add a sampling parameter, touch this file alone: a field of `SamplingParams`, a row
of `PARAMETERS` (its default, type and limits), and its rule in `sample_tokens`.

B requests (rows), V vocabulary, T prompt tokens, E entries of a list.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ladder_jax.config import ConfigError, require

# A field that is a NumPy array on the host and a jax.Array in a program.
Array = Any


class SamplingParams(NamedTuple):
    """Sampling parameters, arrays [B]; NumPy arrays on the host.

    The defaults of `make_params` are greedy and keep the model's distribution.
    """

    temperature: Array  # float32; 0: the likeliest token
    top_k: Array  # int32; 0: all
    top_p: Array  # float32, in (0, 1]
    min_p: Array  # float32, share of the likeliest token's probability, in [0, 1)
    repetition_penalty: Array  # float32, above 0; 1: none
    presence_penalty: Array  # float32
    frequency_penalty: Array  # float32
    seed: Array  # uint32
    bias_ids: Array  # int32 [B, E]: the ids of logit_bias; padding: 0
    bias: Array  # float32 [B, E]: added to the logits of these ids; padding: 0


class Parameter(NamedTuple):
    """A sampling parameter: its default, its type and the values that it accepts."""

    default: float  # neutral: the rule leaves every row as it is
    dtype: Any  # of its array
    accepts: Callable[[float], bool]  # is never called with NaN or an infinity
    text: str  # the accepted values, for messages


# The smallest temperature and repetition penalty: a logit that is divided by a much
# smaller number overflows a float32.
SMALLEST = float(np.float32(1e-6))

PARAMETERS = {
    "temperature": Parameter(
        0.0,
        np.float32,
        lambda x: x == 0 or x >= SMALLEST,
        "0 (greedy) or more, and then at least 1e-6",
    ),
    "top_k": Parameter(0, np.int32, lambda x: x >= 0, "0 (all) or more"),
    "top_p": Parameter(1.0, np.float32, lambda x: 0 < x <= 1, "above 0, up to 1"),
    "min_p": Parameter(0.0, np.float32, lambda x: 0 <= x < 1, "from 0 to below 1"),
    "repetition_penalty": Parameter(
        1.0, np.float32, lambda x: SMALLEST <= x <= 1e6, "from 1e-6 to 1e6 (1: none)"
    ),
    "presence_penalty": Parameter(
        0.0, np.float32, lambda x: -100 <= x <= 100, "from -100 to 100"
    ),
    "frequency_penalty": Parameter(
        0.0, np.float32, lambda x: -100 <= x <= 100, "from -100 to 100"
    ),
    "seed": Parameter(0, np.uint32, lambda x: 0 <= x < 2**32, "from 0 to 2 ** 32 - 1"),
}
MOST_BIAS = 1e4  # the largest absolute value in logit_bias


# ------------------------------------------------------- parameters, on the host


def make_params(
    logit_bias: Mapping[Any, Any] | None = None,
    max_logit_bias: int = 0,
    vocabulary: int | None = None,
    **options: Any,
) -> SamplingParams:
    """Checks the sampling options of one request and returns them as NumPy arrays.

    Args:
      logit_bias: {id: value to add to its logit}; an id may be text, as in JSON.
      max_logit_bias: E, the most ids that `logit_bias` may have.
      vocabulary: ids must be below it.
      options: values for names in PARAMETERS, Python's numbers or NumPy's.
    Returns one row: arrays [1], and [1, E] for the bias.
    Raises ConfigError if a value is not accepted.
    """
    for name in options:
        if name not in PARAMETERS:
            raise ConfigError(
                f"{name} is not a sampling parameter: it must be one of "
                f"{', '.join(PARAMETERS)} or logit_bias"
            )
    params: dict[str, Any] = {
        name: _check_value(name, options.get(name, parameter.default))
        for name, parameter in PARAMETERS.items()
    }
    bias = _check_bias(logit_bias, max_logit_bias, vocabulary)
    padding = [0] * (max_logit_bias - len(bias))
    params["bias_ids"] = np.asarray([[*bias, *padding]], np.int32)
    params["bias"] = np.asarray([[*bias.values(), *padding]], np.float32)
    return SamplingParams(**params)


def neutral_params(count: int, max_logit_bias: int) -> SamplingParams:
    """Returns the default parameters of `count` requests, JAX arrays."""
    params: dict[str, Any] = {
        name: jnp.full(count, parameter.default, parameter.dtype)
        for name, parameter in PARAMETERS.items()
    }
    params["bias_ids"] = jnp.zeros((count, max_logit_bias), jnp.int32)
    params["bias"] = jnp.zeros((count, max_logit_bias), jnp.float32)
    return SamplingParams(**params)


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number of Python or NumPy, not a bool."""
    if isinstance(value, bool):
        return False
    if isinstance(value, (int, np.integer)):
        return True
    return isinstance(value, (float, np.floating)) and math.isfinite(value)


def _check_value(name: str, value: Any) -> np.ndarray:
    """Returns a parameter as an array [1]; ConfigError if it is not accepted."""
    parameter = PARAMETERS[name]
    # A comparison with a float16 can overflow. Python's numbers do not.
    number = value.item() if isinstance(value, np.generic) else value
    is_whole = np.issubdtype(parameter.dtype, np.integer)
    kind = "a whole number" if is_whole else "a number"
    require(is_number(number), name, value, f"{kind}, {parameter.text}")
    require(parameter.accepts(number), name, value, parameter.text)
    if is_whole:
        require(number == int(number), name, value, f"{kind}, {parameter.text}")
        # top_k has no upper limit: the largest int32 keeps all ids, too.
        number = min(int(number), np.iinfo(parameter.dtype).max)
        return np.asarray([number], parameter.dtype)
    rounded = _float32(number)
    is_accepted = math.isfinite(rounded) and parameter.accepts(rounded)
    require(
        is_accepted, name, value, f"{parameter.text}, also after rounding to float32"
    )
    return np.asarray([rounded], parameter.dtype)


def _float32(value: Any) -> float:
    """Returns a number rounded to float32; infinity if it is too large."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(value)))
    except OverflowError:
        return math.inf


def _check_bias(
    logit_bias: Any, max_logit_bias: int, vocabulary: int | None
) -> dict[int, float]:
    """Returns `logit_bias` with int keys; raises ConfigError if it is not accepted."""
    if logit_bias is None:
        return {}
    is_mapping = isinstance(logit_bias, Mapping)
    require(is_mapping, "logit_bias", logit_bias, "None or a dict {id: value}")
    if len(logit_bias) > max_logit_bias:
        raise ConfigError(
            f"logit_bias has {len(logit_bias)} entries, which is not accepted: "
            f"it must have at most {max_logit_bias}"
        )
    last_id = (vocabulary or 2**31) - 1
    bias: dict[int, float] = {}
    for key, value in logit_bias.items():
        token = _token_id(key)
        if token is None or not 0 <= token <= last_id:
            require(False, "logit_bias id", key, f"a token id from 0 to {last_id}")
        assert token is not None
        if token in bias:
            raise ConfigError(f"logit_bias has the id {token} twice")
        is_accepted = is_number(value) and abs(value) <= MOST_BIAS
        accepted = f"a number, from {-MOST_BIAS:g} to {MOST_BIAS:g}"
        require(is_accepted, f"logit_bias[{key!r}]", value, accepted)
        bias[token] = float(value)
    return bias


def _token_id(key: object) -> int | None:
    """Returns a key of logit_bias as an id, or None; JSON has ids as text."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        return int(key)
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return int(key)
    return None


# --------------------------------------------------------------------- history
# The history of a request is int32 [V]: 1 for an id that its prompt has, plus 2 for
# each time that the id was generated.


def prompt_history(
    tokens_BT: jax.Array, vocab_size: int, prompt_B: jax.Array
) -> jax.Array:
    """Returns the history [B, V] of prompts; ids outside the vocabulary pad them.

    prompt_B: how many tokens of a row are the prompt; output follows.
    """
    count, T = tokens_BT.shape
    rows_B1 = jnp.arange(count)[:, None]
    is_output_BT = jnp.arange(T) >= prompt_B[:, None]
    history_BV = jnp.zeros((count, vocab_size), jnp.int32)
    prompt_BT = jnp.where(is_output_BT, vocab_size, tokens_BT)
    history_BV = history_BV.at[rows_B1, prompt_BT].set(1, mode="drop")
    outputs_BT = 2 * is_output_BT.astype(jnp.int32)
    return history_BV.at[rows_B1, tokens_BT].add(outputs_BT, mode="drop")


def update_history(
    history_BV: jax.Array, token_B: jax.Array, emits_B: jax.Array
) -> jax.Array:
    """Adds a generated token to the history of every row where `emits_B` is True."""
    rows_B = jnp.arange(token_B.size)
    return history_BV.at[rows_B, token_B].add(2 * emits_B.astype(jnp.int32))


# ------------------------------------------------------------------- the rules

# The type of `run_if` and `run_always`.
RunRule = Callable[[jax.Array, Callable[[Any], Any], Any], Any]


def run_if(predicate: jax.Array, function: Callable[[Any], Any], value: Any) -> Any:
    """Returns `function(value)` if `predicate`, a bool scalar, is True; else `value`.

    The branch saves the time of a rule that changes no row.
    """
    return lax.cond(predicate, function, lambda value: value, value)


def run_always(predicate: jax.Array, function: Callable[[Any], Any], value: Any) -> Any:
    """Returns `function(value)`, whatever `predicate` is.

    On GPUs a branch waits for the host, so `run_always` replaces `run_if` there. The
    tokens stay the same: a rule changes no row if its predicate is False.
    """
    return function(value)


def sample_tokens(
    logits_BV: jax.Array,
    params: SamplingParams,
    history_BV: jax.Array,
    position_B: jax.Array,
    vocabulary: int,
    run: RunRule = run_if,
    banned_BE: jax.Array | None = None,
) -> jax.Array:
    """Returns the next token [B] int32 of every request.

    Args:
      logits_BV: float32; ids from `vocabulary` on are padding and are never sampled.
      params: the requests' parameters.
      history_BV: the requests' histories, see `prompt_history`.
      position_B: the index of the next token in its sequence.
      run: `run_if` or `run_always`; the tokens are the same.
      banned_BE: int32, ids that are not sampled; negative numbers are no ids.
    """
    p = params
    logits_BV = _without_padding(logits_BV, vocabulary)
    is_adjusted_B = (
        (p.repetition_penalty != 1)
        | (p.presence_penalty != 0)
        | (p.frequency_penalty != 0)
        | (p.bias != 0).any(axis=1)
    )

    def adjust_logits(x_BV: jax.Array) -> jax.Array:
        return adjust(x_BV, p, history_BV)

    logits_BV = run(is_adjusted_B.any(), adjust_logits, logits_BV)
    if banned_BE is not None:
        ban_ids = functools.partial(ban, ids_BE=banned_BE)
        logits_BV = run((banned_BE >= 0).any(), ban_ids, logits_BV)
    greedy_B = argmax(logits_BV)

    def draw(greedy_B: jax.Array) -> jax.Array:
        temperature_B = jnp.where(p.temperature > 0, p.temperature, 1)
        x_BV = logits_BV / temperature_B[:, None]
        x_BV = run((p.top_k > 0).any(), lambda x: top_k(x, p.top_k), x_BV)
        x_BV = run((p.top_p < 1).any(), lambda x: top_p(x, p.top_p), x_BV)
        x_BV = min_p(x_BV, p.min_p)
        noise_BV = gumbel_noise(p.seed, position_B, x_BV.shape[1])
        return jnp.where(p.temperature > 0, argmax(x_BV + noise_BV), greedy_B)

    return run((p.temperature > 0).any(), draw, greedy_B)


def argmax(logits_BV: jax.Array) -> jax.Array:
    """Returns the id [B] int32 of every row's largest logit; of equals, the first.

    A row with NaNs gets some id below V. On CPUs, XLA runs these two passes over one
    array four times faster than the one pass of `jnp.argmax` over values and indices.
    """
    V = logits_BV.shape[1]
    top_B1 = logits_BV.max(axis=1, keepdims=True)
    ids_V = jnp.arange(V, dtype=jnp.int32)
    return jnp.where(logits_BV == top_B1, ids_V, V - 1).min(axis=1)


def gumbel_noise(seed_B: jax.Array, position_B: jax.Array, size: int) -> jax.Array:
    """Returns noise [B, size]: argmax(logits + noise) samples from softmax(logits)."""

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (size,))

    return jax.vmap(noise)(seed_B, position_B)


def adjust(
    logits_BV: jax.Array, params: SamplingParams, history_BV: jax.Array
) -> jax.Array:
    """Returns the logits after the three penalties and the bias."""
    p = params
    seen_BV = history_BV > 0
    times_BV = (history_BV >> 1).astype(jnp.float32)
    penalty_B1 = p.repetition_penalty[:, None]
    factor_BV = jnp.where(logits_BV > 0, 1 / penalty_B1, penalty_B1)
    logits_BV = jnp.where(seen_BV, logits_BV * factor_BV, logits_BV)
    logits_BV = (
        logits_BV
        - p.frequency_penalty[:, None] * times_BV
        - p.presence_penalty[:, None] * (times_BV > 0)
    )
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    return logits_BV.at[rows_B1, p.bias_ids].add(p.bias)


def ban(logits_BV: jax.Array, ids_BE: jax.Array) -> jax.Array:
    """Sets the logits of a row's ids to -inf; negative numbers are no ids."""
    rows_B1, V = jnp.arange(len(logits_BV))[:, None], logits_BV.shape[1]
    # JAX drops writes from V on. It would take -1 for the last id.
    ids_BE = jnp.where(ids_BE < 0, V, ids_BE)
    return logits_BV.at[rows_B1, ids_BE].set(-jnp.inf, mode="drop")


def top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Sets all but the k largest logits of a row to -inf; k = 0 keeps all.

    Of equal logits, the first ones stay.
    """
    ones_BV = jnp.ones_like(logits_BV)
    stays_BV = _largest_until(logits_BV, ones_BV, k_B.astype(jnp.float32))
    return jnp.where(stays_BV | (k_B == 0)[:, None], logits_BV, -jnp.inf)


def top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Keeps the likeliest ids, as few as have the total probability p.

    The other logits become -inf. This is nucleus sampling, arXiv 1904.09751.
    """
    probability_BV = jax.nn.softmax(logits_BV, axis=1)
    stays_BV = _largest_until(logits_BV, probability_BV, p_B)
    return jnp.where(stays_BV | (p_B >= 1)[:, None], logits_BV, -jnp.inf)


def min_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Sets ids less likely than p times the likeliest id to -inf."""
    least_B1 = logits_BV.max(axis=1, keepdims=True) + jnp.log(p_B)[:, None]
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _largest_until(
    values_BV: jax.Array, weights_BV: jax.Array, enough_B: jax.Array
) -> jax.Array:
    """Marks a row's largest values, as few as have weights that sum to `enough`.

    Returns bool [B, V]. Of equal values, those with a lower index are marked first. All
    values are marked if their weights do not sum to `enough`.

    1. It maps each float to an integer, so that larger floats have larger integers.
    2. It bisects over these integers for the smallest value that is marked.
    3. It bisects over the indices of that value for the last one that is marked.
    """
    # -0 becomes 0, as the two are equal but have different bits.
    unsigned_zero_BV = jnp.where(values_BV == 0, 0, values_BV)
    bits_BV = lax.bitcast_convert_type(unsigned_zero_BV, jnp.uint32)
    order_BV = jnp.where(bits_BV >> 31, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def is_enough(marked_BV: jax.Array) -> jax.Array:
        return jnp.where(marked_BV, weights_BV, 0).sum(axis=1) >= enough_B

    rows, V = values_BV.shape
    zero_B = jnp.zeros(rows, jnp.uint32)
    index_V = jnp.arange(V, dtype=jnp.uint32)
    threshold_B1 = _bisect(lambda x_B1: is_enough(order_BV >= x_B1), 32, zero_B)
    above_BV, equal_BV = order_BV > threshold_B1, order_BV == threshold_B1

    def is_not_enough_before(index_B1: jax.Array) -> jax.Array:
        return ~is_enough(above_BV | (equal_BV & (index_V < index_B1)))

    # The largest index before which the equal values are not enough: with the value at
    # this index, they are.
    bits = max(V.bit_length(), 1)
    last_B1 = _bisect(is_not_enough_before, bits, zero_B)
    return above_BV | (equal_BV & (index_V <= last_B1))


def _bisect(
    holds: Callable[[jax.Array], jax.Array], bits: int, zero_B: jax.Array
) -> jax.Array:
    """Returns the largest number [B, 1] of `bits` bits for which `holds` is True.

    `holds`: numbers [B, 1] -> bool [B], True up to some number and False above it. The
    result is 0 if it is False for every number.
    """

    def set_bit(i: jax.Array, number_B: jax.Array) -> jax.Array:
        bit = jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32)
        larger_B = number_B | bit
        return jnp.where(holds(larger_B[:, None]), larger_B, number_B)

    return lax.fori_loop(0, bits, set_bit, zero_B)[:, None]


def log_probabilities(
    logits_BV: jax.Array, token_B: jax.Array, count: int, vocabulary: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log-probabilities of the model, before any sampling rule.

    Args:
      logits_BV: float32; ids from `vocabulary` on are padding.
      token_B: the sampled tokens.
      count: E, how many of the likeliest ids to return.
    Returns (log-probabilities of `token_B` [B], the likeliest ids [B, E] int32,
    log-probabilities of these ids [B, E]).
    """
    logits_BV = _without_padding(logits_BV, vocabulary)
    total_B = jax.nn.logsumexp(logits_BV, axis=1)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    logprob_B = logit_B - total_B
    if not count:
        rows = len(token_B)
        return logprob_B, jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0))
    top_BE, ids_BE = lax.top_k(logits_BV, count)
    return logprob_B, ids_BE.astype(jnp.int32), top_BE - total_B[:, None]


def _without_padding(logits_BV: jax.Array, vocabulary: int) -> jax.Array:
    """Sets the logits of ids from `vocabulary` on, which no token has, to -inf."""
    is_token_V = jnp.arange(logits_BV.shape[1]) < vocabulary
    return jnp.where(is_token_V, logits_BV, -jnp.inf)
