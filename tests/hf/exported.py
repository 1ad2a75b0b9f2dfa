"""Folders of the exported modeling files, made from random models of ladder_jax."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ladder_jax import config, model, sharding
from ladder_jax.convert import ladder_llama
from ladder_jax.generate import empty_cache, make_forward

LAYERS = 3
SIZES = dict(
    vocab_size=97,
    dim=32,
    layers=LAYERS,
    heads=4,
    kv_heads=2,
    head_dim=10,
    ffn_dim=48,
    max_length=512,
    dtype="float32",
    init_std=0.1,
)


def make(residual, **fields):
    """A random model: every parameter is random, also norms and biases."""
    model_config = config.Model(**SIZES, residual=residual, **fields)
    parameters = model.init(model_config, jax.random.key(1))
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = lambda x, key: x + 0.1 * jax.random.normal(key, x.shape)
    return model_config, jax.tree.unflatten(tree, list(map(noise, leaves, keys)))


def tensors(model_config, parameters):
    """The state dict of transformers, by the tensor map of the Llama family."""
    D, H = model_config.dim, model_config.head_dim
    attention, mlp = parameters.layers.attention, parameters.layers.mlp
    found = {
        "model.embed_tokens.weight": parameters.embedding[...],
        "model.norm.weight": parameters.norm[...],
    }
    if parameters.unembedding is not None:
        found["lm_head.weight"] = parameters.unembedding[...].T
    for i in range(model_config.layers):
        at = f"model.layers.{i}."
        found[f"{at}input_layernorm.weight"] = attention.norm[i]
        if mlp.norm is not None:
            found[f"{at}post_attention_layernorm.weight"] = mlp.norm[i]
        for name in ("q", "k", "v"):
            weight_DNH = getattr(attention, f"w{name}")[i]
            found[f"{at}self_attn.{name}_proj.weight"] = weight_DNH.reshape(D, -1).T
            bias = getattr(attention, f"b{name}")
            if bias is not None:
                found[f"{at}self_attn.{name}_proj.bias"] = bias[i].reshape(-1)
        found[f"{at}self_attn.o_proj.weight"] = attention.wo[i].reshape(-1, D).T
        if attention.q_norm is not None:
            assert attention.q_norm[i].shape == (H,)
            found[f"{at}self_attn.q_norm.weight"] = attention.q_norm[i]
            found[f"{at}self_attn.k_norm.weight"] = attention.k_norm[i]
        for name in ("gate", "up", "down"):
            found[f"{at}mlp.{name}_proj.weight"] = getattr(mlp, name)[i].T
    to_torch = lambda x: torch.from_numpy(np.array(x, np.float32, order="C"))
    return {name: to_torch(x) for name, x in found.items()}


def hf_config(model_config):
    """The content of config.json."""
    rope = {"rope_type": "default", "rope_theta": model_config.rope_theta}
    scaling = model_config.rope_scaling
    if scaling.factor != 1:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {
        "vocab_size": model_config.vocab_size,
        "hidden_size": model_config.dim,
        "intermediate_size": model_config.ffn_dim,
        "num_hidden_layers": model_config.layers,
        "num_attention_heads": model_config.heads,
        "num_key_value_heads": model_config.kv_heads,
        "head_dim": model_config.head_dim,
        "max_position_embeddings": model_config.max_length,
        "rms_norm_eps": model_config.norm_eps,
        "tie_word_embeddings": model_config.tie_embeddings,
        "rope_parameters": rope,
        "attention_bias": model_config.qkv_bias,
        "qk_norm": model_config.qk_norm,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        **ladder_llama.schedule_keys(model_config.residual, model_config.layers),
    }


def write(folder, model_config, parameters):
    """Writes what transformers loads."""
    folder.mkdir(parents=True, exist_ok=True)
    values = ladder_llama.write_ladder_llama(folder, hf_config(model_config))
    (folder / "config.json").write_text(json.dumps(values))
    state = tensors(model_config, parameters)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder, **options):
    """transformers' model, with every tensor of the folder and no other."""
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return loaded.eval()


def logits(model_config, parameters, tokens_BT):
    """ladder_jax's logits [B, T, V]."""
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    B, T = tokens_BT.shape
    positions_BT = jnp.tile(jnp.arange(T), (B, 1))
    cache = empty_cache(model_config, mesh, B, T)
    forward = make_forward(model_config, mesh)
    return np.asarray(forward(parameters, tokens_BT, positions_BT, cache)[0])
