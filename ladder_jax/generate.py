"""Text from a model, one token at a time: the readable reference that the decode engine is tested against.

Greedy or sampled, with a key-value cache, on any mesh. Randomness depends on the seed and the position alone.
"""
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from ladder_jax import cache as kv
from ladder_jax import checkpoint, choice, sampling, schedule, sharding, targets, tokenizer
from ladder_jax import config as configuration
from ladder_jax import model as transformer
from ladder_jax.config import ConfigError


def empty_cache(config, mesh, batch, length):
    """Keys and values for `batch` rows of `length` tokens: a cache.KV [L, B, K, S, H] of zeros in the compute dtype."""
    shape = config.layers, batch, config.kv_heads, length, config.head_dim
    return jax.jit(lambda: kv.empty(shape, config.dtype), out_shardings=sharding.named(mesh, sharding.CACHE))()


@functools.lru_cache(maxsize=8)
def make_forward(config, mesh):
    """(model, tokens [B, T], positions [B, T], cache, read=None) -> (logits [B, T, V] float32, cache), compiled; cache
    donated. With `read` [B, R], logits [B, R, V] of these places along T."""
    def local(model, tokens_BT, positions_BT, cache, read_BR):
        x_BTD, cache = transformer.hidden(model, config, tokens_BT, positions_BT, cache=cache, read_BR=read_BR,
                                          reduction=reduction)
        return transformer.logits(model, config, x_BTD), cache

    reduction = choice.auto(config, mesh)
    specs = sharding.parameter_specs(jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0)))
    cache = sharding.CACHE
    program = sharding.shard_map(local, mesh, (specs, sharding.TOKENS, sharding.TOKENS, cache, sharding.TOKENS),
                                 (sharding.LOGITS, cache))
    return jax.jit(lambda model, tokens_BT, positions_BT, cache, read_BR=None: program(
        model, tokens_BT, positions_BT, cache, read_BR), donate_argnums=3, compiler_options=targets.options(mesh))


@functools.partial(jax.jit, static_argnames="vocabulary")
def sample(logits_V, params, history_BV, position, vocabulary):
    """The next token's id: sampling.choose for one request."""
    return sampling.choose(logits_V[None], params, history_BV, position[None], vocabulary)[0]


def generate(model, config, mesh, prompt, *, max_tokens, stop=(), vocabulary=None, bias=None, **options):
    """Yields the ids that follow `prompt` (ids), as they are made: at most `max_tokens`, up to one of `stop`, excluded.

    Args:
      model, config, mesh: parameters on `mesh`, their config.Model.
      bias: {id: added to its logit}.
      options: temperature, top_k, top_p, min_p, repetition, presence, frequency, seed (see sampling.Params).
      vocabulary: ids from here on are padding of the embedding (default: none is).
    Raises ConfigError where the request does not fit the model.
    """
    prompt, room = list(prompt), config.max_length - len(prompt)
    vocabulary = vocabulary or config.vocab_size
    for name, value, ok, accepted in (
            ("prompt", prompt, prompt, "at least one token"),
            ("prompt", prompt[:8], all(0 <= token < vocabulary for token in prompt),
             f"of ids from 0 to {vocabulary - 1}"),
            ("prompt", f"{len(prompt)} tokens", room >= 0, f"at most model.max_length={config.max_length} tokens"),
            ("max_tokens", max_tokens, 0 <= max_tokens <= room,
             f"from 0 to {room}: model.max_length={config.max_length} less the {len(prompt)} of the prompt")):
        if not ok:
            raise ConfigError(f"{name}={value} is not accepted: it must be {accepted}")
    bias = dict(bias or {})
    params = sampling.params(bias, len(bias), vocabulary, **options)
    return _tokens(model, config, mesh, prompt, max_tokens, params, frozenset(stop), vocabulary)


def _tokens(model, config, mesh, prompt, max_tokens, params, stop, vocabulary):
    rows = mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]      # every data shard works on a copy
    padded, length = (1 << (max(n, 16) - 1).bit_length() for n in (len(prompt), len(prompt) + max_tokens))
    forward = make_forward(config, mesh)
    cache = empty_cache(config, mesh, rows, length)
    # A padded prompt writes junk behind its end, which the tokens that come there replace before it can be seen.
    tile = lambda values: np.tile(np.asarray(values, np.int32), (rows, 1))
    logits_B1V, cache = forward(model, tile([*prompt, *[0] * (padded - len(prompt))]), tile(range(padded)), cache,
                                tile([len(prompt) - 1]))
    history_BV = np.zeros((1, config.vocab_size), np.int32)
    history_BV[0, prompt] = 1
    for position in range(len(prompt), len(prompt) + max_tokens):
        token = int(sample(logits_B1V[0, 0], params, history_BV, np.int32(position), vocabulary))
        if token in stop:
            return
        yield token
        history_BV[0, token] += 2
        if position + 1 < len(prompt) + max_tokens:
            logits_B1V, cache = forward(model, tile([token]), tile([position]), cache)


class Loaded(NamedTuple):
    """A checkpoint, ready for use: `model` is a Flax module, whose arrays are the parameters."""
    model: transformer.Transformer
    config: configuration.Config
    tokenizer: tokenizer.Tokenizer
    mesh: Any

    def generate(self, prompt, *, max_tokens=None, **options):
        """Yields text as it is made. max_tokens: default 200, or as many as there is room for; options: those of
        `generate.generate`."""
        ids = self.tokenizer.prompt(prompt)
        if max_tokens is None:
            max_tokens = max(min(200, self.config.model.max_length - len(ids)), 0)
        stream = self.tokenizer.stream()
        for token in generate(self.model, self.config.model, self.mesh, ids, max_tokens=max_tokens,
                              stop=(self.tokenizer.eos,), vocabulary=self.tokenizer.size, **options):
            yield stream.push(token)
        yield stream.flush()

    def logits(self, text):
        """Logits [T, V] float32 after every token of `text`, and the tokens' ids."""
        ids = self.tokenizer.prompt(text)
        rows = self.mesh.shape[sharding.DATA] * self.mesh.shape[sharding.FSDP]
        cache = empty_cache(self.config.model, self.mesh, rows, len(ids))
        tile = lambda values: np.tile(np.asarray(values, np.int32), (rows, 1))
        logits, _ = make_forward(self.config.model, self.mesh)(self.model, tile(ids), tile(range(len(ids))), cache)
        return logits[0, :, :self.tokenizer.size], ids


def load(path, *, step=None, mesh=None, devices=None):
    """A checkpoint's model, config and tokenizer, in one call.

    Args:
      path: a run's folder, its checkpoints folder, or one step's.
      step: which checkpoint (default: the newest that can be read).
      mesh: a config.Mesh to shard the model over (default: one device; a desync model's tensor axis, which is a part
        of what it is, stays).
      devices: which devices (default: as many of jax.devices() as the mesh takes).
    Raises ConfigError or ValueError where there is no such checkpoint or it does not fit the mesh.
    """
    meta = checkpoint.read_meta(path, step)
    config = configuration.from_dict(meta["config"])
    local = schedule.parse(config.model.residual, config.model.layers).local
    trained = meta.get("tensor", 1)
    mesh = mesh or configuration.Mesh(data=1, tensor=trained if local else 1)
    if devices is None and -1 not in (mesh.data, mesh.fsdp, mesh.tensor):
        count = mesh.data * mesh.fsdp * mesh.tensor
        if count > jax.device_count():
            raise ConfigError(f"the mesh needs {count} devices, but there are {jax.device_count()}"
                              + (f" ({config.model.residual} models keep the mesh.tensor they were trained with)"
                                 if local else ""))
        devices = jax.devices()[:count]
    placed = sharding.make_mesh(mesh, devices)
    if local and placed.shape[sharding.TENSOR] != trained:
        raise ConfigError(f"mesh.tensor={placed.shape[sharding.TENSOR]} is not accepted: this {config.model.residual} "
                          f"model was trained with mesh.tensor={trained}, and its ranks' streams are a part of it")
    sharding.check(config.model, placed)
    abstract = jax.eval_shape(functools.partial(transformer.init, config.model), jax.random.key(0))
    shardings = sharding.named(placed, sharding.parameter_specs(abstract))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    return Loaded(checkpoint.load_model(path, abstract, step), config, tokenizer.from_json(meta["tokenizer"]), placed)
