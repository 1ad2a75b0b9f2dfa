"""Text from a model, one token at a time: the readable reference that the decode engine is tested against.

Greedy or sampled, with a key-value cache, on any mesh. Randomness depends on the seed and the position alone.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ladder_jax import checkpoint, schedule, sharding, tokenizer
from ladder_jax import config as configuration
from ladder_jax import model as transformer
from ladder_jax.config import ConfigError


def empty_cache(config, mesh, batch, length):
    """Keys and values for `batch` rows of `length` tokens: a pair of [L, B, S, K, H] zeros in the compute dtype."""
    shape = config.layers, batch, length, config.kv_heads, config.head_dim
    made = jax.jit(lambda: jnp.zeros(shape, config.dtype), out_shardings=sharding.named(mesh, sharding.CACHE))
    return made(), made()


@functools.lru_cache(maxsize=8)
def make_forward(config, mesh):
    """(model, tokens [B, T], positions [B, T], cache) -> (logits [B, T, V] float32, cache), compiled; cache donated."""
    def local(model, tokens_BT, positions_BT, cache):
        x_BTD, cache = transformer.hidden(model, config, tokens_BT, positions_BT, cache=cache)
        return transformer.logits(model, config, x_BTD), cache

    specs = sharding.parameter_specs(jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0)))
    cache = (sharding.CACHE,) * 2
    return jax.jit(sharding.shard_map(local, mesh, (specs, sharding.TOKENS, sharding.TOKENS, cache),
                                      (sharding.LOGITS, cache)), donate_argnums=3)


@jax.jit
def sample(logits_V, seed, position, temperature, top_k, top_p, vocabulary):
    """The next token's id. temperature 0: the likeliest; otherwise drawn from the `top_k` likeliest (0: all) and, of
    these, from the likeliest that together have probability `top_p`. Ids from `vocabulary` on are never taken."""
    logits_V = jnp.where(jnp.arange(logits_V.size) < vocabulary, logits_V, -jnp.inf)
    order_V = jnp.argsort(-logits_V)        # stable: of equals the first, as argmax has it
    sorted_V = logits_V[order_V] / jnp.where(temperature > 0, temperature, 1)
    sorted_V = jnp.where((jnp.arange(sorted_V.size) < top_k) | (top_k == 0), sorted_V, -jnp.inf)
    probability_V = jax.nn.softmax(sorted_V)
    sorted_V = jnp.where(jnp.cumsum(probability_V) - probability_V < top_p, sorted_V, -jnp.inf)
    scaled_V = jnp.zeros_like(sorted_V).at[order_V].set(sorted_V)
    drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), scaled_V)
    return jnp.where(temperature > 0, drawn, order_V[0])


def generate(model, config, mesh, prompt, *, max_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=(),
             vocabulary=None):
    """Yields the ids that follow `prompt` (ids), as they are made: at most `max_tokens`, up to one of `stop`, excluded.

    Args:
      model, config, mesh: parameters on `mesh`, their config.Model.
      temperature, top_k, top_p, seed: see `sample`.
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
             f"from 0 to {room}: model.max_length={config.max_length} less the {len(prompt)} of the prompt"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "0 (all) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, up to 1"),
            ("seed", seed, 0 <= seed < 2 ** 32, "from 0 to 2 ** 32 - 1")):
        if not ok:
            raise ConfigError(f"{name}={value} is not accepted: it must be {accepted}")
    choose = functools.partial(sample, seed=np.uint32(seed), temperature=float(temperature), top_k=top_k,
                               top_p=float(top_p), vocabulary=vocabulary)
    return _tokens(model, config, mesh, prompt, max_tokens, choose, frozenset(stop))


def _tokens(model, config, mesh, prompt, max_tokens, choose, stop):
    rows = mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]      # every data shard works on a copy
    padded, length = (1 << (max(n, 16) - 1).bit_length() for n in (len(prompt), len(prompt) + max_tokens))
    forward = make_forward(config, mesh)
    cache = empty_cache(config, mesh, rows, length)
    # A padded prompt writes junk behind its end, which the tokens that come there replace before it can be seen.
    tile = lambda values: np.tile(np.asarray(values, np.int32), (rows, 1))
    logits_BTV, cache = forward(model, tile([*prompt, *[0] * (padded - len(prompt))]), tile(range(padded)), cache)
    last_V = logits_BTV[0, len(prompt) - 1]
    for position in range(len(prompt), len(prompt) + max_tokens):
        token = int(choose(last_V, position=position))
        if token in stop:
            return
        yield token
        if position + 1 < len(prompt) + max_tokens:
            logits_BTV, cache = forward(model, tile([token]), tile([position]), cache)
            last_V = logits_BTV[0, 0]


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
