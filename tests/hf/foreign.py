"""Hugging Face folders of tiny models with random weights, made by transformers."""

import json

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

from ladder_jax.data.tokenizer import byte_alphabet

SIZES = dict(
    vocab_size=288,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


def write_tokenizer(folder, bos=True):
    """A byte-level BPE tokenizer of 259 or 260 ids."""
    bpe = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
    names = ["<s>", "</s>", "<|im_end|>"] if bos else ["</s>", "<|im_end|>"]
    bpe.add_special_tokens(names)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.save(str(folder / "tokenizer.json"))
    settings = dict(eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast")
    settings |= dict(bos_token="<s>") if bos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write(folder, kind, seed=0, bfloat16=False, **fields):
    """Saves a model of `kind` with random weights of unit-scale logits; returns it."""
    torch.manual_seed(seed)
    values = SIZES | dict(pad_token_id=None, bos_token_id=256, eos_token_id=257)
    config = transformers.AutoConfig.for_model(kind, **values | fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 0
            noise = torch.randn_like(parameter)
            if "norm" in name:
                # Gemma's norms are stored around 0, the others around 1.
                parameter.copy_(0.1 * noise + (0.0 if kind == "gemma" else 1.0))
            elif "embed" in name:
                parameter.copy_(noise / 6)
            else:
                parameter.copy_(noise / (fan_in**0.5 if fan_in else 2.0))
    if bfloat16:
        model = model.to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return load(folder)


def load(folder, **options):
    """The model of a folder, in float32, as transformers reads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval()


def logits_of(model, ids_BT, mask_BT=None):
    """Logits [B, T, V] of transformers."""
    mask = torch.ones(np.shape(ids_BT)) if mask_BT is None else torch.tensor(mask_BT)
    with torch.no_grad():
        out = model(torch.tensor(ids_BT), attention_mask=mask.long())
    return out.logits.numpy()


def change_config(folder, **fields):
    """Changes keys of config.json; None as a string removes a key."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | fields
    values = {key: value for key, value in values.items() if value != "absent"}
    path.write_text(json.dumps(values))
