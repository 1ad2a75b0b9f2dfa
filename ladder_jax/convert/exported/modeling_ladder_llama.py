"""A Llama-family decoder with a residual schedule, for transformers 5.

It is written for reading and for equal results, not for speed: on one device a ladder
model does the same work as a Llama model. B batch, T tokens, S cached tokens, D model,
N query heads, K key-value heads, H head.
"""

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ladder_llama import LadderLlamaConfig

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
# Names that differ between versions of transformers: the arguments of these functions,
# and the cache in the outputs of a model (past_key_values, later cache).
MASK_ARGUMENTS = {
    layer_type: frozenset(inspect.signature(function).parameters)
    for layer_type, function in MASKS.items()
}
OUTPUT_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE_FIELD = "cache" if "cache" in OUTPUT_FIELDS else "past_key_values"


class LadderLlamaRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.to(torch.float32)
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * (x32 * scale)).to(x.dtype)


class LadderLlamaRotary:
    """Cosines and sines of the rotary angles.

    It is no module, so that no cast of the model rounds its frequencies.
    """

    def __init__(self, config: LadderLlamaConfig) -> None:
        rope = config.rope_parameters or {}
        kind = rope.get("rope_type", "default")
        # from_pretrained builds the model on the meta device.
        with torch.device("cpu"):
            if kind == "default":
                exponent_H = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
                theta = rope.get("rope_theta", 10000.0)
                self.frequency_H = theta ** -(exponent_H / config.head_dim)
                self.scale = 1.0
            else:
                self.frequency_H, self.scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")

    def __call__(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines [B, 1, T, H] at positions [B, T], in x's dtype."""
        frequency_H = self.frequency_H.to(x.device, torch.float32)
        half = position_ids[:, None, :, None].to(torch.float32) * frequency_H
        angle = torch.cat((half, half), dim=-1)
        cosine, sine = angle.cos() * self.scale, angle.sin() * self.scale
        return cosine.to(x.dtype), sine.to(x.dtype)


def rotate(
    x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Turns the first half of each head against its second half."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in torch's own operations; returns its weights, too."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LadderLlamaAttention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, config: LadderLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scaling = H, H**-0.5
        self.num_key_value_groups = N // K
        self.is_causal = True
        self.has_rope = bool(config.no_rope_layers[layer_idx])
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None
        self.q_proj = nn.Linear(D, N * H, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, K * H, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, K * H, bias=config.attention_bias)
        self.o_proj = nn.Linear(N * H, D, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = LadderLlamaRMSNorm(H, config.rms_norm_eps)
            self.k_norm = LadderLlamaRMSNorm(H, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's output [B, T, D], and the weights of eager attention."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.has_rope:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            position = {"cache_position": kwargs.get("cache_position")}
            key, value = cache.update(key, value, self.layer_idx, position)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape[:-2], -1).contiguous()), weights


class LadderLlamaMLP(nn.Module):
    """A gated MLP."""

    def __init__(self, config: LadderLlamaConfig) -> None:
        super().__init__()
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, F, bias=bias)
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LadderLlamaDecoderLayer(nn.Module):
    """Attention and MLP, each with its norm; a parallel layer has one norm for both."""

    def __init__(self, config: LadderLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LadderLlamaAttention(config, layer_idx)
        self.mlp = LadderLlamaMLP(config)
        self.input_layernorm = LadderLlamaRMSNorm(D, eps)
        self.parallel = config.parallel
        if not config.parallel:
            self.post_attention_layernorm = LadderLlamaRMSNorm(D, eps)
        self.delays = config.delays[2 * layer_idx : 2 * layer_idx + 2]

    def forward(
        self, history: list[torch.Tensor], **kwargs: Any
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Appends the streams [B, T, D] after this layer's blocks to `history`.

        Returns the history, and the weights of eager attention.
        """
        if self.parallel:
            u = self.input_layernorm(history[-1])
            output, weights = self.self_attn(u, **kwargs)
            return [history[-1] + (output + self.mlp(u))], weights
        u = self.input_layernorm(delayed(history, self.delays[0]))
        output, weights = self.self_attn(u, **kwargs)
        history = [*history, history[-1] + output]
        u = self.post_attention_layernorm(delayed(history, self.delays[1]))
        return [*history, history[-1] + self.mlp(u)], weights


def delayed(history: list[torch.Tensor], delay: int) -> torch.Tensor:
    """The stream without the outputs of the newest `delay` blocks."""
    return history[max(len(history) - 1 - delay, 0)]


class LadderLlamaPreTrainedModel(PreTrainedModel):
    """What transformers must know of the models below."""

    config_class = LadderLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["LadderLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class LadderLlamaModel(LadderLlamaPreTrainedModel):
    """The decoder without the output projection."""

    def __init__(self, config: LadderLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LadderLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LadderLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = LadderLlamaRotary(config)
        # How many streams a block may look back, its own input included.
        self.depth = 1 + max(config.delays)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The normalised final stream, and the cache.

        `hidden_states` of the result are the embedding and the stream after each layer,
        the last one normalised; `attentions` are set for eager attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        wanted = (
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
            ("return_dict", return_dict),
            ("use_cache", use_cache),
        )
        attentions, states, as_dict, use_cache = (
            getattr(self.config, name, None) if value is None else value
            for name, value in wanted
        )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        cache_position = torch.arange(x.shape[1], device=x.device) + past
        kwargs.setdefault("cache_position", cache_position)
        if position_ids is None:
            position_ids = cache_position[None]
        masks = self._masks(attention_mask, x, cache, position_ids, kwargs)
        rotation = self.rotary(x, position_ids)
        history, all_states, all_weights = [x], [x], []
        for layer, layer_type in zip(self.layers, self.config.layer_types):
            history, weights = layer(
                history,
                rotation=rotation,
                attention_mask=masks[layer_type],
                cache=cache,
                position_ids=position_ids,
                **kwargs,
            )
            # A later block reads no stream before these; the first is the embedding.
            history = history[-self.depth :]
            all_states.append(history[-1])
            all_weights.append(weights)
        x = self.norm(history[-1])
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*all_states[:-1], x) if states else None,
            attentions=tuple(all_weights) if attentions else None,
            **{CACHE_FIELD: cache if use_cache else None},
        )
        return output.to_tuple() if as_dict is False else output

    def _masks(
        self,
        attention_mask: Any,
        x: torch.Tensor,
        cache: Cache | None,
        position_ids: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The mask of each type of layer; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        values = {
            "config": self.config,
            "inputs_embeds": x,
            "input_embeds": x,
            "attention_mask": attention_mask,
            "cache": cache,
            "past_key_values": cache,
            "position_ids": position_ids,
            "cache_position": kwargs["cache_position"],
        }
        return {
            layer_type: MASKS[layer_type](
                **{name: values[name] for name in values if name in names}
            )
            for layer_type, names in MASK_ARGUMENTS.items()
            if layer_type in self.config.layer_types
        }


class LadderLlamaForCausalLM(LadderLlamaPreTrainedModel, GenerationMixin):
    """The decoder with the output projection; `generate` works as for Llama."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LadderLlamaConfig) -> None:
        super().__init__(config)
        self.model = LadderLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The logits [B, T, V]; with `labels` also the mean loss of the next tokens.

        logits_to_keep: 0: of all tokens; n: of the last n; or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        keep: Any = logits_to_keep
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else slice(None)
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
        )
        as_dict = getattr(self.config, "return_dict", True)
        as_dict = as_dict if return_dict is None else return_dict
        return output.to_tuple() if as_dict is False else output


__all__ = ["LadderLlamaForCausalLM", "LadderLlamaModel", "LadderLlamaPreTrainedModel"]
