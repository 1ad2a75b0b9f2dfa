"""A checkpoint as a model that is ready for use: the door of notebooks and of the command line."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ladder_jax import checkpoint, schedule, sharding
from ladder_jax import config as configuration
from ladder_jax import model as transformer
from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer
from ladder_jax.generate import empty_cache, generate, make_forward


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
        for token in generate(
            self.model,
            self.config.model,
            self.mesh,
            ids,
            max_tokens=max_tokens,
            stop=(self.tokenizer.eos,),
            vocabulary=self.tokenizer.size,
            **options,
        ):
            yield stream.push(token)
        yield stream.flush()

    def logits(self, text):
        """Logits [T, V] float32 after every token of `text`, and the tokens' ids."""
        ids = self.tokenizer.prompt(text)
        rows = self.mesh.shape[sharding.DATA] * self.mesh.shape[sharding.FSDP]
        cache = empty_cache(self.config.model, self.mesh, rows, len(ids))
        tile = lambda values: np.tile(np.asarray(values, np.int32), (rows, 1))
        logits, _ = make_forward(self.config.model, self.mesh)(
            self.model, tile(ids), tile(range(len(ids))), cache
        )
        return logits[0, :, : self.tokenizer.size], ids


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
            raise ConfigError(
                f"the mesh needs {count} devices, but there are {jax.device_count()}"
                + (
                    f" ({config.model.residual} models keep the mesh.tensor they were trained with)"
                    if local
                    else ""
                )
            )
        devices = jax.devices()[:count]
    placed = sharding.make_mesh(mesh, devices)
    if local and placed.shape[sharding.TENSOR] != trained:
        raise ConfigError(
            f"mesh.tensor={placed.shape[sharding.TENSOR]} is not accepted: this {config.model.residual} "
            f"model was trained with mesh.tensor={trained}, and its ranks' streams are a part of it"
        )
    sharding.check_fits(config.model, placed)
    abstract = sharding.abstract(transformer.abstract(config.model), placed)
    return Loaded(
        checkpoint.load_model(path, abstract, step),
        config,
        tokenizer.from_json(meta["tokenizer"]),
        placed,
    )
