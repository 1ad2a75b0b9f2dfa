"""Conversion without other tools: what is refused, and that it leaves nothing."""

import json
import os
import re
import sys

import foreign_folder as foreign
import numpy as np
import pytest

import ladder_jax
from ladder_jax import cli
from ladder_jax.config import ConfigError
from ladder_jax.convert.safetensors_file import read_header, read_tensor, write_file
from ladder_jax.convert.safetensors_source import open_source
from ladder_jax.convert.source import TensorInfo


def run(*words):
    """The exit status of a command in this process."""
    return cli.run([str(word) for word in words])


def is_one_line(error, message):
    text = str(error.value)
    assert re.search(message, text), text
    assert "\n" not in text and len(text) < 600
    return True


# ---------------------------------------------------------------- what is refused

ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
REFUSED = {
    "no model_type": (dict(model_type="absent"), "model_type"),
    "unknown": (dict(model_type="bert"), "model_type='bert'.*llama"),
    "a billion layers": (dict(num_hidden_layers=10**9), "at most 10000"),
    "post-norms": (dict(model_type="glm4"), "norms after its blocks"),
    "a norm of all heads": (dict(model_type="olmo2"), "the queries of all heads"),
    "gemma3": (dict(model_type="gemma3_text"), "norms after its blocks"),
    "experts": (dict(model_type="qwen3_moe"), "experts"),
    "layer norm": (dict(model_type="starcoder2"), "LayerNorm"),
    "other class": (dict(architectures=["LlamaForTokenClassification"]), "architect"),
    "quantised": (dict(quantization_config=dict(quant_method="gptq")), "gptq"),
    "longrope": (dict(rope_scaling=dict(type="longrope", factor=2.0)), "longrope"),
    "dynamic": (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    "proportional": (
        dict(rope_parameters=dict(rope_type="proportional")),
        "proportional",
    ),
    "partial rotary": (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "partial in rope": (
        dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
        "partial_rotary_factor=0.5",
    ),
    "two bases": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), rope_theta=1e4),
        "two bases",
    ),
    "two kinds": (
        dict(rope_parameters=ROPE, rope_scaling=dict(rope_type="linear", factor=2.0)),
        "disagree",
    ),
    "rope by layer": (
        dict(
            rope_parameters=dict(
                full_attention=dict(rope_theta=1e6),
                sliding_attention=dict(rope_theta=1e4),
            )
        ),
        "the same for all kinds",
    ),
    "rope without factor": (
        dict(rope_scaling=dict(rope_type="linear")),
        "no factor",
    ),
    "rope is text": (dict(rope_scaling="yarn"), "an object or null"),
    "activation": (dict(hidden_act="quick_gelu"), "quick_gelu"),
    "two activations": (dict(hidden_activation="gelu"), "hidden_activation"),
    "no size": (dict(hidden_size="absent"), "no hidden_size"),
    "size is text": (dict(hidden_size="32"), "hidden_size='32'"),
    "negative": (dict(num_hidden_layers=-1), "num_hidden_layers=-1"),
    "kv heads": (dict(num_key_value_heads=3), "kv_heads=3"),
    "odd heads": (dict(num_attention_heads=5, num_key_value_heads=5), "hidden_size"),
    "odd head_dim": (dict(head_dim=3), "head_dim=3"),
    "flag is text": (dict(attention_bias="yes"), "attention_bias='yes'"),
    "layer_types": (
        dict(model_type="qwen3", architectures="absent", use_sliding_window=True)
        | dict(layer_types=["full_attention", "chunked_attention", "full_attention"]),
        "layer_types",
    ),
    "layer_types of another depth": (
        dict(model_type="ministral", architectures="absent")
        | dict(layer_types=["full_attention"]),
        "each of 3 layers",
    ),
    "no_rope_layers": (
        dict(model_type="smollm3", architectures="absent", no_rope_layers=[2, 1, 1]),
        "no_rope_layers",
    ),
    "not causal": (
        dict(model_type="gemma", architectures="absent", head_dim=4)
        | dict(use_bidirectional_attention=True, hidden_act="gelu_pytorch_tanh"),
        "causal",
    ),
    "ladder_layers": (
        dict(model_type="llamaLadder", ladder_layers="x"),
        "ladder_layers",
    ),
    "more ladder layers": (
        dict(model_type="llamaLadder", ladder_layers=9),
        "last9",
    ),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, fields, message):
    folder = tmp_path / "model"
    folder.mkdir()  # no weights: a refusal needs none
    values = {k: v for k, v in (foreign.CONFIG | fields).items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        ladder_jax.load_hf(folder)
    assert is_one_line(error, message)


# ---------------------------------------------------------------- damaged and lying


def truncated(folder, values):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder, values):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def no_safetensors(folder, values):
    (folder / "model.safetensors").write_bytes(b"not a header at all" * 9)


def empty_file(folder, values):
    (folder / "model.safetensors").write_bytes(b"")


def without(name):
    def change(folder, values):
        foreign.rewrite(folder, {k: v for k, v in values.items() if k != name})

    return change


def with_tensor(name, shape=(2, 2), dtype=np.float32):
    def change(folder, values):
        foreign.rewrite(folder, values | {name: np.zeros(shape, dtype)})

    return change


def text(name, content):
    return lambda folder, values: (folder / name).write_text(content)


def only(*names):
    def change(folder, values):
        for path in folder.iterdir():
            if path.name != "config.json":
                path.unlink()
        for name in names:
            (folder / name).write_text("{}")

    return change


def adapter(folder, values):
    only("adapter_config.json", "adapter_model.safetensors")(folder, values)
    (folder / "config.json").unlink()


def no_tokenizer(folder, values):
    (folder / "tokenizer.json").unlink()


def sentencepiece(folder, values):
    no_tokenizer(folder, values)
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\x05")


def more_tokens(folder, values):
    names = ["<s>", "</s>", *(f"<|{i}|>" for i in range(30))]
    foreign.write_tokenizer(folder, names)


def tied_config(folder, values):
    foreign.config_of(tie_word_embeddings=True)(folder, values)
    foreign.rewrite(folder, values | {"lm_head.weight": np.zeros((4, 4), np.float32)})


def header_of(length):
    def change(folder, values):
        path = folder / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return change


def overlapping(folder, values):
    """Two tensors of one shape in one place."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    gates = [name for name in header if "gate_proj" in name]
    header[gates[1]]["data_offsets"] = header[gates[0]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def longer(folder, values):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + bytes(16))


def eight_bit(folder, values):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"I8" ', 1))


DAMAGED = {
    "truncated": (truncated, "damaged"),
    "header cut": (cut_header, "damaged"),
    "no safetensors": (no_safetensors, "damaged"),
    "empty": (empty_file, "damaged"),
    "eight bits": (eight_bit, "quantised"),
    "a tensor is missing": (without("model.layers.1.mlp.up_proj.weight"), "lacks 1"),
    "no lm_head": (without("lm_head.weight"), "tie_word_embeddings is false"),
    "a bias": (
        with_tensor("model.layers.0.self_attn.o_proj.bias"),
        "does not explain.*o_proj.bias",
    ),
    "experts": (with_tensor("model.layers.0.mlp.experts.0.up_proj.weight"), "experts"),
    "LoRA": (with_tensor("model.layers.0.self_attn.q_proj.lora_A.weight"), "LoRA"),
    "another width": (foreign.config_of(intermediate_size=128), "shape.*config says"),
    "another vocabulary": (foreign.config_of(vocab_size=300), "shape.*config says"),
    "more layers": (foreign.config_of(num_hidden_layers=4), "lacks"),
    "fewer layers": (foreign.config_of(num_hidden_layers=2), "does not explain"),
    "fewer heads": (foreign.config_of(num_key_value_heads=2), "shape.*config says"),
    "tied, and a head of another shape": (tied_config, "lm_head.weight has shape"),
    "config is no JSON": (text("config.json", "{nope"), "config.json is not JSON"),
    "config is a list": (text("config.json", "[]"), "JSON object"),
    "pickles": (only("pytorch_model.bin"), "pickles"),
    "nothing": (only(), "no model.safetensors"),
    "adapter beside a config": (only("adapter_config.json"), "LoRA"),
    "adapter": (adapter, "LoRA"),
    "a stray shard": (only("model-00001-of-00002.safetensors"), "no model.safetensors"),
    "index without map": (text("model.safetensors.index.json", "{}"), "weight_map"),
    "index to elsewhere": (
        text("model.safetensors.index.json", '{"weight_map": {"x": "../x"}}'),
        "not the name of a file",
    ),
    "index to the root": (
        text("model.safetensors.index.json", '{"weight_map": {"x": "/etc/passwd"}}'),
        "not the name of a file",
    ),
    "index to its folder": (
        text("model.safetensors.index.json", '{"weight_map": {"x": ".."}}'),
        "is a folder",
    ),
    "index to a long name": (
        text(
            "model.safetensors.index.json",
            json.dumps(dict(weight_map=dict(x="a" * 5000))),
        ),
        "File name too long",
    ),
    "a header of many bytes": (header_of(2**63), "a header of 9223372036854775808"),
    "a header after the file": (header_of(99_000_000), "a header of 99000000"),
    "tensors that overlap": (overlapping, "starts at byte"),
    "bytes after the tensors": (longer, "damaged.*are promised"),
    "no tokenizer": (no_tokenizer, "no tokenizer.json"),
    "a damaged tokenizer.model": (
        sentencepiece,
        "tokenizer.model is damaged, or no file of SentencePiece",
    ),
    "tokenizer is no JSON": (text("tokenizer.json", "{"), "tokenizer.json"),
    "a template that does not end": (
        text("chat_template.jinja", "{% for m in messages %}{{ m }}"),
        "model is not accepted: the tokenizer's chat template is not a valid Jinja",
    ),
    "a template of another program": (
        text("tokenizer_config.json", '{"chat_template": "\\n{{ messages | shout }}"}'),
        r"No filter named 'shout'\. \(line 2\)",
    ),
    "tokens beyond the rows": (more_tokens, "288 ids.*272 rows"),
    "an end beyond the ids": (
        text("generation_config.json", '{"eos_token_id": [257, 999]}'),
        "eos_token_id=999",
    ),
}


@pytest.mark.parametrize("change, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_and_lying_folders_are_refused_and_leave_nothing(
    tmp_path, capsys, change, message
):
    values = foreign.write(tmp_path / "model")
    change(tmp_path / "model", values)
    assert run("convert", "from-hf", tmp_path / "model", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f: (f / "part-1.safetensors").unlink(),
            "part-1.safetensors is missing",
        ),
        (lambda f: swap(f), "does not hold"),
        (lambda f: forget(f), "does not name"),
        (lambda f: twice(f), "does not name lm_head.weight of part-0"),
    ],
)
def test_an_index_must_agree_with_its_files(tmp_path, change, message):
    foreign.write(tmp_path / "model", shards=3)
    assert ladder_jax.load_hf(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ConfigError) as error:
        ladder_jax.load_hf(tmp_path / "model")
    assert is_one_line(error, message)


def swap(folder):
    os.replace(folder / "part-1.safetensors", folder / "swapped")
    os.replace(folder / "part-2.safetensors", folder / "part-1.safetensors")
    os.replace(folder / "swapped", folder / "part-2.safetensors")


def twice(folder):
    """A tensor in two files, of which the index names one."""
    path = folder / "part-0.safetensors"
    infos = {name: place.info for name, place in read_header(path).items()}
    places = read_header(path)
    arrays = {name: np.array(read_tensor(path, x)) for name, x in places.items()}
    assert "lm_head.weight" not in infos
    info = TensorInfo((272, 32), np.dtype(np.float32))
    arrays["lm_head.weight"] = np.zeros(info.shape, info.dtype)
    write_file(path, infos | {"lm_head.weight": info}, arrays.__getitem__)


def forget(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere/at/all", "does not exist"),
        ("nowhere", "does not exist"),
        ("./org/model", "does not exist"),
    ],
)
def test_a_source_that_is_not_there(name, message):
    with pytest.raises(ConfigError) as error:
        open_source(name)
    assert is_one_line(error, message)


def test_a_name_on_the_hub_without_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"ladder_jax\[hf\]"):
        open_source("org/model")

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            raise OSError("no network\nat all")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(ConfigError) as error:
        open_source("org/model")
    assert is_one_line(error, "cannot be downloaded.*no network at all")


def test_a_repository_of_the_hub_is_a_folder(tmp_path, monkeypatch):
    foreign.write(tmp_path / "snapshot")

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert name == "org/model" and "*.safetensors" in allow_patterns
            return str(tmp_path / "snapshot")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert ladder_jax.load_hf("org/model").config.model.layers == 3


def test_a_parallel_model_is_not_made_of_layers_with_two_norms(tmp_path):
    foreign.write(tmp_path / "model")
    with pytest.raises(ConfigError, match="one norm"):
        ladder_jax.load_hf(tmp_path / "model", residual="parallel")
