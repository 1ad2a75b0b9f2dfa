"""GGUF files as llama.cpp writes them, made from transformers' models at test time."""

import json

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers import decoders, models, pre_tokenizers, trainers

from ladder_jax.data.tokenizer import byte_alphabet

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool>"]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 2024, isn't it? We'll see.",
    "def f(x):\n    return x ** 2  # naïve café, 日本語 and Ελληνικά\n\n\n",
    "12 monkeys, 345 sheep and 6789 more; 3.14159 is π.",
]
# Texts on which tokenizers differ.
TRICKY = [
    "",
    " ",
    "Hello world",
    "  two  spaces   three",
    "line\nbreaks\r\n\r\n and\ttabs \n ",
    "naïve café e\u0301 日本語 Ελληνικά 🙂\u200d👩 ﷺ \u0000 \ufeff",
    "1 12 123 1234 3.14 1,000,000 x1y22",
    "don't I'LL we're 's ' s",
    "<|im_start|>user\nhi<|im_end|>\n<tool>x</tool><|endoftext|>",
    "<|im_start|><|im_start|> <|im_end",
    "a" * 300,
    "def f(x):\n    return x ** 2  # comment",
]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
)


def bpe(split=None):
    """A small byte-level BPE tokenizer; its first ids are special."""
    trained = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.pre_tokenizer = level if split is None else split
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=CONTROL,
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS * 3, trainer)
    return trained


def hf_model(kind="llama", **keys):
    """A random model of transformers."""
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[kind]
    vocabulary = bpe().get_vocab_size() + len(USER_DEFINED) + 3
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    values = dict(SIZES, vocab_size=vocabulary, rope_parameters=rope) | keys
    if kind == "qwen3":
        values["head_dim"] = 32
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def permute(x, heads):
    """Rows of a query or key matrix in llama.cpp's order: row by row."""
    half = len(x) // heads // 2
    rows = [
        head * 2 * half + pair + side * half
        for head in range(heads)
        for pair in range(half)
        for side in range(2)
    ]
    return x[rows]


def tensors(model, architecture):
    """{llama.cpp's name: float32 array}, with query and key rows in its order."""
    heads = {
        "q": model.config.num_attention_heads,
        "k": model.config.num_key_value_heads,
    }
    found = {}
    for name, x in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        x = x.float().numpy()
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}.{NAMES[module]}"
            which = module.removeprefix("self_attn.")[0]
            if architecture == "llama" and module[10:] in ("q_proj", "k_proj"):
                which = module[10]
                x = permute(x, heads[which])
        else:
            prefix = NAMES[module]
        found[f"{prefix}.{kind}"] = x
    return found


def write(path, model, kind=Kind.F32, architecture="llama", change=None, arrays=None):
    """Writes a GGUF file: matrices of `kind`, norms and biases float32.

    change: called with the writer before the tensors are added.
    arrays: more tensors, {name: float32 array}.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or 64 // config.num_attention_heads
    if architecture == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    add_tokenizer(writer, config.vocab_size)
    if change:
        change(writer)
    for name, x in (tensors(model, architecture) | (arrays or {})).items():
        if x.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(name, x.astype(np.float32))
        elif kind == Kind.F16:
            writer.add_tensor(name, x.astype(np.float16))
        else:
            data = gguf.quants.quantize(x, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, rows, pre="gpt-2"):
    trained = bpe()
    vocabulary = trained.get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    types = [3 if word in CONTROL else 1 for word in words]
    words, types = words + USER_DEFINED, types + [4] * len(USER_DEFINED)
    for i in range(rows - len(words)):
        words, types = [*words, f"[PAD{i}]"], [*types, 5]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types(types)
    merges = json.loads(trained.to_str())["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
