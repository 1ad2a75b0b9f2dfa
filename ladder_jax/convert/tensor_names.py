"""A checkpoint holds exactly the tensors that its config.json needs."""

import dataclasses
import re
from collections.abc import Callable, Mapping

from ladder_jax.config import ConfigError, short_repr
from ladder_jax.convert import layout
from ladder_jax.convert.families import Imported
from ladder_jax.convert.layout import Tensor
from ladder_jax.convert.source import TensorInfo

# Buffers that old versions of transformers saved.
_SKIPPED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
# What the name of a tensor that nothing explains may mean.
_HINTS = {
    "lora_": "LoRA weights: merge them into the model first",
    "experts": "experts",
    "qweight": "quantised weights",
    "weight_scale": "quantised weights",
    "SCB": "quantised weights",
    "absmax": "quantised weights",
    "visual": "weights that read images",
    "vision": "weights that read images",
}


def check_names(
    imported: Imported,
    infos: Mapping[str, TensorInfo],
    where: str,
    equal: Callable[[str, str], bool],
) -> Imported:
    """Returns `imported` with the tensors that are read: exactly those that are there.

    Args:
      imported: of `read_config`.
      infos: the tensors that there are.
      where: the checkpoint, in messages.
      equal: whether two tensors have the same values; called for a tied model whose
        file has an lm_head.

    Raises ConfigError, one line, where a tensor is missing, left over, or of another
    shape than the config says.
    """
    model = imported.model
    names = {name for name in infos if not _SKIPPED.fullmatch(name)}
    if model.tie_embeddings and "lm_head.weight" in names:
        _check_shape("lm_head.weight", (model.vocab_size, model.dim), infos, where)
        embedding = imported.tensors[0].name
        _check_shape(embedding, (model.vocab_size, model.dim), infos, where)
        if equal("lm_head.weight", embedding):
            names.discard("lm_head.weight")
        else:
            imported = _untied(imported, "lm_head.weight")
            note = (
                f"{where}: tie_word_embeddings is true, but lm_head differs from the "
                "embedding: the model is imported untied"
            )
            imported = imported._replace(notes=(*imported.notes, note))
            model = imported.model
    wanted: dict[str, Tensor] = {}
    for tensor in imported.tensors:
        for layer in range(model.layers if tensor.stacked else 1):
            wanted[tensor.name.format(layer)] = tensor
    if missing := sorted(wanted.keys() - names, key=_by_number):
        raise ConfigError(_missing(where, missing))
    if extra := sorted(names - wanted.keys(), key=_by_number):
        hint = next((text for part, text in _HINTS.items() if part in extra[0]), "")
        raise ConfigError(
            f"{where} holds {len(extra)} tensors that its config does not explain, "
            f"such as {extra[0]}{f' ({hint})' if hint else ''}"
        )
    for name, tensor in wanted.items():
        _check_shape(name, layout.foreign_shape(tensor, model), infos, where)
    if model.tie_embeddings and imported.tensors[0].scale != imported.logits_scale:
        # Folded factors make the two tables different.
        imported = _untied(imported, imported.tensors[0].name)
    return imported


def _untied(imported: Imported, name: str) -> Imported:
    """The same model with an unembedding of its own, which is read from `name`."""
    model = dataclasses.replace(imported.model, tie_embeddings=False)
    head = Tensor(name, ("unembedding",), imported.logits_scale)
    return imported._replace(model=model, tensors=[*imported.tensors, head])


def _check_shape(
    name: str, wanted: tuple[int, ...], infos: Mapping[str, TensorInfo], where: str
) -> None:
    if name in infos and infos[name].shape != wanted:
        raise ConfigError(
            f"{where}: {name} has shape {short_repr(list(infos[name].shape))}, but its "
            f"config says {short_repr(list(wanted))}"
        )


def _missing(where: str, names: list[str]) -> str:
    text = (
        f"{where} lacks {len(names)} tensors that its config needs, such as {names[0]}"
    )
    if names == ["lm_head.weight"]:
        text += (
            ": tie_word_embeddings is false, so it needs one (if the embedding serves "
            "as output too, set tie_word_embeddings to true)"
        )
    return text


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    parts = name.split(".")
    return [(int(part) if part.isdigit() else -1, part) for part in parts]
