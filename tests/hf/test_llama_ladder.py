"""Checkpoints in the form of the Ladder-Residual authors ("llamaLadder") import.

Their hybrid model is written here from their equations: two accumulated streams.
"""

import dataclasses
import json

import exported
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ladder_jax import config, schedule
from ladder_jax import model as models
from ladder_jax.convert import families
from ladder_jax.convert.safetensors_source import open_source

LAYERS = 4


def authors_forward(model, ladder_layers, ids):
    """Logits of the hybrid model over a Llama's parameters."""
    inner = model.model
    attention_stream = mlp_stream = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotation = inner.rotary_emb(attention_stream, positions)
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
    for i, layer in enumerate(inner.layers):
        attend = lambda x, layer=layer: layer.self_attn(
            layer.input_layernorm(x), rotation, mask
        )[0]
        mlp = lambda x, layer=layer: layer.mlp(layer.post_attention_layernorm(x))
        if i in ladder_layers:
            before = mlp_stream
            attention_stream = before + attend(attention_stream)
            mlp_stream = attention_stream + mlp(before)
        else:
            attention_stream = mlp_stream + attend(mlp_stream)
            mlp_stream = attention_stream + mlp(attention_stream)
    return model.lm_head(inner.norm(mlp_stream))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    values = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        rms_norm_eps=1e-5,
    )
    values._attn_implementation = "eager"
    return LlamaForCausalLM(values).eval()


def write(folder, llama, ladder_layers):
    """A folder as the authors' configs describe it: old rope keys, their auto_map."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_llama_ladder.LlamaConfig",
            "AutoModelForCausalLM": "modeling_llama_ladder.LadderLlamaForCausalLM",
        },
        "model_type": "llamaLadder",
        "ladder_layers": ladder_layers,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    state = {name: x.clone() for name, x in llama.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CASES = [
    (1, "hybrid:last1"),
    (3, "hybrid:last3"),
    (4, "ladder"),
    (0, "standard"),
    ([1, 2], "hybrid:1-2"),
    ([0, 3], "hybrid:0,3"),
    ([3], "hybrid:last1"),
]


@pytest.mark.parametrize("ladder_layers, residual", CASES, ids=str)
def test_it_becomes_a_hybrid(ladder_layers, residual, llama, tmp_path):
    source = open_source(str(write(tmp_path / "m", llama, ladder_layers)))
    found = schedule.parse(read(source).residual, LAYERS)
    assert found == schedule.parse(residual, LAYERS)


def read(source):
    model_config = families.read_config(source.config).model
    return dataclasses.replace(model_config, dtype="float32")


@pytest.mark.parametrize("ladder_layers", [2, [0, 2]], ids=str)
def test_logits_are_the_authors(ladder_layers, llama, tmp_path):
    source = open_source(str(write(tmp_path / "m", llama, ladder_layers)))
    model_config = read(source)
    numbers = ladder_layers
    if isinstance(ladder_layers, int):
        numbers = list(range(LAYERS - ladder_layers, LAYERS))
    ids = np.random.default_rng(0).integers(0, 97, (2, 40))
    with torch.no_grad():
        expected = authors_forward(llama, numbers, torch.from_numpy(ids)).numpy()
    parameters = from_state(llama, model_config)
    found = exported.logits(model_config, parameters, ids)
    scale = expected.std()
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)


def from_state(llama, model_config):
    """ladder_jax's parameters of a Llama's, by hand."""
    state = {name: x.numpy() for name, x in llama.state_dict().items()}
    parameters = models.init(model_config, jax.random.key(0))
    D, H = model_config.dim, model_config.head_dim
    stack = lambda name, map=lambda x: x: np.stack(
        [map(state[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)]
    )
    heads = lambda x: x.T.reshape(D, -1, H)
    attention, mlp = parameters.layers.attention, parameters.layers.mlp
    values = [
        (parameters.embedding, state["model.embed_tokens.weight"]),
        (parameters.norm, state["model.norm.weight"]),
        (parameters.unembedding, state["lm_head.weight"].T),
        (attention.norm, stack("input_layernorm")),
        (mlp.norm, stack("post_attention_layernorm")),
        (attention.wq, stack("self_attn.q_proj", heads)),
        (attention.wk, stack("self_attn.k_proj", heads)),
        (attention.wv, stack("self_attn.v_proj", heads)),
        (attention.wo, stack("self_attn.o_proj", lambda x: x.T.reshape(-1, H, D))),
        (mlp.gate, stack("mlp.gate_proj", np.transpose)),
        (mlp.up, stack("mlp.up_proj", np.transpose)),
        (mlp.down, stack("mlp.down_proj", np.transpose)),
    ]
    for parameter, value in values:
        assert parameter.shape == value.shape
        parameter[...] = jax.numpy.asarray(value)
    return parameters


@pytest.mark.parametrize("wrong", [5, -1, "last2", [4], [-1], [0.5], True, None])
def test_wrong_layers_are_one_line(wrong, llama, tmp_path):
    source = open_source(str(write(tmp_path / "m", llama, wrong)))
    with pytest.raises(config.ConfigError) as error:
        read(source)
    text = str(error.value)
    assert "\n" not in text and ("ladder_layers" in text or "residual" in text)
