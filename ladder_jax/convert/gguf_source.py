"""Opens a GGUF file of the Llama family as a TensorSource.

Names, layout and config become those of a Hugging Face folder. N query heads, K
key-value heads, H head dimension, D model.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ladder_jax.config import ConfigError
from ladder_jax.convert import gguf_tokenizer
from ladder_jax.convert.gguf_config import ROPE_FACTORS, read_config
from ladder_jax.convert.gguf_file import GGUFFile
from ladder_jax.convert.source import FileState, TensorInfo, TensorSource, state_of

# llama.cpp's names of tensors outside the layers, and Hugging Face's.
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# The same of the modules of a layer.
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# The architecture whose query and key rows llama.cpp reorders, so that the two numbers
# that a rotary frequency turns are neighbours.
PERMUTED = "llama"


def open_gguf(path: str | Path) -> TensorSource:
    """Opens a GGUF file, the first one where a model has several.

    Raises:
      ConfigError: one line, if the file is damaged, or the model of a kind that is not
        supported. Nothing of the weights has been read then.
    """
    return GGUFSource(path)


class GGUFSource:
    """A TensorSource over a GGUF file; its attributes are those of the protocol."""

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self._file = GGUFFile(path)
        self.config: dict[str, Any] = read_config(self._file, self.name)
        self._original = {
            self._name_of(original): original
            for original in self._file.tensors
            if original != ROPE_FACTORS
        }
        tensors = self._file.tensors
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensors[original].shape, tensors[original].dtype)
            for name, original in self._original.items()
        }
        self._heads = {
            "attn_q": self.config["num_attention_heads"],
            "attn_k": self.config["num_key_value_heads"],
        }
        self._check_rows()

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in Hugging Face's layout."""
        original = self._original[name]
        x = self._file.read(original)
        heads = self._permuted_heads(original)
        return x if heads is None else unpermute(x, heads)

    def text(self, name: str) -> str | None:
        """Returns the text of a file that a Hugging Face folder would hold, or None.

        Raises:
          ConfigError: if the file's tokenizer is damaged or of a kind not supported.
        """
        return self._texts.get(name)

    def files(self) -> list[FileState]:
        return [state_of(path) for path in self._file.paths]

    @functools.cached_property
    def _texts(self) -> dict[str, str]:
        rows = self.config["vocab_size"]
        return gguf_tokenizer.texts(self._file.metadata, rows, self.name)

    def _name_of(self, original: str) -> str:
        """Returns Hugging Face's name of a tensor."""
        if original in OUTER:
            return OUTER[original]
        match = LAYER.fullmatch(original)
        if match and match[2] in MODULES:
            return f"model.layers.{int(match[1])}.{MODULES[match[2]]}.{match[3]}"
        raise ConfigError(
            f"{self.name} holds the tensor {original!r}, which the models that are "
            "supported do not have"
        )

    @functools.cached_property
    def _is_permuted(self) -> bool:
        return self._file.metadata["general.architecture"] == PERMUTED

    def _permuted_heads(self, original: str) -> int | None:
        """Returns the heads of a tensor whose rows llama.cpp reordered, else None."""
        match = LAYER.fullmatch(original)
        return self._heads.get(match[2]) if match and self._is_permuted else None

    def _check_rows(self) -> None:
        """Raises ConfigError where queries or keys do not have the heads promised."""
        for original, tensor in self._file.tensors.items():
            heads = self._permuted_heads(original)
            expected = None if heads is None else heads * self.config["head_dim"]
            if expected is not None and tensor.shape[0] != expected:
                raise ConfigError(
                    f"{self.name}: tensor {original!r} has {tensor.shape[0]} rows, but "
                    f"{heads} heads of {self.config['head_dim']} need {expected}"
                )


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows [N H, D] of a query or key matrix, or of its bias [N H], in
    Hugging Face's order.

    There a head's first half of rows turns with its second half; in llama.cpp row 2i
    turns with row 2i + 1.
    """
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)
