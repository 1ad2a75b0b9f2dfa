"""Hugging Face folders of tiny models, written without transformers."""

import json

import gguf
import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from ladder_jax.convert import layout
from ladder_jax.convert.families import read_config
from ladder_jax.convert.gguf_source import MODULES, OUTER
from ladder_jax.convert.safetensors_file import bytes_of, write_file
from ladder_jax.convert.source import TensorInfo
from ladder_jax.data.tokenizer import byte_alphabet

CONFIG = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=272,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    hidden_act="silu",
    bos_token_id=256,
    eos_token_id=257,
)


def infos_of(config, dtype=np.float32):
    """The tensors that a config needs: {name: TensorInfo}."""
    imported = read_config(config)
    model = imported.model
    return {
        tensor.name.format(layer): TensorInfo(
            layout.foreign_shape(tensor, model), np.dtype(dtype)
        )
        for tensor in imported.tensors
        for layer in range(model.layers if tensor.stacked else 1)
    }


def values_of(infos, seed=0):
    """Random values of these tensors."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(info.shape) / 6).astype(info.dtype)
        for name, info in infos.items()
    }


def write(folder, tokens=True, shards=1, dtype=np.float32, **fields):
    """Writes a folder; returns its tensors. `fields` change CONFIG."""
    config = {k: v for k, v in (CONFIG | fields).items() if v != "absent"}
    infos = infos_of(config, dtype)
    values = values_of(infos)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokens:
        write_tokenizer(folder)
    if shards == 1:
        write_file(folder / "model.safetensors", infos, values.__getitem__)
        return values
    weight_map = {
        name: f"part-{i % shards}.safetensors" for i, name in enumerate(infos)
    }
    for file in sorted(set(weight_map.values())):
        inside = {name: infos[name] for name in infos if weight_map[name] == file}
        write_file(folder / file, inside, values.__getitem__)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))
    return values


def write_holes(folder, **fields):
    """Writes a folder in bfloat16, whose weights are zeros that take no disk."""
    config = CONFIG | fields
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    header, end = {}, 0
    for name, info in infos_of(config, ml_dtypes.bfloat16).items():
        start, end = end, end + bytes_of(info)
        row = dict(dtype="BF16", shape=info.shape, data_offsets=[start, end])
        header[name] = row
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_gguf(path, values, files=1, **fields):
    """Writes tensors of a llama (see `write`) as a GGUF file with its tokenizer.

    files: how many, with the tensors divided evenly. Returns the path of the first.
    """
    config = CONFIG | fields
    heads = config["num_attention_heads"]
    most = -(-len(values) // files) if files > 1 else 0
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=most)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = [*byte_alphabet(), "<s>", "</s>", "<|im_end|>", "ab"]
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {theirs: ours for ours, theirs in (OUTER | MODULES).items()}
    for name, array in values.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            ours = f"blk.{layer}.{names[module]}.weight"
        else:
            ours = names[name]
        if module.endswith(("q_proj", "k_proj")):  # llama.cpp turns neighbours
            rows = array.reshape(heads, 2, -1, array.shape[1])
            array = rows.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(ours, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (
        path if files == 1 else path.with_name(f"{path.stem}-00001-of-{files:05}.gguf")
    )


def write_tokenizer(folder, names=("<s>", "</s>", "<|im_end|>"), **settings):
    """A byte-level BPE tokenizer of 256 bytes and these special tokens."""
    bpe = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
    bpe.add_special_tokens(list(names))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.save(str(folder / "tokenizer.json"))
    settings = dict(bos_token="<s>", eos_token="</s>") | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def rewrite(folder, values, **dtypes):
    """Writes these tensors as the folder's only weights."""
    infos = {k: TensorInfo(v.shape, v.dtype) for k, v in values.items()}
    write_file(folder / "model.safetensors", infos, values.__getitem__)


def config_of(**fields):
    """change(folder, values) writes a config.json with these fields."""

    def change(folder, values):
        (folder / "config.json").write_text(json.dumps(CONFIG | fields))

    return change
