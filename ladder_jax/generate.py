"""Text from a model, one token at a time: the readable reference that the decode engine is tested against.

Greedy or sampled, with a key-value cache, on any mesh. Randomness depends on the seed and the position alone.
"""

import functools

import jax
import numpy as np

from ladder_jax import kv_cache, sampling, sharding
from ladder_jax import model as transformer
from ladder_jax.config import ConfigError
from ladder_jax.hardware import xla_options
from ladder_jax.residual import choose


def empty_cache(config, mesh, batch, length):
    """Keys and values for `batch` rows of `length` tokens: a cache.KV [L, B, K, S, H] of zeros in the compute dtype."""
    shape = config.layers, batch, config.kv_heads, length, config.head_dim
    return jax.jit(
        lambda: kv_cache.empty(shape, config.dtype),
        out_shardings=sharding.named_shardings(mesh, sharding.CACHE),
    )()


@functools.lru_cache(maxsize=8)
def make_forward(config, mesh):
    """(model, tokens [B, T], positions [B, T], cache, read=None) -> (logits [B, T, V] float32, cache), compiled; cache
    donated. With `read` [B, R], logits [B, R, V] of these places along T."""

    def local(model, tokens_BT, positions_BT, cache, read_BR):
        x_BTD, cache = transformer.hidden(
            model,
            config,
            tokens_BT,
            positions_BT,
            cache=cache,
            read_BR=read_BR,
            reduction=reduction,
        )
        return transformer.logits(model, config, x_BTD), cache

    reduction = choose.auto_reduction(config, mesh)
    specs = sharding.parameter_specs(transformer.abstract(config))
    cache = sharding.CACHE
    program = sharding.shard_map(
        local,
        mesh,
        (specs, sharding.TOKENS, sharding.TOKENS, cache, sharding.TOKENS),
        (sharding.LOGITS, cache),
    )
    return jax.jit(
        lambda model, tokens_BT, positions_BT, cache, read_BR=None: program(
            model, tokens_BT, positions_BT, cache, read_BR
        ),
        donate_argnums=3,
        compiler_options=xla_options.options(mesh),
    )


@functools.partial(jax.jit, static_argnames="vocabulary")
def sample(logits_V, params, history_BV, position, vocabulary):
    """The next token's id: sampling.sample_tokens for one request."""
    return sampling.sample_tokens(
        logits_V[None], params, history_BV, position[None], vocabulary
    )[0]


def generate(
    model,
    config,
    mesh,
    prompt,
    *,
    max_tokens,
    stop=(),
    vocabulary=None,
    logit_bias=None,
    **options,
):
    """Yields the ids that follow `prompt` (ids), as they are made: at most `max_tokens`, up to one of `stop`, excluded.

    Args:
      model, config, mesh: parameters on `mesh`, their config.Model.
      bias: {id: added to its logit}.
      options: temperature, top_k, top_p, min_p, repetition, presence, frequency, seed (see sampling.SamplingParams).
      vocabulary: ids from here on are padding of the embedding (default: none is).
    Raises ConfigError where the request does not fit the model.
    """
    prompt, room = list(prompt), config.max_length - len(prompt)
    vocabulary = vocabulary or config.vocab_size
    for name, value, ok, accepted in (
        ("prompt", prompt, prompt, "at least one token"),
        (
            "prompt",
            prompt[:8],
            all(0 <= token < vocabulary for token in prompt),
            f"of ids from 0 to {vocabulary - 1}",
        ),
        (
            "prompt",
            f"{len(prompt)} tokens",
            room >= 0,
            f"at most model.max_length={config.max_length} tokens",
        ),
        (
            "max_tokens",
            max_tokens,
            0 <= max_tokens <= room,
            f"from 0 to {room}: model.max_length={config.max_length} less the {len(prompt)} of the prompt",
        ),
    ):
        if not ok:
            raise ConfigError(f"{name}={value} is not accepted: it must be {accepted}")
    logit_bias = dict(logit_bias or {})
    params = sampling.make_params(logit_bias, len(logit_bias), vocabulary, **options)
    return _tokens(
        model, config, mesh, prompt, max_tokens, params, frozenset(stop), vocabulary
    )


def _tokens(model, config, mesh, prompt, max_tokens, params, stop, vocabulary):
    rows = (
        mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]
    )  # every data shard works on a copy
    padded, length = (
        1 << (max(n, 16) - 1).bit_length()
        for n in (len(prompt), len(prompt) + max_tokens)
    )
    forward = make_forward(config, mesh)
    cache = empty_cache(config, mesh, rows, length)
    # A padded prompt writes junk behind its end, which the tokens that come there replace before it can be seen.
    tile = lambda values: np.tile(np.asarray(values, np.int32), (rows, 1))
    logits_B1V, cache = forward(
        model,
        tile([*prompt, *[0] * (padded - len(prompt))]),
        tile(range(padded)),
        cache,
        tile([len(prompt) - 1]),
    )
    history_BV = np.zeros((1, config.vocab_size), np.int32)
    history_BV[0, prompt] = 1
    for position in range(len(prompt), len(prompt) + max_tokens):
        token = int(
            sample(logits_B1V[0, 0], params, history_BV, np.int32(position), vocabulary)
        )
        if token in stop:
            return
        yield token
        history_BV[0, token] += 2
        if position + 1 < len(prompt) + max_tokens:
            logits_B1V, cache = forward(model, tile([token]), tile([position]), cache)
