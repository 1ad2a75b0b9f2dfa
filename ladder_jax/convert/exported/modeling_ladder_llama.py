"""A Llama-family decoder with a residual schedule, for transformers 5.

It is written for reading and for equal results, not for speed: on one device a ladder
model does the same work as a Llama model. B batch, T tokens, S cached tokens, D model,
N query heads, K key-value heads, H head.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
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
MASKS_TAKE_CACHE_POSITION = "cache_position" in MASK_ARGUMENTS["full_attention"]
OUTPUT_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
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


class LadderLlamaRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles."""

    def __init__(self, config: LadderLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.inv_freq: torch.Tensor
        frequency_H, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", frequency_H, persistent=False)

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """The frequencies [H/2] in float32, and the factor of cosines and sines."""
        rope = self.config.rope_parameters or {}
        kind = rope.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type={kind!r}: it must be one of {ROPE_TYPES}")
        # from_pretrained builds the model on the meta device.
        with torch.device("cpu"):
            if kind != "default":
                return ROPE_INIT_FUNCTIONS[kind](self.config, "cpu")
            H = self.config.head_dim
            exponent_H = torch.arange(0, H, 2, dtype=torch.float32) / H
            return rope.get("rope_theta", 10000.0) ** -exponent_H, 1.0

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Moves the frequencies, and leaves them in float32 when the model is cast."""
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosines and sines [B, T, H] at positions [B, T], in x's dtype."""
        frequency_H = self.inv_freq.to(x.device)
        half = position_ids[:, :, None].to(torch.float32) * frequency_H
        angle = torch.cat((half, half), dim=-1)
        cosine, sine = angle.cos(), angle.sin()
        scale = self.attention_scaling
        return (cosine * scale).to(x.dtype), (sine * scale).to(x.dtype)


def rotate(
    x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Turns the first half of each head of x [B, N, T, H] against its second half."""
    cosine, sine = (part[:, None] for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def eager_attention_forward(
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
            # A paged cache adds its block tables to these arguments.
            key, value = cache.update(key, value, self.layer_idx, kwargs)
        # transformers looks for this call before it lets a user change the function.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
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


class LadderLlamaDecoderLayer(GradientCheckpointingLayer):
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
        self, *history: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """The streams [B, T, D] after this layer's blocks, and attention's weights.

        The weights are None where attention is not eager. `history` are the streams
        before, the newest last: separate arguments, since gradient checkpointing
        follows tensors and not lists of them.
        """
        if self.parallel:
            u = self.input_layernorm(history[-1])
            output, weights = self.self_attn(u, **kwargs)
            return history[-1] + (output + self.mlp(u)), weights
        u = self.input_layernorm(delayed(history, self.delays[0]))
        output, weights = self.self_attn(u, **kwargs)
        history = (*history, history[-1] + output)
        u = self.post_attention_layernorm(delayed(history, self.delays[1]))
        return history[-1], history[-1] + self.mlp(u), weights


def delayed(history: tuple[torch.Tensor, ...], delay: int) -> torch.Tensor:
    """The stream without the outputs of the newest `delay` blocks."""
    return history[max(len(history) - 1 - delay, 0)]


def kept_states(wanted: bool | int | list[int] | None, count: int) -> set[int]:
    """Which of `count` hidden states `output_hidden_states` asks for."""
    if isinstance(wanted, bool) or wanted is None:
        return set(range(count)) if wanted else set()
    indices = [wanted] if isinstance(wanted, int) else wanted
    return {range(count)[index] for index in indices}


class LadderLlamaPreTrainedModel(PreTrainedModel):
    """What transformers must know of the models below."""

    config_class = LadderLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LadderLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LadderLlamaRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies()[0])


class LadderLlamaModel(LadderLlamaPreTrainedModel):
    """The decoder without the output projection."""

    def __init__(self, config: LadderLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LadderLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LadderLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LadderLlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
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
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The normalised final stream, and the cache.

        `hidden_states` of the result are the embedding and the stream after each layer,
        the last one normalised; where `output_hidden_states` is a list of indices, the
        others are None. `attentions` are set for eager attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        attentions, states, as_dict, use_cache = self._wanted(
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            use_cache=use_cache,
        )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs each layer again, which would cache its keys twice.
            cache, use_cache = None, False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None or MASKS_TAKE_CACHE_POSITION:
            past = 0 if cache is None else cache.get_seq_length()
            cache_position = torch.arange(x.shape[1], device=x.device) + past
            if position_ids is None:
                position_ids = cache_position[None]
            if MASKS_TAKE_CACHE_POSITION:
                kwargs.setdefault("cache_position", cache_position)
        masks = self._masks(attention_mask, x, cache, position_ids, kwargs)
        rotation = self.rotary_emb(x, position_ids)
        kept = kept_states(states, len(self.layers) + 1)
        history: tuple[torch.Tensor, ...] = (x,)
        all_states, all_weights = [x if 0 in kept else None], []
        for i, layer in enumerate(self.layers):
            *streams, weights = layer(
                *history,
                rotation=rotation,
                attention_mask=masks[self.config.layer_types[i]],
                cache=cache,
                position_ids=position_ids,
                **kwargs,
            )
            # A later block reads no stream before these; the first is the embedding.
            history = (*history, *streams)[-self.depth :]
            all_states.append(history[-1] if i + 1 in kept else None)
            all_weights.append(weights if attentions else None)
        x = self.norm(history[-1])
        if len(self.layers) in kept:
            all_states[-1] = x
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(all_states) if kept else None,
            attentions=tuple(all_weights) if attentions else None,
            **{CACHE_FIELD: cache if use_cache else None},
        )
        return output.to_tuple() if as_dict is False else output

    def _wanted(self, **values: Any) -> list[Any]:
        """These arguments, or where one is None what the config says."""
        return [
            getattr(self.config, name, None) if value is None else value
            for name, value in values.items()
        ]

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
            "cache_position": kwargs.get("cache_position"),
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
        output_hidden_states: bool | int | list[int] | None = None,
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
