"""A checkpoint of another tool, as the importer sees it: a config, tensors, texts.

`safetensors_source.py` opens Hugging Face's folders in this form, `gguf_source.py`
llama.cpp's files. `from_hf.py` reads nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ladder_jax.config import ConfigError

# The texts beside the weights that the importer reads, by their names in a folder.
TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


class TensorInfo(NamedTuple):
    """The shape and dtype of what `TensorSource.read` returns for a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype  # ml_dtypes.bfloat16 for BF16


FileState = tuple[str, int, int]  # the path, its bytes, and nanoseconds of its change


class TensorSource(Protocol):
    """A checkpoint whose config, names and layout are those of Hugging Face.

    Attributes:
      name: what messages call it, such as its path.
      config: the content of config.json, or its equal made from other metadata.
      tensors: every tensor, by its name in a Hugging Face folder. Nothing of the
        weights has been read.
    """

    name: str
    config: dict[str, Any]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor. The caller drops it before it reads the next one.

        Raises ConfigError, one line, where the file does not hold what it promised.
        """
        ...

    def text(self, name: str) -> str | None:
        """Returns the content of a text of TEXTS, or None if there is no such text."""
        ...

    def files(self) -> list[FileState]:
        """Returns the files of weights as they are now: they tell whether an import
        that was cut off read the same ones."""
        ...


def require_unchanged(source: TensorSource, before: list[FileState]) -> None:
    """Raises ConfigError where a file of weights is another than `before` (`files`)."""
    for (path, *old), (_, *new) in zip(before, source.files()):
        if old != new:
            raise ConfigError(
                f"{path} changed while it was read: start again once it is complete"
            )


def state_of(path: Path) -> FileState:
    """The state of a file. Raises ConfigError where it is not there any more."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return str(path.absolute()), status.st_size, status.st_mtime_ns
