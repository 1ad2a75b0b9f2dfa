"""A tiny random Llama that transformers saves, and the same weights as a Loaded."""

import json

import jax.numpy as jnp
import torch
import transformers
from helpers import make_mesh
from jax import device_put, tree

from ladder_jax import config, model, sharding
from ladder_jax.data import tokenizer
from ladder_jax.loading import Loaded

TEXT = "The cat sat on the mat, and the naïve café in 東京 was closed 🙂. One two."
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save(folder, max_length=256, seed=0):
    """Writes the model and its tokenizer; returns the folder."""
    bpe = tokenizer.train([TEXT] * 5, 320)
    bpe.save(folder / "tokenizer.json")
    names = {f"{kind}_token": names[0] for kind, names in tokenizer.NAMES.items()}
    own = names | dict(
        tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATE
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    llama_config = transformers.LlamaConfig(
        vocab_size=328,
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


def load(folder, **mesh):
    """Returns the model that `save` wrote as a Loaded."""
    llama = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = {name: x.numpy() for name, x in llama.state_dict().items()}
    c = llama.config
    own = config.Model(
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        ffn_dim=c.intermediate_size,
        max_length=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        residual="standard",
        dtype="float32",
    )
    D, N, K, H = own.dim, own.heads, own.kv_heads, own.head_dim
    maps = {
        "attention.norm": ("input_layernorm", lambda x: x),
        "attention.wq": ("self_attn.q_proj", lambda x: x.T.reshape(D, N, H)),
        "attention.wk": ("self_attn.k_proj", lambda x: x.T.reshape(D, K, H)),
        "attention.wv": ("self_attn.v_proj", lambda x: x.T.reshape(D, K, H)),
        "attention.wo": ("self_attn.o_proj", lambda x: x.T.reshape(N, H, D)),
        "mlp.norm": ("post_attention_layernorm", lambda x: x),
        "mlp.gate": ("mlp.gate_proj", lambda x: x.T),
        "mlp.up": ("mlp.up_proj", lambda x: x.T),
        "mlp.down": ("mlp.down_proj", lambda x: x.T),
    }
    others = {
        "embedding": theirs["model.embed_tokens.weight"],
        "unembedding": theirs["lm_head.weight"].T,
        "norm": theirs["model.norm.weight"],
    }

    def value(name):
        if name in others:
            return jnp.asarray(others[name])
        part, convert = maps[name]
        names = [f"model.layers.{i}.{part}.weight" for i in range(own.layers)]
        return jnp.stack([convert(theirs[each]) for each in names])

    abstract = model.abstract(own)
    names = sharding.parameter_names(abstract)
    specs = sharding.parameter_specs(abstract)
    device_mesh = make_mesh(**mesh)
    parameters = tree.map(value, names)
    parameters = device_put(parameters, sharding.named_shardings(device_mesh, specs))
    own_config = config.Config(model=own, train=config.Train(seq_len=32))
    bpe = tokenizer.load(str(folder))
    return Loaded(parameters, own_config, bpe, device_mesh)
