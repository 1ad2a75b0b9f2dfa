"""Loads a checkpoint as a model that is ready for use, in notebooks and commands."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from ladder_jax import checkpoint, schedule, sharding
from ladder_jax.config import Config, ConfigError, Mesh, from_meta, require
from ladder_jax.data.chat import ChatEncoder
from ladder_jax.data.tokenizer import Tokenizer, from_json
from ladder_jax.generate import empty_cache, generate, make_forward, same_rows
from ladder_jax.model import Transformer, abstract
from ladder_jax.quantised import WeightsDtype, quantise_on_mesh
from ladder_jax.serve.stop_strings import StopStringFilter, check_stop


class Loaded(NamedTuple):
    """A checkpoint's model on a mesh, with its config and tokenizer; see `load`."""

    model: Transformer  # a Flax module whose arrays are the parameters, on `mesh`
    config: Config
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        stop: str | Iterable[str] = (),
        stop_token_ids: Iterable[int] | None = None,
        ignore_eos: bool = False,
        **options: Any,
    ) -> Iterator[str]:
        """Yields the text that follows `prompt`, token by token.

        Args:
          prompt: text, or ids; "" starts a new document.
          max_tokens: the most tokens (default: 200, or as many as model.max_length
            leaves room for).
          min_tokens: of the first so many tokens, none is one of `stop_token_ids`, and
            none completes a stop string that counts.
          stop: a string or several; the text ends before the first of them that the
            model generates.
          stop_token_ids: ids that end the text and are not part of it (default: the
            tokenizer's eos_ids).
          ignore_eos: whether the default of `stop_token_ids` is none.
          options: other options of `generate.generate`: `logit_bias`, `kv_dtype` and
            sampling parameters.
        Raises ConfigError, before the first token, if an argument is not accepted.
        """
        ids = self.tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt
        if max_tokens is None:
            max_tokens = max(min(200, self.config.model.max_length - len(ids)), 0)
        if stop_token_ids is None:
            stop_token_ids = () if ignore_eos else self.tokenizer.eos_ids
        stops = check_stop(stop)
        tokens = generate(
            self.model,
            self.config.model,
            self.mesh,
            ids,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            vocabulary=self.tokenizer.size,
            **options,
        )
        stream = self.tokenizer.stream(after=ids)
        return _texts(tokens, StopStringFilter(stream, stops, min_tokens))

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        stop_token_ids: Iterable[int] | None = None,
        ignore_eos: bool = False,
        **options: Any,
    ) -> Iterator[str]:
        """Yields the assistant's answer to a conversation, token by token.

        Args:
          messages: {"role": "user", "content": "..."} and so on; the tokenizer's chat
            template makes the prompt of them. A text is one message of the user.
          stop_token_ids: ids that end the answer (default: the template's end of a
            turn, and every end token of the tokenizer).
          ignore_eos: whether the default of `stop_token_ids` is none.
          options: other options of `generate`.
        Raises ConfigError, before the first token, if an argument is not accepted.
        """
        encoder = ChatEncoder(self.tokenizer)
        ids = encoder.prompt(messages)
        if stop_token_ids is None:
            stop_token_ids = () if ignore_eos else encoder.end_ids
        return self.generate(ids, stop_token_ids=stop_token_ids, **options)

    def logits(self, text: str) -> tuple[jax.Array, list[int]]:
        """Returns (logits [T, V] float32 after every token of `text`, its T ids)."""
        ids = self.tokenizer.prompt(text)
        rows = sharding.batch_shards(self.mesh)
        cache = empty_cache(self.config.model, self.mesh, rows, len(ids))
        forward = make_forward(self.config.model, self.mesh)
        tokens_BT = same_rows(self.mesh, ids)
        positions_BT = same_rows(self.mesh, range(len(ids)))
        logits_BTV, _ = forward(self.model, tokens_BT, positions_BT, cache)
        return logits_BTV[0, :, : self.tokenizer.size], ids


def _texts(tokens: Iterable[int], text_filter: StopStringFilter) -> Iterator[str]:
    """Yields the text of each token, up to a stop string."""
    for token in tokens:
        text, stopped = text_filter.push(token)
        yield text
        if stopped:
            return
    yield text_filter.flush()


def load(
    path: str | Path,
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
    devices: Sequence[jax.Device] | None = None,
    weights_dtype: WeightsDtype = "auto",
) -> Loaded:
    """Returns a checkpoint's model, config, tokenizer and mesh.

    Args:
      path: a run's folder, its checkpoints folder, or one step's.
      step: the number of the checkpoint (default: the newest that can be read).
      mesh: a config.Mesh to shard the model over (default: one device). The tensor axis
        of a desync or dtp model is part of the model: it must stay as it was in
        training.
      devices: the devices (default: as many of jax.devices() as the mesh needs).
      weights_dtype: "int8" makes the matrices int8, see quantised.py.
    Raises ConfigError or ValueError if there is no such checkpoint, or if it does not
    fit the mesh.
    """
    known = get_args(WeightsDtype)
    require(weights_dtype in known, "weights_dtype", weights_dtype, f"one of {known}")
    meta = checkpoint.read_meta(path, step)
    config = from_meta(meta, path)
    device_mesh = make_mesh(config, meta.get("tensor", 1), mesh, devices)
    sharding.check_fits(config.model, device_mesh)
    shapes = sharding.abstract(abstract(config.model), device_mesh)
    model = checkpoint.load_model(path, shapes, step)
    if weights_dtype == "int8":
        model = quantise_on_mesh(model, device_mesh, consume=True)
    return Loaded(model, config, from_json(meta["tokenizer"]), device_mesh)


def make_mesh(
    config: Config,
    trained_tensor: int,
    mesh_config: Mesh | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """Returns the devices as a mesh that the model can run on.

    trained_tensor: mesh.tensor of the training run.
    """
    residual = config.model.residual
    # With desync or dtp, each tensor rank has a residual stream of its own.
    own_streams = schedule.parse(residual, config.model.layers).local
    if mesh_config is None:
        mesh_config = Mesh(data=1, tensor=trained_tensor if own_streams else 1)
    sizes = mesh_config.data, mesh_config.fsdp, mesh_config.tensor
    # -1 stands for all remaining devices, see config.Mesh.
    if devices is None and -1 not in sizes:
        count = int(np.prod(sizes))
        if count > jax.device_count():
            reason = f" ({residual} models keep the mesh.tensor they were trained with)"
            raise ConfigError(
                f"the mesh needs {count} devices, but there are {jax.device_count()}"
                + (reason if own_streams else "")
            )
        devices = jax.devices()[:count]
    mesh = sharding.make_mesh(mesh_config, devices)
    tensor = mesh.shape[sharding.TENSOR]
    if own_streams and tensor != trained_tensor:
        raise ConfigError(
            f"mesh.tensor={tensor} is not accepted: this {residual} model was trained "
            f"with mesh.tensor={trained_tensor}, and each of its tensor ranks has a "
            "residual stream of its own"
        )
    return mesh
