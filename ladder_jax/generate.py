"""Generates one request, token by token: tests compare the engine with it.

It uses a key-value cache and runs on any mesh. Randomness depends on the seed and the
position alone.

B batch, T tokens, R positions whose logits are computed, V vocabulary. In the shape of
a cache: L layers, K key-value heads, S cache length, H head.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ladder_jax import kv_cache, sampling, sharding
from ladder_jax.config import ConfigError, Model, require
from ladder_jax.hardware import chips, xla_options
from ladder_jax.model import Transformer, hidden, logits
from ladder_jax.residual import choose


def empty_cache(
    model_config: Model, mesh: Mesh, batch: int, length: int, kv_dtype: str = "auto"
) -> kv_cache.KV:
    """Allocates a cache of zeros [L, B, K, S, H] for `batch` rows of `length` tokens.

    kv_dtype: see kv_cache.choose_dtype.
    """
    heads, size = model_config.kv_heads, model_config.head_dim
    shape = model_config.layers, batch, heads, length, size
    platform = chips.platform(mesh)
    dtype = kv_cache.choose_dtype(kv_dtype, model_config.dtype, platform)
    return jax.jit(
        lambda: kv_cache.empty(shape, dtype),
        out_shardings=sharding.named_shardings(mesh, sharding.CACHE),
    )()


@functools.lru_cache(maxsize=8)
def make_forward(model_config: Model, mesh: Mesh) -> Callable[..., Any]:
    """Returns the jitted forward pass over a cache.

    (model, tokens [B, T], positions [B, T], cache, read=None)
      -> (logits [B, T, V] float32, cache)

    The cache is donated. With `read` [B, R], indices along T, the logits are those of
    these tokens alone, [B, R, V].
    """
    reduction = choose.auto_reduction(model_config, mesh)

    def local(
        model: Transformer,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: kv_cache.KV,
        read_BR: jax.Array | None,
    ) -> tuple[jax.Array, kv_cache.KV]:
        x_BTD, cache = hidden(
            model,
            model_config,
            tokens_BT,
            positions_BT,
            cache=cache,
            read_BR=read_BR,
            reduction=reduction,
            twice=chips.doubles_row(mesh),
        )
        return logits(model, model_config, x_BTD), cache

    cache_spec, tokens = sharding.CACHE, sharding.TOKENS

    def forward(
        model: Transformer,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: kv_cache.KV,
        read_BR: jax.Array | None = None,
    ) -> tuple[jax.Array, kv_cache.KV]:
        weights = sharding.parameter_specs(model)
        in_specs = weights, tokens, tokens, cache_spec, tokens
        out_specs = sharding.LOGITS, cache_spec
        program = sharding.shard_map(local, mesh, in_specs, out_specs)
        return program(model, tokens_BT, positions_BT, cache, read_BR)

    return jax.jit(
        forward, donate_argnums=3, compiler_options=xla_options.options(mesh)
    )


@functools.partial(jax.jit, static_argnames="vocabulary")
def sample(
    logits_V: jax.Array,
    params: sampling.SamplingParams,
    history_BV: jax.Array,
    position: jax.Array,
    vocabulary: int,
    banned_BE: jax.Array | None = None,
) -> jax.Array:
    """Returns the next token's id: sampling.sample_tokens for one request (B = 1)."""
    logits_BV, position_B = logits_V[None], position[None]
    token_B = sampling.sample_tokens(
        logits_BV, params, history_BV, position_B, vocabulary, banned_BE=banned_BE
    )
    return token_B[0]


def generate(
    model: Transformer,
    model_config: Model,
    mesh: Mesh,
    prompt: Iterable[int],
    *,
    max_tokens: int,
    min_tokens: int = 0,
    stop_token_ids: Iterable[int] = (),
    vocabulary: int | None = None,
    kv_dtype: str = "auto",
    logit_bias: Mapping[int, float] | None = None,
    **options: Any,
) -> Iterator[int]:
    """Yields the ids that follow `prompt`, one by one.

    Args:
      model: parameters on `mesh`.
      model_config: the model's configuration.
      mesh: the devices.
      prompt: ids.
      max_tokens: the most ids to yield.
      min_tokens: of the first so many ids, none is one of `stop_token_ids`.
      stop_token_ids: ids that end the output and are not part of it.
      vocabulary: ids from this one on are padding of the embedding (default: no id is).
      kv_dtype: of the cache, see kv_cache.choose_dtype.
      logit_bias: {id: value to add to its logit}.
      options: sampling parameters, see sampling.PARAMETERS.
    Raises ConfigError, before the first id, if an argument is not accepted.
    """
    vocabulary = vocabulary or model_config.vocab_size
    prompt = _check_ids("prompt", prompt, vocabulary, most=model_config.max_length)
    room = model_config.max_length - len(prompt)
    limit = f"model.max_length={model_config.max_length}"
    if not prompt:
        raise ConfigError("prompt=[] is not accepted: it must be at least one token")
    if room < 0:
        raise ConfigError(
            f"prompt={len(prompt)} or more tokens is not accepted: it must be at most "
            f"{limit} tokens"
        )
    accepted = f"from 0 to {room}: {limit} less the {len(prompt)} of the prompt"
    _check_count("max_tokens", max_tokens, room, accepted)
    accepted = f"an integer from 0 to max_tokens={max_tokens}"
    _check_count("min_tokens", min_tokens, max_tokens, accepted)
    stops = frozenset(
        _check_ids("stop_token_ids", stop_token_ids, vocabulary, most=vocabulary)
    )
    entries = len(logit_bias) if isinstance(logit_bias, Mapping) else 0
    params = sampling.make_params(logit_bias, entries, vocabulary, **options)
    tokens = _generate_ids(
        model,
        model_config,
        mesh,
        prompt,
        max_tokens,
        params,
        vocabulary,
        kv_dtype,
        sorted(stops),
        min_tokens,
    )
    return _until_stop_id(tokens, stops)


def _check_ids(name: str, ids: Iterable[int], vocabulary: int, most: int) -> list[int]:
    """Returns the first `most` + 1 ids, since the iterable may never end, as a list.

    Raises ConfigError unless they are ids of the vocabulary.
    """
    accepted = f"of ids from 0 to {vocabulary - 1}"
    is_list = isinstance(ids, Iterable) and not isinstance(ids, (str, bytes, dict))
    require(is_list, name, ids, accepted)
    ids = list(itertools.islice(ids, most + 1))
    for token in ids:
        is_int = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        require(is_int and 0 <= token < vocabulary, name, ids[:8], accepted)
    return [int(token) for token in ids]


def _check_count(name: str, value: Any, most: int, accepted: str) -> None:
    """Raises ConfigError unless `value` is a whole number from 0 to `most`."""
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(is_int and 0 <= value <= most, name, value, accepted)


def _until_stop_id(tokens: Iterator[int], stops: frozenset[int]) -> Iterator[int]:
    """Yields the ids that come before the first stop id."""
    for token in tokens:
        if token in stops:
            return
        yield token


def _generate_ids(
    model: Transformer,
    model_config: Model,
    mesh: Mesh,
    prompt: list[int],
    max_tokens: int,
    params: sampling.SamplingParams,
    vocabulary: int,
    kv_dtype: str,
    stops: list[int],
    min_tokens: int,
) -> Iterator[int]:
    """Yields `max_tokens` ids, stop ids included; the arguments have been checked."""
    if not max_tokens:
        return
    end = len(prompt) + max_tokens
    padded = _power_of_two(len(prompt))
    forward = make_forward(model_config, mesh)
    rows = sharding.batch_shards(mesh)
    cache = empty_cache(model_config, mesh, rows, _power_of_two(end), kv_dtype)
    tile = functools.partial(same_rows, mesh)
    # The padding of a prompt has keys and values, too. Each generated token overwrites
    # those at its position before any token attends to them.
    logits_B1V, cache = forward(
        model,
        tile([*prompt, *[0] * (padded - len(prompt))]),
        tile(range(padded)),
        cache,
        tile([len(prompt) - 1]),
    )
    history_BV = np.zeros((1, model_config.vocab_size), np.int32)
    history_BV[0, prompt] = 1
    banned_BE = np.asarray([stops], np.int32) if min_tokens else None
    for position in range(len(prompt), end):
        if banned_BE is not None and position == len(prompt) + min_tokens:
            banned_BE = np.full_like(banned_BE, -1)  # no ids
        token = int(
            sample(
                logits_B1V[0, 0],
                params,
                history_BV,
                np.int32(position),
                vocabulary,
                banned_BE,
            )
        )
        yield token
        history_BV[0, token] += 2
        if position + 1 < end:
            logits_B1V, cache = forward(model, tile([token]), tile([position]), cache)


def same_rows(mesh: Mesh, values: Sequence[int]) -> np.ndarray:
    """Returns ids or positions [B, T] in which each data shard has the same row."""
    return np.tile(np.asarray(values, np.int32), (sharding.batch_shards(mesh), 1))


def _power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count` and 16."""
    return 1 << (max(count, 16) - 1).bit_length()
