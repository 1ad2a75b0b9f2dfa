"""A real pretrained model, there and back: `make smollm2` must have fetched it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import ladder_jax
from ladder_jax import cli
from ladder_jax.data.chat import ChatEncoder
from ladder_jax.generate import empty_cache, make_forward

CHECKPOINT = Path(__file__).parents[2] / "runs" / "smollm2" / "checkpoint"
MESSAGES = [dict(role="user", content="What is the capital of France?")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKPOINT.exists(), reason="run `make smollm2` first"),
]


def convert(*words):
    assert cli.run(["convert", *map(str, words)]) == 0


def logits_of(loaded, ids):
    """Our logits [T, V] of one text."""
    model, mesh = loaded.config.model, loaded.mesh
    cache = empty_cache(model, mesh, 1, len(ids))
    positions_BT = np.arange(len(ids), dtype=np.int32)[None]
    forward = make_forward(model, mesh)
    found, _ = forward(loaded.model, np.array([ids], np.int32), positions_BT, cache)
    return np.asarray(found)[0]


def theirs_of(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=True
    )
    return model.eval(), tokenizer


def test_transformers_gives_the_same_answer(tmp_path):
    ours = ladder_jax.load(CHECKPOINT)
    convert("to-hf", CHECKPOINT, tmp_path / "out")
    model, tokenizer = theirs_of(tmp_path / "out")
    assert model.config.model_type == "llama"
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    ids = prompt["input_ids"]
    assert ChatEncoder(ours.tokenizer).prompt(MESSAGES) == ids
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=40,
        do_sample=False,
    )[0, len(ids) :]
    text = tokenizer.decode(found, skip_special_tokens=True)
    assert text == "".join(ours.generate(ids, max_tokens=40))
    assert text == "The capital of France is Paris."


def test_its_last_10_layers_made_ladder_load_there(tmp_path):
    convert("ladderize", CHECKPOINT, tmp_path / "ladder", "--layers", "last:10")
    convert("to-hf", tmp_path / "ladder", tmp_path / "out")
    ours = ladder_jax.load(tmp_path / "ladder")
    assert ours.config.model.residual == "hybrid:last10"
    model, tokenizer = theirs_of(tmp_path / "out")
    assert model.config.model_type == "ladder_llama"
    ids = tokenizer("The water of the river runs down to the sea. " * 8).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = logits_of(ours, ids)
    # Float32: 30 layers add thousands to some channels, in another order there. The
    # largest difference seen is 2.6e-5 of the logits' spread.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * expected.std())
    # The conversion changes the model: this is not the parent.
    parent = logits_of(ladder_jax.load(CHECKPOINT), ids)
    assert np.abs(found - parent).max() > 1
