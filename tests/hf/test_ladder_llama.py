"""The exported modeling file computes what ladder_jax computes."""

import copy
import json

import exported
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ladder_jax import config, schedule
from ladder_jax.convert import ladder_llama

SCHEDULES = [
    "standard",
    "ladder",
    "ladder:2,1",
    "ladder:4,4",
    "hybrid:last1",
    "hybrid:0,2",
    "delays:0,1,2,3,1,2",
    "parallel",
]
ROPE = config.RopeScaling(factor=8.0, original_length=64)
VARIANTS = {
    "plain": {},
    "tied": dict(tie_embeddings=True),
    "biases": dict(qkv_bias=True, rope_scaling=ROPE),
    "qk_norm": dict(qk_norm=True, rope_theta=1e6, norm_eps=1e-3),
}


def tokens(B=2, T=40, seed=0):
    return np.random.default_rng(seed).integers(3, 97, (B, T))


@pytest.mark.parametrize("residual", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal(residual, variant, tmp_path):
    if variant != "plain" and residual not in ("ladder", "parallel"):
        pytest.skip("variants are tried with two schedules")
    made = exported.make(residual, **VARIANTS[variant])
    theirs = exported.load(exported.write(tmp_path, *made))
    ids = tokens()
    ours_BTV = exported.logits(*made, ids)
    with torch.no_grad():
        theirs_BTV = theirs(torch.from_numpy(ids)).logits.numpy()
    scale = ours_BTV.std()
    assert scale > 0.5
    np.testing.assert_allclose(theirs_BTV / scale, ours_BTV / scale, atol=2e-5)


WINDOWS = dict(
    sliding_window=5,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
)
# A class of transformers, what makes it differ from Llama, and the same in ours.
FAMILIES = {
    "llama": (
        transformers.LlamaConfig,
        dict(attention_bias=True, mlp_bias=True),
        dict(attention_bias=True, attention_out_bias=True, mlp_bias=True),
    ),
    "qwen2": (transformers.Qwen2Config, {}, dict(attention_bias=True)),
    "qwen3": (transformers.Qwen3Config, {}, dict(qk_norm=True)),
    "mistral": (
        transformers.MistralConfig,
        dict(sliding_window=7),
        dict(sliding_window=7),
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        dict(no_rope_layers=[1, 0, 1]),
        dict(no_rope_layers=[1, 0, 1]),
    ),
    "some-windows": (
        transformers.Qwen3Config,
        dict(use_sliding_window=True, **WINDOWS),
        dict(qk_norm=True, **WINDOWS),
    ),
    "gelu": (
        transformers.LlamaConfig,
        dict(hidden_act="gelu_pytorch_tanh"),
        dict(hidden_act="gelu_pytorch_tanh"),
    ),
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


def pair(family, rope, attention):
    """A random model of transformers' own class, and ours with the same tensors."""
    config_class, its_keys, our_keys = FAMILIES[family]
    rope = {**ROPES.get(rope, {"rope_type": "default"}), "rope_theta": 5000.0}
    common = dict(SMALL, rope_parameters=rope, pad_token_id=0, eos_token_id=2)
    base = config_class(**copy.deepcopy(common), **its_keys)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(base, attn_implementation=attention)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    own = class_of("LadderLlamaConfig")(**copy.deepcopy(common), **our_keys)
    own._attn_implementation = attention
    ours = class_of("LadderLlamaForCausalLM")(own)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def class_of(name):
    """A class of the exported files, loaded as transformers loads it."""
    module = "configuration" if name.endswith("Config") else "modeling"
    reference = f"{module}_ladder_llama.{name}"
    return get_class_from_dynamic_module(reference, str(ladder_llama.FOLDER))


CASES = [(name, None) for name in FAMILIES] + [("llama", name) for name in ROPES]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family, rope", CASES)
def test_without_delays_it_equals_transformers_own_class(family, rope, attention):
    theirs, ours = pair(family, rope, attention)
    ids = torch.from_numpy(tokens(T=60))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    same = [m.generate(ids, attention_mask=mask, **options) for m in (theirs, ours)]
    assert torch.equal(*same)


@pytest.mark.parametrize("residual", SCHEDULES)
def test_the_schedule_survives_a_round_trip(residual):
    keys = ladder_llama.schedule_keys(residual, 3)
    parsed = lambda text: schedule.parse(text, 3)
    assert parsed(ladder_llama.residual_of(keys, 3)) == parsed(residual)
    # The delays decide, not the text beside them.
    lying = keys | {"residual": "hybrid:1"}
    assert parsed(ladder_llama.residual_of(lying, 3)) == parsed(residual)


@pytest.mark.parametrize(
    "keys",
    [
        dict(delays=[0, 1]),
        dict(delays=[0, 2, 0, 0, 0, 0]),
        dict(delays=[-1] * 6),
        dict(delays="ladder"),
        dict(delays=[True] * 6),
        dict(delays=[0, 1, 0, 0, 0, 0], parallel=True),
        dict(parallel="yes"),
    ],
)
def test_wrong_schedules_are_one_line(keys):
    with pytest.raises(config.ConfigError) as error:
        ladder_llama.residual_of(keys, 3)
    assert "\n" not in str(error.value) and "delays" in str(error.value)


@pytest.mark.parametrize("residual", ["desync:2", "upper-bound"])
def test_a_schedule_of_tensor_shards_is_refused(residual):
    with pytest.raises(config.ConfigError, match="mesh.tensor"):
        ladder_llama.schedule_keys(residual, 3)


def test_it_is_never_labelled_llama(tmp_path):
    made = exported.make("hybrid:last1")
    exported.write(tmp_path, *made)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "ladder_llama"
    assert values["architectures"] == ["LadderLlamaForCausalLM"]
    # Without our file, transformers does not load it as something else.
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    "keys",
    [
        dict(delays=[1]),
        dict(delays=[1] * 6, parallel=True),
        dict(layer_types=["full_attention"]),
        dict(layer_types=["sliding_attention"] * 3),
        dict(layer_types=["other"] * 3),
        dict(no_rope_layers=[1]),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(keys):
    with pytest.raises(ValueError):
        class_of("LadderLlamaConfig")(**SMALL, **keys)


def test_save_and_load(tmp_path):
    made = exported.make("ladder", tie_embeddings=True)
    first = exported.load(exported.write(tmp_path / "a", *made))
    first.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "modeling_ladder_llama.py").exists()
    second = exported.load(tmp_path / "b")
    loaded_config = AutoConfig.from_pretrained(tmp_path / "b", trust_remote_code=True)
    assert loaded_config.delays == [1] * 6
    expected = first.state_dict()
    assert expected.keys() == second.state_dict().keys()
    assert all(torch.equal(x, expected[n]) for n, x in second.state_dict().items())
    ids = torch.from_numpy(tokens())
    assert torch.equal(first(ids).logits, second(ids).logits)
    half = exported.load(tmp_path / "b", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_loss_and_gradients(tmp_path):
    made = exported.make("ladder:2,1")
    theirs = exported.load(exported.write(tmp_path, *made))
    ids = torch.from_numpy(tokens())
    labels = ids.clone()
    labels[:, :5] = -100
    output = theirs(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten()
    )
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    without = [n for n, p in theirs.named_parameters() if p.grad is None]
    assert not without
