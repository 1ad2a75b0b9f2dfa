"""Makes the config.json of a Llama-family model from the metadata of a GGUF file.

H head dimension.
"""

import math
from typing import Any

import numpy as np

from ladder_jax.config import ConfigError, require, short_repr
from ladder_jax.convert.gguf_file import GGUFFile

# general.architecture -> model_type and class.
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
# Keys below the architecture's name that `read_config` uses, or that say nothing of
# the model's arithmetic.
KNOWN_KEYS = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# The tensor with one divisor of every rotary frequency.
ROPE_FACTORS = "rope_freqs.weight"
# The original context lengths of Llama 3.1's kind of scaling, most likely first. The
# file holds what llama.cpp computed from it, not the number itself.
ORIGINAL_LENGTHS = (8192, *(2**power for power in range(10, 20) if power != 13))


class _Metadata:
    """The metadata of a model's architecture, read with checks."""

    def __init__(self, file: GGUFFile, name: str) -> None:
        self._metadata, self._name = file.metadata, name
        self.architecture = str(file.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{name}: general.architecture={short_repr(self.architecture)} is not "
                f"accepted: it must be one of {', '.join(ARCHITECTURES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None, kind: type = int) -> Any:
        """Returns a positive number; `default` where there is no such key."""
        value = self.get(key, default)
        accepted = (int, float) if kind is float else (int,)
        ok = isinstance(value, accepted) and not isinstance(value, bool) and value > 0
        ok = ok and math.isfinite(value)
        word = "a number" if kind is float else "a whole number"
        name = f"{self._name}: {self.architecture}.{key}"
        require(ok, name, value, f"{word} greater than 0")
        return kind(value)

    def refuse(self, key: str, reason: str) -> None:
        """Raises ConfigError about a key's value."""
        raise ConfigError(
            f"{self._name}: {self.architecture}.{key}={short_repr(self.get(key))} is "
            f"not supported: {reason}"
        )

    def check_keys(self) -> None:
        """Refuses what changes the model's arithmetic in an unknown way."""
        prefix = f"{self.architecture}."
        for name, value in self._metadata.items():
            key = name.removeprefix(prefix)
            # 0 and False switch a feature off (no experts, no scale, ...).
            if name.startswith(prefix) and key not in KNOWN_KEYS and value:
                self.refuse(key, "this part of a model is unknown here")
        if self.get("attention.causal", True) is not True:
            self.refuse("attention.causal", "the model is no decoder")


def read_config(file: GGUFFile, name: str) -> dict[str, Any]:
    """Returns the content of config.json, with the rope keys of both forms.

    Args:
      file: the file; of its tensors only the rotary factors are read.
      name: the file's name in messages.

    Raises:
      ConfigError: one line, if the architecture is unknown, if a key is missing, or if
        the file uses what no Llama-family model has.
    """
    metadata = _Metadata(file, name)
    metadata.check_keys()
    model_type, class_name = ARCHITECTURES[metadata.architecture]
    heads = metadata.number("attention.head_count")
    dim = metadata.number("embedding_length")
    head_dim = metadata.number("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.number(key, head_dim) != head_dim:
            metadata.refuse(key, f"it must be the head's width, {head_dim}")
    tensors = file.tensors
    for tensor in ("token_embd.weight", "blk.0.attn_q.weight"):
        if tensor not in tensors:
            raise ConfigError(f"{name} has no tensor {tensor!r}: it is not a model")
    config = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": dim,
        "num_hidden_layers": metadata.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.number("feed_forward_length"),
        "max_position_embeddings": metadata.number("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", kind=float),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": tensors["blk.0.attn_q.weight"].dtype.name,
    }
    config["dtype"] = config["torch_dtype"]
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token_id = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        config[f"{ours}_token_id"] = token_id
    qkv_bias = "blk.0.attn_q.bias" in tensors
    out_bias = "blk.0.attn_output.bias" in tensors
    if model_type == "llama" and qkv_bias and not out_bias:
        # transformers' llama has all four biases or none; its qwen2 has these three and
        # is otherwise the same model.
        model_type, class_name = ARCHITECTURES["qwen2"]
    if model_type != "qwen2":
        config["attention_bias"] = qkv_bias
    if model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    window = metadata.get("attention.sliding_window")
    if window not in (None, 0):
        model_type, class_name = "mistral", "MistralForCausalLM"
        if metadata.architecture != "llama" or qkv_bias:
            metadata.refuse("attention.sliding_window", "the model has no such window")
        config["sliding_window"] = window
    config |= {"model_type": model_type, "architectures": [class_name]}
    theta = metadata.number("rope.freq_base", 10000.0, float)
    scaling = _rope_scaling(file, metadata, theta, config, name)
    config |= {"rope_theta": theta, "rope_scaling": scaling}
    default = {"rope_type": "default"}
    config["rope_parameters"] = {**(scaling or default), "rope_theta": theta}
    return config


def _rope_scaling(
    file: GGUFFile,
    metadata: _Metadata,
    theta: float,
    config: dict[str, Any],
    name: str,
) -> dict[str, Any] | None:
    """Returns rope_scaling of config.json, None for unscaled rotary frequencies."""
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0))
    factor = 1.0 if factor == 0 else factor  # as llama.cpp takes it
    if ROPE_FACTORS in file.tensors:
        if kind not in ("none", "linear") or factor != 1.0:
            metadata.refuse("rope.scaling.type", f"the file has {ROPE_FACTORS}, too")
        divisors = np.asarray(file.read(ROPE_FACTORS), np.float64)
        return _fit_factors(divisors, theta, config, name)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    factor = metadata.number("rope.scaling.factor", factor, float)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        metadata.refuse("rope.scaling.type", "it must be none, linear or yarn")
    length = metadata.number("rope.scaling.original_context_length")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length,
    }
    for ours, theirs in (
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ):
        if metadata.get(theirs) is not None:
            scaling[ours] = metadata.number(theirs, kind=float)
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if metadata.get(key, 1.0) != 1.0:
            metadata.refuse(key, "it must be 1")
    return scaling


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, length: int
) -> np.ndarray:
    """Returns the divisor [H/2] of each rotary frequency under Llama 3.1's scaling."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = length * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _fit_factors(
    divisors: np.ndarray, theta: float, config: dict[str, Any], name: str
) -> dict[str, Any] | None:
    """Returns the scaling whose divisors the file holds."""
    head_dim = config["head_dim"]
    if divisors.shape == (head_dim // 2,) and (divisors > 0).all():
        if np.allclose(divisors, divisors[0], rtol=1e-6):
            factor = float(divisors[0])
            is_plain = abs(factor - 1) < 1e-6
            return None if is_plain else {"rope_type": "linear", "factor": factor}
        factor = round(float(divisors.max()), 4)  # the file holds float32
        for length in ORIGINAL_LENGTHS:
            expected = llama3_divisors(theta, head_dim, factor, 1.0, 4.0, length)
            if np.allclose(divisors, expected, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": length,
                }
    raise ConfigError(
        f"{name}: {ROPE_FACTORS} is not supported: it must hold the factors of Llama "
        f"3.1's scaling with low_freq_factor 1 and high_freq_factor 4, one for each of "
        f"{head_dim // 2} frequencies"
    )
