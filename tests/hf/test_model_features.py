"""Options of the model against transformers, on random weights.

Each case builds a small model of transformers, copies its weights by the plain map of
names, and compares logits, packed rows, and greedy decoding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import BIASES, FAST, make_mesh

from ladder_jax import config, generate, model, rotary, sharding
from ladder_jax.serve.engine import Engine

V, LENGTH = 48, 40
SHAPES = {
    "grouped heads": dict(
        dim=32, layers=4, heads=4, kv_heads=2, head_dim=8, ffn_dim=56
    ),
    "one kv head": dict(dim=24, layers=4, heads=6, kv_heads=1, head_dim=4, ffn_dim=40),
}
# Name: class of transformers' config, its values, ours.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True), BIASES),
    "llama, mlp_bias": ("Llama", dict(mlp_bias=True), dict(mlp_bias=True)),
    "qwen3, attention_bias": (
        "Qwen3",
        dict(attention_bias=True),
        dict(qk_norm=True, qkv_bias=True, out_bias=True),
    ),
    "seed_oss": ("SeedOss", {}, dict(qkv_bias=True)),
    "mistral, window": ("Mistral", dict(sliding_window=6), dict(sliding_window=6)),
    "ministral": ("Ministral", dict(sliding_window=1), dict(sliding_window=1)),
    "qwen2, max_window_layers": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=3),
        dict(qkv_bias=True, sliding_window=7, window_layers="3"),
    ),
    "qwen3, layer_types": (
        "Qwen3",
        dict(
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        dict(qk_norm=True, sliding_window=9, window_layers="0,2"),
    ),
    "gelu": ("Llama", dict(hidden_act="gelu"), dict(activation="gelu")),
    "gemma": (
        "Gemma",
        dict(hidden_act="gelu_pytorch_tanh"),
        dict(activation="gelu_pytorch_tanh"),
    ),
    "gelu_pytorch_tanh": (
        "Mistral",
        dict(hidden_act="gelu_pytorch_tanh", sliding_window=None),
        dict(activation="gelu_pytorch_tanh"),
    ),
    "rope linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4)),
        dict(rope_scaling=config.RopeScaling(kind="linear", factor=3.0)),
    ),
    "rope llama3": (
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
                rope_theta=1e4,
            )
        ),
        dict(rope_scaling=config.RopeScaling(factor=8.0, original_length=16)),
    ),
    "rope yarn": (
        "Qwen3",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                rope_theta=1e4,
            )
        ),
        dict(
            qk_norm=True,
            rope_scaling=config.RopeScaling(
                kind="yarn", factor=4.0, original_length=16
            ),
        ),
    ),
    "rope yarn, all keys": (
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                factor=8.0,
                original_max_position_embeddings=16,
                rope_theta=1e4,
                beta_fast=3.0,
                beta_slow=0.2,
                truncate=False,
                mscale=0.7,
                mscale_all_dim=1.3,
            )
        ),
        dict(
            rope_scaling=config.RopeScaling(
                kind="yarn",
                factor=8.0,
                original_length=16,
                beta_fast=3.0,
                beta_slow=0.2,
                truncate=False,
                mscale=0.7,
                mscale_all_dim=1.3,
            )
        ),
    ),
    "smollm3": (
        "SmolLM3",
        dict(no_rope_layer_interval=2, mlp_bias=True),
        dict(nope_layers="1,3", rope_theta=2e6, mlp_bias=True),
    ),
    "smollm3, window without rope": (
        "SmolLM3",
        dict(
            no_rope_layers=[1, 1, 0, 1],
            use_sliding_window=True,
            sliding_window=5,
            attention_bias=True,
        ),
        dict(
            nope_layers="2",
            rope_theta=2e6,
            sliding_window=5,
            window_layers="2",
            qkv_bias=True,
            out_bias=True,
        ),
    ),
}
TENSORS = {  # ours: (name in transformers, whether it is a matrix to transpose)
    "attention.norm": ("input_layernorm.weight", False),
    "attention.wq": ("self_attn.q_proj.weight", True),
    "attention.wk": ("self_attn.k_proj.weight", True),
    "attention.wv": ("self_attn.v_proj.weight", True),
    "attention.wo": ("self_attn.o_proj.weight", True),
    "attention.bq": ("self_attn.q_proj.bias", False),
    "attention.bk": ("self_attn.k_proj.bias", False),
    "attention.bv": ("self_attn.v_proj.bias", False),
    "attention.bo": ("self_attn.o_proj.bias", False),
    "attention.q_norm": ("self_attn.q_norm.weight", False),
    "attention.k_norm": ("self_attn.k_norm.weight", False),
    "mlp.norm": ("post_attention_layernorm.weight", False),
    "mlp.gate": ("mlp.gate_proj.weight", True),
    "mlp.up": ("mlp.up_proj.weight", True),
    "mlp.down": ("mlp.down_proj.weight", True),
    "mlp.gate_bias": ("mlp.gate_proj.bias", False),
    "mlp.up_bias": ("mlp.up_proj.bias", False),
    "mlp.down_bias": ("mlp.down_proj.bias", False),
}
TOKENS = np.random.default_rng(1).integers(0, V, LENGTH)


@functools.cache
def pair(case: str, shape: str) -> tuple[Any, config.Model, model.Transformer]:
    """(a model of transformers, our configuration of it, our parameters of it)."""
    family, theirs, ours = CASES[case]
    sizes = SHAPES[shape]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=V,
        hidden_size=sizes["dim"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        intermediate_size=sizes["ffn_dim"],
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5} | theirs,
    )
    hugging = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for name, weight in hugging.named_parameters():
            # Gemma adds the 1 itself.
            one = name.endswith("norm.weight") and family != "Gemma"
            weight.copy_(0.25 * torch.randn_like(weight) + one)
    fields = dict(vocab_size=V, max_length=64, residual="standard", dtype="float32")
    ours = config.Model(**fields | sizes | ours)
    return hugging, ours, imported(hugging, ours)


def imported(hugging: Any, ours: config.Model) -> model.Transformer:
    """The weights of a model of transformers in our tree."""
    weights = {name: x.detach().numpy() for name, x in hugging.named_parameters()}
    if hugging.config.model_type == "gemma":  # it scales by sqrt(D) and by 1 + w
        embedding = "model.embed_tokens.weight"
        weights[embedding] = weights[embedding] * np.float32(ours.dim**0.5)
        weights |= {n: 1 + x for n, x in weights.items() if n.endswith("norm.weight")}
    abstract = model.abstract(ours)

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name in TENSORS:
            theirs, is_matrix = TENSORS[name]
            layers = [
                weights.pop(f"model.layers.{i}.{theirs}") for i in range(ours.layers)
            ]
            x = np.stack([x.T if is_matrix else x for x in layers])
        else:
            top = {"embedding": "model.embed_tokens", "norm": "model.norm"}
            x = weights.pop(f"{top.get(name, 'lm_head')}.weight")
            x = x.T if name == "unembedding" else x
        return jnp.asarray(x.reshape(leaf.shape))

    tree = jax.tree.map(read, sharding.parameter_names(abstract), abstract)
    assert not weights, f"tensors that our model has no place for: {list(weights)}"
    return tree


def their_logits(hugging: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return hugging(torch.from_numpy(tokens)[None]).logits[0].numpy()


def assert_close(actual: Any, expected: np.ndarray, what: str) -> None:
    """Logits differ by at most 2e-5 of their standard deviation."""
    error = np.abs(np.asarray(actual) - expected).max() / expected.std()
    assert error <= 2e-5, f"{what}: logits differ by {error:.1e}"


def packed_logits(
    ours: config.Model, parameters: model.Transformer, rows: list[list[int]]
) -> np.ndarray:
    """Logits [B, T, V] of a training step's forward pass over TOKENS.

    `rows`: the lengths of each row's documents.
    """
    segments = [np.repeat(np.arange(len(row)), row) for row in rows]
    positions = [np.concatenate([np.arange(length) for length in row]) for row in rows]
    arrays = map(jnp.asarray, ([TOKENS] * len(rows), positions, segments))

    def local(parameters: model.Transformer, *arrays: jax.Array) -> jax.Array:
        x_BTD, _ = model.hidden(parameters, ours, *arrays)
        return model.logits(parameters, ours, x_BTD)

    in_specs = sharding.parameter_specs(parameters), *[sharding.TOKENS] * 3
    run = sharding.shard_map(local, make_mesh(), in_specs, sharding.LOGITS)
    return np.asarray(jax.jit(run, compiler_options=FAST)(parameters, *arrays))


CASES_AND_SHAPES = pytest.mark.parametrize(
    "case, shape", [(case, shape) for case in CASES for shape in SHAPES]
)


@CASES_AND_SHAPES
def test_logits_are_those_of_transformers_in_packed_rows_too(
    case: str, shape: str
) -> None:
    hugging, ours, parameters = pair(case, shape)
    whole, packed = packed_logits(ours, parameters, [[LENGTH], [23, LENGTH - 23]])
    assert_close(whole, their_logits(hugging, TOKENS), case)
    first, second = np.split(TOKENS, [23])
    assert_close(packed[:23], their_logits(hugging, first), f"{case}, first document")
    assert_close(packed[23:], their_logits(hugging, second), f"{case}, second")


# Of each option one case; all others are slow.
QUICK_TO_DECODE = {
    ("llama, biases", "grouped heads"),
    ("mistral, window", "one kv head"),
    ("smollm3, window without rope", "grouped heads"),
    ("rope yarn, all keys", "one kv head"),
}


@pytest.mark.parametrize(
    "case, shape",
    [
        pytest.param(
            case,
            shape,
            marks=[] if (case, shape) in QUICK_TO_DECODE else pytest.mark.slow,
        )
        for case in CASES
        for shape in SHAPES
    ],
)
def test_greedy_decoding_with_a_cache_is_the_full_forward_pass(
    case: str, shape: str
) -> None:
    """The longest context is beyond every window of the cases."""
    hugging, ours, parameters = pair(case, shape)
    prompt = TOKENS[:7].tolist()
    tokens = list(
        generate.generate(parameters, ours, make_mesh(), prompt, max_tokens=30)
    )
    logits = their_logits(hugging, np.array(prompt + tokens))
    assert tokens == logits[6:-1].argmax(axis=-1).tolist()


@pytest.mark.parametrize("case", [name for name in CASES if "rope " in name])
def test_frequencies_are_those_of_transformers(case: str) -> None:
    hugging, ours, _ = pair(case, "grouped heads")
    theirs = hugging.model.rotary_emb
    scaling = ours.rope_scaling
    frequencies = rotary.frequencies(ours.head_dim, ours.rope_theta, scaling)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    factor = rotary.attention_factor(scaling)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


ENGINE = ["llama, biases", "qwen3, layer_types"]


@pytest.mark.parametrize("case", ENGINE)
def test_the_engine_serves_the_tokens_of_transformers(case: str) -> None:
    """Prefill in pieces, prefixes from the cache, two schedules of layers."""
    hugging, ours, parameters = pair(case, "grouped heads")
    options = config.Decode(
        slots=2,
        staging=2,
        steps_per_call=4,
        prefill_budget=8,
        max_length=48,
        prefix_memory="1MiB",
        prefix_block=4,
        unroll_layers=case != ENGINE[0],
        fit_shapes=False,
    )
    engine = Engine(parameters, ours, make_mesh(), options=options)
    prompts = [TOKENS[:n].tolist() for n in (19, 3, 21)]
    requests = [engine.submit(prompt, max_tokens=12) for prompt in prompts]
    for prompt, request in zip(prompts, requests):
        request.result()
        logits = their_logits(hugging, np.array(prompt + request.tokens))
        expected = logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        assert request.tokens == expected, (case, prompt)
