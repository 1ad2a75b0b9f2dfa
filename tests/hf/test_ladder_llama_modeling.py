"""The exported modeling file as a model of transformers: training, saving, casting,
compiling, and what its outputs hold.
"""

import copy
import json

import exported
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ladder_jax.convert import ladder_llama

RESIDUALS = ["ladder", "hybrid:last1", "delays:0,1,2,3,1,2", "parallel"]


@pytest.fixture(scope="module", params=RESIDUALS)
def folder(request, tmp_path_factory):
    made = exported.make(request.param, qk_norm=request.param == "ladder")
    return exported.write(tmp_path_factory.mktemp("m"), *made)


@pytest.fixture(scope="module")
def model(folder):
    return exported.load(folder)


def tokens(B=2, T=9, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 97, (B, T)))


def gradients(model, **options):
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(tokens(), labels=tokens(), **options).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(folder, reentrant):
    model = exported.load(folder, attn_implementation="eager").train()
    model.config.attention_dropout = 0.2
    expected_loss, expected = gradients(model)
    runs = []
    mlp = model.model.layers[1].mlp
    # Before and not after: the second pass stops as soon as it has what it needs.
    counted = mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # The cache would hold the keys of both passes: none is made.
    loss, found = gradients(model, use_cache=True)
    assert len(runs) == 2, "the backward pass must run each layer again"
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient)
    assert model(tokens(), use_cache=True).past_key_values is None
    counted.remove()
    with torch.no_grad():
        assert model.eval()(tokens(), use_cache=True).past_key_values is not None


def test_labels_that_are_shifted_already(model):
    ids = tokens()
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=ids).loss
    other = torch.zeros_like(ids)
    torch.testing.assert_close(
        model(ids, labels=other, shift_labels=shifted).loss, expected
    )


@torch.no_grad()
def test_the_hidden_states_that_are_asked_for(model):
    every = model(tokens(), output_hidden_states=True).hidden_states
    for wanted, kept in (([0, -1], {0, 3}), (2, {2}), ([1], {1})):
        found = model(tokens(), output_hidden_states=wanted).hidden_states
        assert [i for i, x in enumerate(found) if x is not None] == sorted(kept)
        assert all(torch.equal(found[i], every[i]) for i in kept)
    assert model(tokens()).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(tokens()).hidden_states) == 4
    model.config.output_hidden_states = False


@torch.no_grad()
def test_attention_implementations_agree_on_padded_rows(folder, model):
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    eager = exported.load(folder, attn_implementation="eager")
    for padding in (mask, mask.flip(1)):
        found = model(tokens(), attention_mask=padding).logits[padding.bool()]
        expected = eager(tokens(), attention_mask=padding).logits[padding.bool()]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    switched = copy.deepcopy(model)
    switched.set_attn_implementation("eager")
    attentions = switched(tokens(), output_attentions=True).attentions
    assert attentions[0].shape == (2, 4, 9, 9)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(model):
    ids = tokens(B=5)
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(model(ids).logits, alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_it_compiles_to_one_graph(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ids in (tokens(), tokens(T=12)):
        found = compiled(ids, use_cache=False, output_hidden_states=True)
        expected = model(ids, output_hidden_states=True)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.hidden_states, expected.hidden_states)


@torch.no_grad()
def test_built_without_memory_and_filled_later(folder, model):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    filled = empty.to_empty(device="cpu").eval()
    filled.init_weights()
    filled.load_state_dict(model.state_dict())
    filled.tie_weights()
    torch.testing.assert_close(filled(tokens()).logits, model(tokens()).logits)


@torch.no_grad()
def test_a_cast_does_not_round_the_rotary_frequencies(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    frequencies = model.model.rotary_emb.inv_freq
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(half.float().model.rotary_emb.inv_freq, frequencies)
    assert not [name for name in model.state_dict() if "inv_freq" in name]


def test_a_rotary_type_that_it_does_not_compute_is_refused(model):
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type='dynamic': it must be one of"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)


@torch.no_grad()
def test_resized_embeddings_stay_tied(tmp_path):
    made = exported.make("ladder", tie_embeddings=True)
    model = exported.load(exported.write(tmp_path / "a", *made))
    before = model(tokens()).logits
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(tokens()).logits[..., :97], before)
    model.save_pretrained(tmp_path / "b")
    loaded = exported.load(tmp_path / "b")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.vocab_size == 120
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


@torch.no_grad()
def test_the_decoder_alone(folder, model, tmp_path):
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    found = decoder(tokens()).last_hidden_state
    torch.testing.assert_close(found, model.model(tokens()).last_hidden_state)
    decoder.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(tokens()).last_hidden_state, found)


def test_from_config_and_the_saved_folder(folder, model, tmp_path):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "ladder_llama"
    built = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert built.state_dict().keys() == model.state_dict().keys()
    built.save_pretrained(tmp_path)
    for name in ladder_llama.FILES:
        theirs, ours = tmp_path / name, ladder_llama.FOLDER / name
        assert theirs.read_text() == ours.read_text()
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["auto_map"] == ladder_llama.AUTO_MAP
    assert values["model_type"] == "ladder_llama"
    saved = json.loads((folder / "config.json").read_text())
    assert values["delays"] == (saved.get("delays") or [0] * 6)
    assert values["parallel"] == bool(saved.get("parallel"))


def test_without_trust_it_does_not_load(folder):
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(folder, trust_remote_code=False)


def test_the_config_itself(tmp_path):
    reference = "configuration_ladder_llama.LadderLlamaConfig"
    made = get_class_from_dynamic_module(reference, str(ladder_llama.FOLDER))
    config = made(num_hidden_layers=2, delays=[0, 1, 2, 3], hidden_size=64)
    config.save_pretrained(tmp_path)
    assert made.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert made(**config.to_diff_dict()).to_dict() == config.to_dict()
