"""config.Model to config.json: the class of transformers that computes the same.

A class is chosen by what the model has (biases, windows, ...), never by its name.
`families.read_config` reads what this file writes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ladder_jax import schedule
from ladder_jax.config import ConfigError, Model
from ladder_jax.convert import ladder_llama
from ladder_jax.convert.families import FAMILIES
from ladder_jax.convert.rope import write_rope
from ladder_jax.data.tokenizer import Tokenizer

Values = dict[str, Any]


class Export(NamedTuple):
    """A class of transformers: which models it can express, and its own keys."""

    model_type: str
    accepts: Callable[[Model], bool]
    keys: Callable[[Model], Values]


def _plain_attention(model: Model) -> bool:
    """Whether attention has no window, no norms, and rotary embedding everywhere."""
    has_nope = bool(_layers(model.nope_layers, model))
    return not (model.qk_norm or model.sliding_window or has_nope)


def _no_biases(model: Model) -> bool:
    return not (model.qkv_bias or model.out_bias or model.mlp_bias)


def _one_bias(model: Model) -> bool:
    return model.qkv_bias == model.out_bias


def _every_window(model: Model) -> bool:
    return len(_layers(model.window_layers, model)) == model.layers


def _layers(text: str, model: Model) -> frozenset[int]:
    return schedule.parse_layers(text, model.layers)


def _mistral(model: Model) -> Values:
    return dict(sliding_window=model.sliding_window)


def _layer_types(model: Model) -> Values:
    sliding = _layers(model.window_layers, model) if model.sliding_window else ()
    kinds = ("full_attention", "sliding_attention")
    return dict(
        sliding_window=model.sliding_window,
        layer_types=[kinds[i in sliding] for i in range(model.layers)],
    )


def _switched(model: Model) -> Values:
    switch = dict(use_sliding_window=model.sliding_window is not None)
    # Without layer_types, this key would decide which layers have the window.
    return switch | _layer_types(model) | dict(max_window_layers=model.layers)


def _biases(model: Model) -> Values:
    return dict(attention_bias=model.qkv_bias, mlp_bias=model.mlp_bias)


def _smollm3(model: Model) -> Values:
    nope = _layers(model.nope_layers, model)
    has_rope = [int(i not in nope) for i in range(model.layers)]
    values = dict(no_rope_layers=has_rope, no_rope_layer_interval=4)
    return values | _biases(model) | _switched(model)


# The first that accepts a model is taken.
EXPORTS = (
    Export(
        "llama",
        lambda m: _plain_attention(m) and _one_bias(m) and m.dim % m.heads == 0,
        _biases,
    ),
    Export(
        "mistral",
        lambda m: (
            _no_biases(m)
            and not m.qk_norm
            and not _layers(m.nope_layers, m)
            and (m.sliding_window is None or _every_window(m))
        ),
        _mistral,
    ),
    Export(
        "ministral",
        lambda m: _no_biases(m) and not m.qk_norm and not _layers(m.nope_layers, m),
        _layer_types,
    ),
    Export(
        "qwen2",
        lambda m: (
            m.qkv_bias
            and not (m.out_bias or m.mlp_bias or m.qk_norm)
            and not _layers(m.nope_layers, m)
        ),
        _switched,
    ),
    Export(
        "qwen3",
        # qkv_bias alone is written with an out_bias of zeros (`with_zeros`).
        lambda m: (
            m.qk_norm
            and not m.mlp_bias
            and (m.qkv_bias or not m.out_bias)
            and not _layers(m.nope_layers, m)
        ),
        lambda m: dict(attention_bias=m.qkv_bias) | _switched(m),
    ),
    Export(
        "seed_oss",
        _plain_attention,
        lambda m: _biases(m) | dict(attention_out_bias=m.out_bias),
    ),
    Export("smollm3", lambda m: not m.qk_norm and _one_bias(m), _smollm3),
)


def export_of(model: Model) -> Export | None:
    """The class of transformers that computes a standard model; None if there is none.

    A model whose schedule is not standard has none, whatever its parameters are.
    """
    if not is_standard(model):
        return None
    return next((export for export in EXPORTS if export.accepts(model)), None)


def is_standard(model: Model) -> bool:
    """Whether every block reads the outputs of all blocks before it, and is reduced."""
    parsed = schedule.parse(model.residual, model.layers)
    blocks = [block for layer in parsed.layers for block in layer]
    simple = all(not b.delay and b.reduce and len(b.parts) == 1 for b in blocks)
    return simple and not parsed.local


def require_exportable(model: Model) -> None:
    """Raises ConfigError where a schedule depends on the tensor degree."""
    if schedule.parse(model.residual, model.layers).local:
        raise ConfigError(
            f"residual={model.residual!r} cannot be exported: each tensor shard has a "
            "residual stream of its own, so the model depends on the number of shards, "
            "which no class of transformers has"
        )
    if not is_standard(model):
        ladder_llama.schedule_keys(model.residual, model.layers)


def base_config(model: Model, tokenizer: Tokenizer, dtype: str) -> Values:
    """The keys of config.json that every class of the Llama family has."""
    return dict(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_length,
        rms_norm_eps=model.norm_eps,
        hidden_act=model.activation,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init_std,
        attention_dropout=0.0,
        use_cache=True,
        # transformers 5 reads dtype, older versions torch_dtype.
        dtype=dtype,
        torch_dtype=dtype,
        **write_rope(model),
        **special_ids(tokenizer),
    )


def standard_config(
    export: Export, model: Model, tokenizer: Tokenizer, dtype: str
) -> Values:
    """config.json of a standard model."""
    kind = export.model_type
    names = dict(architectures=[FAMILIES[kind].architecture], model_type=kind)
    return names | base_config(model, tokenizer, dtype) | export.keys(model)


def own_config(model: Model, tokenizer: Tokenizer, dtype: str) -> Values:
    """config.json of a model that only our own class computes (ladder_llama.py)."""
    own = dict(
        model_type=ladder_llama.MODEL_TYPE,
        attention_bias=model.qkv_bias,
        attention_out_bias=model.out_bias,
        mlp_bias=model.mlp_bias,
        qk_norm=model.qk_norm,
        no_rope_layers=_smollm3(model)["no_rope_layers"],
        **ladder_llama.schedule_keys(model.residual, model.layers),
    )
    return base_config(model, tokenizer, dtype) | _layer_types(model) | own


def special_ids(tokenizer: Tokenizer) -> Values:
    """bos_token_id, eos_token_id (a list where there are several), pad_token_id."""
    ends = list(tokenizer.eos_ids)
    names = tokenizer.special.names
    return dict(
        bos_token_id=tokenizer.bos if "bos" in names else None,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad if "pad" in names else None,
    )
