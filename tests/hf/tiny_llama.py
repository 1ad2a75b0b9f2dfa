"""A tiny random Llama that transformers saves."""

import json

import torch
import transformers

from ladder_jax.data import tokenizer

TEXT = "The cat sat on the mat, and the naïve café in 東京 was closed 🙂. One two."
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save(folder, max_length=256, seed=0, vocab_size=328):
    """Writes the model and its tokenizer; returns the folder."""
    bpe = tokenizer.train([TEXT] * 5, 320)
    bpe.save(folder / "tokenizer.json")
    names = {f"{kind}_token": names[0] for kind, names in tokenizer.NAMES.items()}
    own = names | dict(
        tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATE
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    llama_config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max_length,
        initializer_range=0.3,
        bos_token_id=bpe.bos,
        eos_token_id=bpe.eos,
        pad_token_id=bpe.pad,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(seed)
    llama = transformers.LlamaForCausalLM(llama_config)
    # It generates ASCII and eos: lm-eval sees texts alone, and bytes that are not UTF-8
    # would be lost. Ids that are padding of the vocabulary are no text, either.
    for token in set(range(llama_config.vocab_size)) - {bpe.eos}:
        text = bpe.token_bytes(token, None) or b"\xff"
        if not text.isascii() or not text.decode().isprintable():
            llama.lm_head.weight.data[token] = 0
    llama.save_pretrained(folder)
    return folder
