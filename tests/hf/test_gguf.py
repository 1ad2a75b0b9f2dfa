"""GGUF files: weights, config and tokenizer are those that transformers had."""

import json
import math
import struct

import gguf
import gguf_files
import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_files import TRICKY

import ladder_jax
from ladder_jax import cli, inspection
from ladder_jax.config import ConfigError
from ladder_jax.convert import gguf_tokenizer
from ladder_jax.convert.gguf_file import GGUFFile
from ladder_jax.convert.gguf_source import open_gguf
from ladder_jax.data.tokenizer import HuggingFace, from_files

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
CAN_QUANTISE = [
    Kind.Q4_0,
    Kind.Q4_1,
    Kind.Q5_0,
    Kind.Q5_1,
    Kind.Q8_0,
    Kind.MXFP4,
]


def read_all(source):
    for name, info in source.tensors.items():
        x = source.read(name)
        assert x.shape == info.shape and x.dtype == info.dtype, name
        yield name, x.astype(np.float32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config_are_transformers_own(architecture, tied, tmp_path):
    model = gguf_files.hf_model(architecture, tie_word_embeddings=tied)
    path = tmp_path / "m.gguf"
    source = open_gguf(gguf_files.write(path, model, architecture=architecture))
    expected = model.state_dict()
    if tied:
        del expected["lm_head.weight"]
    found = dict(read_all(source))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name].numpy(), name)
    loaded = transformers.AutoConfig.for_model(**source.config)
    assert type(loaded) is type(model.config)
    for name in (*gguf_files.SIZES, "rope_parameters", "tie_word_embeddings"):
        if name != "initializer_range":
            assert getattr(loaded, name) == getattr(model.config, name), name
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 0)


@pytest.mark.parametrize("keys", [dict(attention_bias=True), dict(mlp_bias=True)])
def test_biases(keys, tmp_path):
    model = gguf_files.hf_model("llama", **keys)
    source = open_gguf(gguf_files.write(tmp_path / "m.gguf", model))
    expected = model.state_dict()
    found = dict(read_all(source))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name].numpy(), name)
    assert {name: source.config[name] for name in keys} == keys


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, *CAN_QUANTISE])
def test_every_kind_equals_transformers_loading(kind, tmp_path):
    model = gguf_files.hf_model("llama")
    source = open_gguf(gguf_files.write(tmp_path / "m.gguf", model, kind))
    dtypes = {Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.tensors[name].dtype == dtypes.get(kind, np.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    for name, x in read_all(source):
        np.testing.assert_allclose(x, theirs[name].numpy(), atol=1e-7, err_msg=name)
        original = model.state_dict()[name].numpy()
        assert np.abs(x - original).max() < 0.15


@pytest.mark.parametrize("kind", gguf.quants._type_traits, ids=lambda kind: kind.name)
def test_every_kind_that_the_package_dequantises_is_read(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 64, (4, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "m.gguf").read("x")
    assert found.shape == (4, 2 * block)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, kind)
    np.testing.assert_array_equal(found.astype(np.float32), expected)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0])
def test_inspect_reads_no_weights(kind, tmp_path, monkeypatch, capsys):
    model = gguf_files.hf_model("qwen2")
    path = gguf_files.write(tmp_path / "m.gguf", model, kind, "qwen2")
    monkeypatch.setattr(GGUFFile, "read", None)
    report = inspection.inspect(path)
    assert (report["format"], report["family"]) == ("GGUF", "qwen2")
    assert report["parameters"] == sum(x.numel() for x in model.state_dict().values())
    assert report["model"]["qkv_bias"] and report["model"]["layers"] == 2
    assert report["tokenizer"]["chat_template"]
    assert cli.run(["inspect", str(path)]) == 0
    assert "GGUF qwen2" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:200])
    assert cli.run(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert "m.gguf" in error and error.count("\n") == 1


def llama3_factors(config):
    """One divisor a frequency, from transformers' own frequencies."""
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
        config, "cpu"
    )
    plain = 5000.0 ** -(torch.arange(0, 16, 2) / 16)
    return {"rope_freqs.weight": (plain / scaled).numpy()}


def test_llama3_rope_factors(tmp_path):
    model = gguf_files.hf_model("llama", rope_parameters=LLAMA3)
    arrays = llama3_factors(model.config)
    assert arrays["rope_freqs.weight"].max() == pytest.approx(8)
    path = gguf_files.write(tmp_path / "m.gguf", model, arrays=arrays)
    source = open_gguf(path)
    assert source.config["rope_parameters"] == LLAMA3
    assert "rope_freqs.weight" not in source.tensors
    arrays["rope_freqs.weight"][2] *= 1.01
    gguf_files.write(path, model, arrays=arrays)
    with pytest.raises(ConfigError, match="rope_freqs"):
        open_gguf(path)


@pytest.mark.parametrize(
    "add, expected",
    [
        (lambda w: w.add_rope_scaling_factor(4.0), dict(rope_type="linear", factor=4)),
        (
            lambda w: (
                w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                w.add_rope_scaling_factor(4.0),
                w.add_rope_scaling_orig_ctx_len(32),
            ),
            dict(rope_type="yarn", factor=4, original_max_position_embeddings=32),
        ),
        (
            lambda w: (
                w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
                w.add_rope_scaling_factor(4.0),
            ),
            None,
        ),
        (lambda w: None, None),
    ],
)
def test_rope_scaling(add, expected, tmp_path):
    model = gguf_files.hf_model("llama")
    source = open_gguf(gguf_files.write(tmp_path / "m.gguf", model, change=add))
    assert source.config["rope_scaling"] == expected
    assert source.config["rope_theta"] == 5000


def test_several_files_are_one_model(tmp_path):
    model = gguf_files.hf_model("llama")
    whole = gguf_files.tensors(model, "llama")
    names = list(whole)
    for number, part in enumerate((names[:7], names[7:]), 1):
        path = tmp_path / f"m-{number:05}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 1:
            config = model.config
            writer.add_block_count(2)
            writer.add_context_length(128)
            writer.add_embedding_length(64)
            writer.add_feed_forward_length(96)
            writer.add_head_count(4)
            writer.add_head_count_kv(2)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_int32("split.tensors.count", len(names))
            gguf_files.add_tokenizer(writer, config.vocab_size)
        writer.add_uint16("split.count", 2)
        for name in part:
            writer.add_tensor(name, whole[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = dict(read_all(open_gguf(tmp_path / "m-00001-of-00002.gguf")))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name].numpy(), name)
    with pytest.raises(ConfigError, match="first"):
        GGUFFile(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return gguf_files.write(path, gguf_files.hf_model("llama")).read_bytes()


def refused(path):
    """The one line about a file that cannot be opened."""
    with pytest.raises(ConfigError) as error:
        open_gguf(path)
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    return text


def test_a_file_cut_off_anywhere_is_one_line(good, tmp_path):
    path = tmp_path / "m.gguf"
    sizes = [0, 1, 3, 4, 7, 8, 20, 24, 30, 100, 1000, 5000, 10000]
    random = np.random.default_rng(0)
    sizes += [*random.integers(0, len(good), 60), len(good) - 40]
    for size in sizes:
        path.write_bytes(good[: int(size)])
        assert "cut off" in (text := refused(path)) or "not a GGUF" in text


def test_damaged_counts_are_one_line_and_end(good, tmp_path):
    """A count, a length or a type that lies does not make the reader run for ever."""
    path = tmp_path / "m.gguf"
    random = np.random.default_rng(0)
    header = 30000
    for _ in range(150):
        data = bytearray(good)
        at = int(random.integers(4, header))
        data[at : at + 8] = struct.pack("<Q", int(random.integers(0, 2**63)))
        path.write_bytes(data)
        try:
            open_gguf(path)  # a changed character of a token is no damage
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "cut off"),
    ],
)
def test_no_gguf_file(data, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    assert message in refused(tmp_path / "m.gguf")


def test_no_file(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.gguf")
    assert "is a folder: it must be a file" in refused(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.add_expert_count(8), "expert_count=8"),
        (lambda w: w.add_attention_scale(0.1), "attention.scale"),
        (lambda w: w.add_logit_scale(0.1), "logit_scale"),
        (lambda w: w.add_causal_attention(False), "causal"),
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count=8"),
        (lambda w: w.add_key_length(12), "value_length=16"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
        (lambda w: w.add_uint16("split.count", 3), "3 files"),
    ],
)
def test_what_is_not_supported_is_named(change, message, tmp_path):
    model = gguf_files.hf_model("llama")
    if "value" in message:
        change = lambda w: (w.add_key_length(12), w.add_value_length(16))
    text = refused(gguf_files.write(tmp_path / "m.gguf", model, change=change))
    assert message in text


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "llama4", "mamba"])
def test_unknown_architectures(architecture, tmp_path):
    path = tmp_path / "m.gguf"
    gguf_files.write(path, gguf_files.hf_model("llama"), architecture=architecture)
    assert "must be one of llama, qwen2, qwen3" in refused(path)


def test_unknown_tensors(tmp_path):
    arrays = {"blk.0.attn_post_norm.weight": np.ones(64, np.float32)}
    model = gguf_files.hf_model("llama")
    path = gguf_files.write(tmp_path / "m.gguf", model, arrays=arrays)
    assert "attn_post_norm" in refused(path)


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def metadata(good, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    path.write_bytes(good)
    return GGUFFile(path).metadata


def tokenizer(metadata, **changes):
    changed = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return gguf_tokenizer.texts({**metadata, **changed}, 10**6, "m.gguf")


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_tokenizers_equal_transformers(pre, good, metadata, tmp_path):
    made = tokenizer(metadata, pre=pre)
    ours = tokenizers.Tokenizer.from_str(made["tokenizer.json"])
    # transformers reads the name of the pre-tokenizer from the file.
    model = gguf_files.hf_model("llama")
    change = lambda w: w.kv_data[0]["tokenizer.ggml.pre"].__setattr__("value", pre)
    gguf_files.write(tmp_path / "m.gguf", model, change=change)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    nfc = pre == "qwen2"  # the model's own tokenizer has it; transformers drops it
    for text in TRICKY:
        if nfc and "\u0301" in text:
            continue
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        # The library joins the parts of a character; nothing is lost.
        assert ours.decode(expected, skip_special_tokens=False) == text


def test_smollm_splits_digits(metadata):
    made = tokenizer(metadata, pre="smollm")["tokenizer.json"]
    ours = tokenizers.Tokenizer.from_str(made)
    pieces = ours.pre_tokenizer.pre_tokenize_str("x 12½٣ y")
    assert [piece for piece, _ in pieces][:4] == ["x", "Ġ", "1", "2"]
    assert len(pieces) == 7


def test_special_tokens_and_template(metadata):
    made = tokenizer(metadata, pre="gpt-2")
    assert made["chat_template.jinja"] == "{{ messages[0]['content'] }}"
    ends = json.loads(made["generation_config.json"])["eos_token_id"]
    assert ends == [0, 2]  # eos of the file, and <|im_end|>
    assert json.loads(tokenizer(metadata, eot_token_id=1)["generation_config.json"])[
        "eos_token_id"
    ] == [0, 1]
    ours = from_files(made.get, "m.gguf")
    assert isinstance(ours, HuggingFace)
    assert (ours.bos, ours.eos, ours.eos_ids) == (1, 0, (0, 2))
    ids = ours.prompt("<|im_start|>hi<tool>")
    assert ids[0] == 1 and ids[-1] == 360
    assert ours.encode("<|im_start|>")[0] != 1
    with_bos = from_files(tokenizer(metadata, add_bos_token=True).get, "m.gguf")
    assert with_bos.prompt("hi")[0] == 1
    assert from_files(made.get, "m.gguf").prompt("hi")[0] != 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="llama"), "no score of every token"),
        (dict(model="t5"), "SentencePiece"),
        (dict(model="bert"), "bert"),
        (dict(model=None), "no tokenizer.ggml.model"),
        (dict(pre="unheard-of"), "unheard-of"),
        (dict(tokens=[]), "tokens"),
        (dict(tokens=["a", "a"], token_type=[1, 1]), "twice"),
        (dict(token_type=[1]), "types"),
        (dict(merges=["a"]), "merge"),
        (dict(merges=["zz zz"]), "merge"),
        (dict(merges=None), "merges"),
        (dict(eos_token_id=10**6), "eos_token_id"),
        (dict(bos_token_id="x"), "bos_token_id"),
    ],
)
def test_wrong_tokenizers_are_one_line(changes, message, metadata):
    with pytest.raises(ConfigError) as error:
        tokenizer(metadata, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_more_tokens_than_rows(metadata):
    with pytest.raises(ConfigError, match="rows"):
        gguf_tokenizer.texts(metadata, 10, "m.gguf")


# ---------------------------------------------------------------- the whole way


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_the_command_imports_a_model_that_computes_the_same(kind, tmp_path):
    model = gguf_files.hf_model("llama", rope_parameters=LLAMA3)
    path = tmp_path / "m.gguf"
    gguf_files.write(path, model, kind, arrays=llama3_factors(model.config))
    assert cli.run(["convert", "from-gguf", str(path), str(tmp_path / "run")]) == 0
    loaded = ladder_jax.load(tmp_path / "run")
    assert loaded.config.model.residual == "standard"
    source = open_gguf(path)
    state = {name: torch.from_numpy(np.array(x)) for name, x in read_all(source)}
    model.load_state_dict(state)
    text = gguf_files.TEXTS[0]
    ours_TV, ids = loaded.logits(text)
    assert ids == loaded.tokenizer.prompt(text)
    with torch.no_grad():
        theirs_TV = model(torch.tensor([ids])).logits[0, :, : ours_TV.shape[-1]]
    assert math.isclose(float(jax.numpy.std(ours_TV)), 1, rel_tol=0.9)
    np.testing.assert_allclose(ours_TV, theirs_TV, atol=3e-5)


def test_another_tokenizer_in_place_of_one_that_is_not_supported(tmp_path, capsys):
    path = tmp_path / "m.gguf"

    def change(writer):
        writer.kv_data[0]["tokenizer.ggml.model"].value = "t5"

    gguf_files.write(path, gguf_files.hf_model("llama"), change=change)
    words = ["convert", "from-gguf", str(path), str(tmp_path / "run")]
    assert cli.run(words) == 2
    error = capsys.readouterr().err
    assert "SentencePiece" in error and "--tokenizer" in error
    assert not (tmp_path / "run").exists()
    gguf_files.bpe().save(str(tmp_path / "tokenizer.json"))
    assert cli.run([*words, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert ladder_jax.load(tmp_path / "run").tokenizer.size == 360
