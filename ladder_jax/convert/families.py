"""One table of model families: config.json to config.Model.

A family is a row of FAMILIES, found by `model_type`. What a row does not accept is
refused by name, before anything of the weights is read. Defaults are those of
transformers 5.24, each family's own.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ladder_jax import schedule
from ladder_jax.config import ConfigError, Model, short_repr
from ladder_jax.convert import ladder_llama, layout
from ladder_jax.convert.fields import Fields
from ladder_jax.convert.layout import Scales, Tensor
from ladder_jax.convert.rope import read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
Values = dict[str, Any]  # fields of config.Model
MOST_LAYERS = 10_000  # more would take minutes to refuse by the names of their tensors


class Family(NamedTuple):
    """How a family differs from llama."""

    architecture: str
    kv_heads: int | None = None  # without the key; None: as many as heads
    head_dim: int | None = None  # without the key; None: hidden_size // heads
    max_length: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tied: bool = False
    activation: str = "silu"
    fused: bool = False  # see layout.tensors
    # The fields that this family alone has, and the factors that it folds.
    read: Callable[[Fields, int], Values] = lambda fields, layers: {}
    scales: Callable[[Fields, Values], Scales] = lambda fields, values: Scales()


class Imported(NamedTuple):
    """What a config.json means."""

    model: Model
    tensors: list[Tensor]  # the embedding first
    logits_scale: float = 1.0  # of the unembedding, see layout.Scales
    notes: tuple[str, ...] = ()  # lines for the user


# ---------------------------------------------------------------- the families


def _biases(fields: Fields, layers: int) -> Values:
    bias = fields.flag("attention_bias", False)
    mlp_bias = fields.flag("mlp_bias", False)
    return dict(qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _mistral(fields: Fields, layers: int) -> Values:
    """An absent sliding_window means 4096, null none; every layer has it."""
    window = fields.integer("sliding_window", 4096)
    is_null = "sliding_window" in fields.values and not fields.has("sliding_window")
    return _windows(None if is_null else window, range(layers), layers)


def _ministral(fields: Fields, layers: int) -> Values:
    window = _mistral(fields, layers)["sliding_window"]
    return _windows(window, _sliding(fields, layers, range(layers)), layers)


def _phi3(fields: Fields, layers: int) -> Values:
    has = fields.has("sliding_window")
    window = fields.integer("sliding_window") if has else None
    return _windows(window, range(layers), layers)


def _qwen2(fields: Fields, layers: int) -> Values:
    return dict(qkv_bias=True) | _switched_windows(fields, layers)


def _qwen3(fields: Fields, layers: int) -> Values:
    biases = _biases(Fields({**fields.values, "mlp_bias": False}, fields.where), layers)
    return dict(qk_norm=True) | biases | _switched_windows(fields, layers)


def _seed_oss(fields: Fields, layers: int) -> Values:
    return dict(
        qkv_bias=fields.flag("attention_bias", True),
        out_bias=fields.flag("attention_out_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _smollm3(fields: Fields, layers: int) -> Values:
    """no_rope_layers has 1 for a layer with rotary embedding, 0 for one without."""
    interval = fields.integer("no_rope_layer_interval", 4)
    default = [int((i + 1) % interval != 0) for i in range(layers)]
    has_rope = fields.row("no_rope_layers", layers) or default
    ok = all(value in (0, 1) for value in has_rope)
    fields.need("no_rope_layers", ok, "a list of 0 and 1")
    without = [i for i, value in enumerate(has_rope) if not value]
    nope = dict(nope_layers=schedule.format_layers(without, layers))
    window = None
    if fields.flag("use_sliding_window", False) and fields.has("sliding_window"):
        window = fields.integer("sliding_window")
    windows = _windows(window, _sliding(fields, layers, without), layers)
    return _biases(fields, layers) | nope | windows


def _gemma(fields: Fields, layers: int) -> Values:
    both = fields.flag("use_bidirectional_attention", False)
    fields.need("use_bidirectional_attention", not both, "false: a causal decoder")
    return _biases(Fields({**fields.values, "mlp_bias": False}, fields.where), layers)


def _llama_ladder(fields: Fields, layers: int) -> Values:
    """The authors' hybrids. ladder_layers: the last k, or a list, counted from 0."""
    stale = fields.values.get("ladder_layers")
    is_list = isinstance(stale, list)
    numbers: list[Any] = stale if isinstance(stale, list) else [stale]
    ok = all(type(number) is int and 0 <= number <= MOST_LAYERS for number in numbers)
    fields.need("ladder_layers", ok and numbers, "a number or a list of layers")
    which = ",".join(map(str, numbers)) if is_list else f"last{stale}"
    return _biases(fields, layers) | dict(residual=f"hybrid:{which}")


def _ladder_llama(fields: Fields, layers: int) -> Values:
    """Our own class: every option of config.Model by a key of its own."""
    window = fields.integer("sliding_window") if fields.has("sliding_window") else None
    windows = _windows(window, _sliding(fields, layers, range(layers)), layers)
    has_rope = fields.row("no_rope_layers", layers) or [1] * layers
    ok = all(value in (0, 1) for value in has_rope)
    fields.need("no_rope_layers", ok, "a list of 0 and 1")
    without = [i for i, value in enumerate(has_rope) if not value]
    return windows | dict(
        qkv_bias=fields.flag("attention_bias", False),
        out_bias=fields.flag("attention_out_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        qk_norm=fields.flag("qk_norm", False),
        nope_layers=schedule.format_layers(without, layers),
        residual=ladder_llama.residual_of(fields.values, layers),
    )


def _switched_windows(fields: Fields, layers: int) -> Values:
    """Of qwen2 and qwen3: use_sliding_window is the switch."""
    if not fields.flag("use_sliding_window", False):
        return {}
    is_null = "sliding_window" in fields.values and not fields.has("sliding_window")
    window = None if is_null else fields.integer("sliding_window", 4096)
    first = fields.values.get("max_window_layers", 28)
    fields.need("max_window_layers", type(first) is int, "a whole number", first)
    layers_with = _sliding(fields, layers, range(max(first, 0), layers))
    return _windows(window, layers_with, layers)


def _sliding(fields: Fields, layers: int, default: Any) -> list[int]:
    """The layers that layer_types calls sliding_attention; `default` without it."""
    kinds = fields.row("layer_types", layers)
    if kinds is None:
        return list(default)
    known = ("full_attention", "sliding_attention")
    accepted = f"a list of {' and '.join(known)}"
    fields.need("layer_types", all(kind in known for kind in kinds), accepted)
    return [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]


def _windows(window: int | None, layers_with: Any, layers: int) -> Values:
    numbers = list(layers_with)
    if window is None or not numbers:
        return dict(sliding_window=None)
    which = schedule.format_layers(numbers, layers)
    return dict(sliding_window=window, window_layers=which)


def _granite_scales(fields: Fields, values: Values) -> Scales:
    """attention_multiplier replaces 1 / sqrt(head_dim)."""
    attention = fields.number("attention_multiplier", 1.0)
    return Scales(
        embedding=fields.number("embedding_multiplier", 1.0),
        query=attention * values["head_dim"] ** 0.5,
        output=fields.number("residual_multiplier", 1.0),
        logits=1 / fields.number("logits_scaling", 1.0),
    )


def _gemma_scales(fields: Fields, values: Values) -> Scales:
    return Scales(embedding=values["dim"] ** 0.5, norm_offset=1.0)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", read=_biases),
    "mistral": Family(
        "MistralForCausalLM", kv_heads=8, max_length=131072, read=_mistral
    ),
    "ministral": Family(
        "MinistralForCausalLM", kv_heads=8, max_length=131072, read=_ministral
    ),
    "qwen2": Family("Qwen2ForCausalLM", kv_heads=32, max_length=32768, read=_qwen2),
    "qwen3": Family(
        "Qwen3ForCausalLM", kv_heads=32, head_dim=128, max_length=32768, read=_qwen3
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        kv_heads=8,
        head_dim=128,
        max_length=524288,
        read=_seed_oss,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        kv_heads=4,
        max_length=32768,
        rope_theta=2e6,
        tied=True,
        read=_smollm3,
    ),
    "phi3": Family(
        "Phi3ForCausalLM", max_length=4096, norm_eps=1e-5, fused=True, read=_phi3
    ),
    "granite": Family("GraniteForCausalLM", read=_biases, scales=_granite_scales),
    "gemma": Family(
        "GemmaForCausalLM",
        kv_heads=16,
        head_dim=256,
        max_length=8192,
        tied=True,
        activation="gelu_pytorch_tanh",
        read=_gemma,
        scales=_gemma_scales,
    ),
    "llamaLadder": Family("LlamaForCausalLM", read=_llama_ladder),
    ladder_llama.MODEL_TYPE: Family(
        ladder_llama.CLASS_NAME, norm_eps=1e-5, read=_ladder_llama
    ),
}
# Families that are known and not supported, and why.
_EXPERTS = "it has experts"
_POST_NORMS = "it has norms after its blocks"
# A norm over all heads of a layer would need a sum over tensor shards inside a block,
# which nothing could hide.
_WIDE_QK_NORM = f"{_POST_NORMS} and one norm over the queries of all heads"
_LAYER_NORM = "it has LayerNorm, not RMSNorm"
NOT_SUPPORTED = {
    "gemma2": f"{_POST_NORMS} and caps its logits",
    "gemma3": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
    "olmo": "its LayerNorm has no weights",
    "olmo2": _WIDE_QK_NORM,
    "olmo3": _WIDE_QK_NORM,
    "glm": "it rotates a part of each head",
    "glm4": _POST_NORMS,
    "exaone4": _POST_NORMS,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v2": f"{_EXPERTS} and latent attention",
    "deepseek_v3": f"{_EXPERTS} and latent attention",
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "phimoe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "phi": _LAYER_NORM,
    "cohere": _LAYER_NORM,
    "cohere2": _LAYER_NORM,
    "starcoder2": _LAYER_NORM,
    "stablelm": _LAYER_NORM,
    "gpt2": _LAYER_NORM,
    "gpt_neox": _LAYER_NORM,
    "falcon": _LAYER_NORM,
    "olmoe": f"{_EXPERTS} and one norm over the queries of all heads",
    "qwen3_next": "it has linear attention",
    "mamba": "it is no transformer",
    "mllama": "it reads images",
    "qwen2_vl": "it reads images",
    "llava": "it reads images",
}


# ---------------------------------------------------------------- reading a config


def read_config(config: Mapping[str, Any], where: str = "config.json") -> Imported:
    """Returns the model that a config.json describes, and the tensors that it needs.

    Raises ConfigError, one line, where a family or a feature is not supported, or a
    value is wrong.
    """
    fields = Fields(config, where)
    kind = fields.values.get("model_type")
    family = _family(fields, kind)
    if fields.has("quantization_config"):
        method = fields.values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ConfigError(
            f"{where}: quantization_config ({short_repr(method)}) is not supported: "
            "take the checkpoint without quantisation"
        )
    layers = fields.integer("num_hidden_layers")
    fields.need("num_hidden_layers", layers <= MOST_LAYERS, f"at most {MOST_LAYERS}")
    values = _shape(fields, family) | dict(layers=layers)
    theta, scaling = read_rope(fields, family.rope_theta)
    values |= dict(
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.number("rms_norm_eps", family.norm_eps),
        activation=_activation(fields, family),
        tie_embeddings=fields.flag("tie_word_embeddings", family.tied),
        residual="standard",
        init_std=_init_std(fields),
    )
    values |= family.read(fields, layers)
    scales = family.scales(fields, values)
    try:
        model = Model(**values)
    except ConfigError as error:
        raise ConfigError(f"{where} describes no model: {error}") from None
    rows = layout.tensors(model, family.fused, scales)
    return Imported(model, rows, scales.logits)


def _family(fields: Fields, kind: object) -> Family:
    """The row of a model_type. `architectures`, where given, must agree."""
    if not isinstance(kind, str):
        fields.need("model_type", False, f"one of {', '.join(FAMILIES)}", kind)
    if kind in NOT_SUPPORTED:
        raise ConfigError(
            f"{fields.where}: model_type {kind!r} is not supported: "
            f"{NOT_SUPPORTED[str(kind)]}"
        )
    fields.need("model_type", kind in FAMILIES, f"one of {', '.join(FAMILIES)}")
    family = FAMILIES[str(kind)]
    names = fields.values.get("architectures")
    if names is None:
        return family
    accepted = f"[{family.architecture!r}] for model_type {kind!r}"
    is_list = isinstance(names, list) and len(names) == 1
    fields.need("architectures", is_list, accepted)
    # The authors' classes have names of their own.
    ok = names[0] == family.architecture or kind == "llamaLadder"
    fields.need("architectures", ok, accepted)
    return family


def _init_std(fields: Fields) -> float:
    """Of a model that is trained already: kept where it is a number, else not used."""
    value = fields.values.get("initializer_range")
    if isinstance(value, (int, float)) and 0 < value <= sys.float_info.max:
        return float(value)
    return 0.02


def _shape(fields: Fields, family: Family) -> Values:
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = family.head_dim
    if head_dim is None and not fields.has("head_dim"):
        fields.need(
            "hidden_size", dim % heads == 0, f"a multiple of {heads} heads, or head_dim"
        )
        head_dim = dim // heads
    is_null = "num_key_value_heads" in fields.values
    kv_heads = heads if is_null or family.kv_heads is None else family.kv_heads
    return dict(
        vocab_size=fields.integer("vocab_size"),
        dim=dim,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", kv_heads),
        head_dim=fields.integer("head_dim", head_dim),
        ffn_dim=fields.integer("intermediate_size"),
        max_length=fields.integer("max_position_embeddings", family.max_length),
    )


def _activation(fields: Fields, family: Family) -> str:
    name = fields.text("hidden_act", family.activation)
    accepted = f"one of {', '.join(ACTIVATIONS)}"
    fields.need("hidden_act", name in ACTIVATIONS, accepted, name)
    other = fields.text("hidden_activation", name)
    same = ACTIVATIONS.get(other) == ACTIVATIONS[name]
    fields.need("hidden_activation", same, f"the same as hidden_act={name!r}", other)
    return ACTIVATIONS[name]
