"""Files of other programs: whatever is in one, an import ends, in one line.

A wrong type, a damaged byte or a pipe in the place of a file must not reach the user as
a traceback, nor a wait without an end. tests/test_convert_refusals.py has the messages.
"""

import json
import os
import random

import foreign_folder as foreign
import numpy as np
import pytest

import ladder_jax
from ladder_jax import cli
from ladder_jax.config import ConfigError
from ladder_jax.convert import gguf_file, gguf_tokenizer, layout
from ladder_jax.convert.families import FAMILIES, read_config
from ladder_jax.convert.from_hf import prepare
from ladder_jax.convert.gguf_source import open_gguf
from ladder_jax.convert.safetensors_file import read_header, write_file
from ladder_jax.convert.source import TensorInfo
from ladder_jax.data.foreign_files import parse_object
from ladder_jax.data.tokenizer_files import read_special

HUGE = 10**400  # more than a float holds


def is_refused(function, *arguments):
    """Whether a call raises ConfigError, of one short line. Other errors are raised."""
    try:
        function(*arguments)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 700, str(error)[:900]
        return True
    return False


# ---------------------------------------------------------------- no files


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


def link_to_nothing(path):
    path.symlink_to("nowhere")


NO_FILES = {
    "a folder": (lambda path: path.mkdir(), "is a folder: it must be a file"),
    "a pipe": (pipe, "is a device or a pipe: it must be a file"),
    "a link to itself": (loop, "cannot be read: Too many levels of symbolic links"),
    "a link to nothing": (link_to_nothing, "is a link to 'nowhere', which does not"),
}
NAMES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_named(tmp_path, capsys, name, kind):
    make, message = NO_FILES[kind]
    folder = tmp_path / "model"
    foreign.write(folder)
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    words = ["convert", "from-hf", str(folder), str(tmp_path / "out")]
    assert cli.run(words) == 2
    error = capsys.readouterr().err
    assert f"{folder / name} {message}" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_gguf_file_is_named(tmp_path, kind):
    make, message = NO_FILES[kind]
    make(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match=message):
        open_gguf(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="does not exist"):
        open_gguf(tmp_path / "y.gguf")


@pytest.mark.parametrize("name", ["a\0b", "a" * 3000, "~nobody-of-this-name/x"])
@pytest.mark.parametrize("command", ["from-hf", "from-gguf", "out", "inspect"])
def test_names_that_no_file_has(tmp_path, capsys, name, command):
    foreign.write(tmp_path / "model")
    words = {
        "out": ["convert", "from-hf", str(tmp_path / "model"), name],
        "inspect": ["inspect", name],
    }
    assert cli.run(words.get(command, ["convert", command, name, "out"])) == 2
    error = capsys.readouterr().err
    assert "is not accepted" in error and error.count("\n") == 1 and len(error) < 300


# ---------------------------------------------------------------- JSON


def test_a_key_that_is_there_twice():
    assert parse_object('{"a": 1, "b": {"a": 1, "a": 1}}', "it") == {
        "a": 1,
        "b": {"a": 1},
    }
    for text in ('{"a": 1, "a": 2}', '{"b": [{"a": null, "a": 1, "a": 1}]}'):
        with pytest.raises(ConfigError, match="it is not accepted: it has 'a' twice"):
            parse_object(text, "it")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_with_a_key_twice_is_not_read(tmp_path, name):
    foreign.write(tmp_path / "model")
    path = tmp_path / "model" / name
    text = path.read_text()
    first = next(iter(json.loads(text)))
    path.write_text(f'{text.strip()[:-1]}, "{first}": "another"}}')
    with pytest.raises(ConfigError, match=f"{name} is not .* has '{first}' twice"):
        ladder_jax.load_hf(tmp_path / "model")


# ---------------------------------------------------------------- wrong types

WRONG = [None, [], {}, "x", "", -1, 0, 1, 1.5, 2**31, HUGE, -HUGE, True, False]
WRONG += [float("nan"), float("inf"), "\ud800", [[1]], [1, {}, "x"], [None] * 3]
WRONG += [{"a": 1}, {"a": {}}]
KEYS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings tie_word_embeddings hidden_act
    hidden_activation architectures model_type rope_theta rope_scaling rope_parameters
    rms_norm_eps initializer_range attention_bias mlp_bias attention_out_bias qk_norm
    sliding_window use_sliding_window max_window_layers layer_types no_rope_layers
    no_rope_layer_interval use_bidirectional_attention ladder_layers delays parallel
    residual attention_multiplier embedding_multiplier residual_multiplier
    logits_scaling partial_rotary_factor original_max_position_embeddings
    quantization_config
""".split()
ROPE = dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE_KEYS = """
    rope_type type factor low_freq_factor high_freq_factor rope_theta beta_fast
    beta_slow truncate attention_factor mscale mscale_all_dim partial_rotary_factor
    original_max_position_embeddings
""".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_any_type_in_any_key_is_read_or_refused(family):
    base = foreign.CONFIG | dict(model_type=family, use_sliding_window=True)
    base |= dict(architectures=None, ladder_layers=1)
    rows = [base | {key: value} for key in KEYS for value in WRONG]
    for kind in ("linear", "llama3", "yarn"):
        for key in ROPE_KEYS:
            for form in ("rope_scaling", "rope_parameters"):
                rope = ROPE | dict(rope_type=kind)
                rows += [base | {form: rope | {key: value}} for value in WRONG]
    refused = sum(is_refused(read_config, row) for row in rows)
    assert len(rows) / 4 < refused < len(rows)


def test_a_value_of_any_type_in_the_tokenizers_files_is_read_or_refused():
    for key in ("bos_token", "eos_token", "chat_template", "add_bos_token"):
        for value in WRONG:
            settings = {"eos_token": "</s>"} | {key: value}
            files = {"tokenizer_config.json": json.dumps(settings)}
            is_refused(read_special, files.get, [])
    for name in ("generation_config.json", "config.json"):
        for value in WRONG:
            files = {name: json.dumps({"eos_token_id": value})}
            is_refused(read_special, files.get, ["</s>"])


# ---------------------------------------------------------------- damaged bytes


def test_a_header_of_safetensors_with_any_byte_changed_is_read_or_refused(tmp_path):
    foreign.write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    data, drawn, refused = path.read_bytes(), random.Random(0), 0
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(drawn.choice([1, 1, 2, 8])):
            changed[drawn.randrange(length)] = drawn.randrange(256)
        path.write_bytes(bytes(changed))
        refused += is_refused(read_header, path)
    assert refused > 250


@pytest.mark.parametrize(
    "row",
    [
        None,
        [],
        {},
        dict(dtype=["F32"], shape=[2], data_offsets=[0, 8]),
        dict(dtype="F32", shape=2, data_offsets=[0, 8]),
        dict(dtype="F32", shape=[2.0], data_offsets=[0, 8]),
        dict(dtype="F32", shape=[-2], data_offsets=[0, 8]),
        dict(dtype="F32", shape=[2], data_offsets=[0, 8, 8]),
        dict(dtype="F32", shape=[2], data_offsets=[8, 0]),
        dict(dtype="F32", shape=[2], data_offsets=[0, 2**70]),
        dict(dtype="F32", shape=[2**62, 2**62], data_offsets=[0, 8]),
        dict(dtype="F32", shape=[1] * 300 + [3], data_offsets=[0, 8]),
        dict(dtype="F8_E4M3", shape=[8], data_offsets=[0, 8]),
    ],
    ids=lambda row: json.dumps(row)[:50],
)
def test_rows_of_a_header_that_are_no_rows(tmp_path, row):
    text = json.dumps({"x": row}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert is_refused(read_header, path)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 9999])
def test_names_of_tensors_that_are_damage(tmp_path, name):
    infos = {name: TensorInfo((2,), np.dtype(np.float32))}
    write_file(tmp_path / "x.safetensors", infos, lambda _: np.zeros(2, np.float32))
    assert is_refused(read_header, tmp_path / "x.safetensors")


# ---------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    values = foreign.values_of(foreign.infos_of(foreign.CONFIG))
    foreign.write_gguf(folder / "model.gguf", values)
    return folder / "model.gguf", values


def test_gguf_weights_are_those_of_the_folder(gguf):
    source = open_gguf(gguf[0])
    assert source.tensors.keys() == gguf[1].keys()
    assert all(np.array_equal(source.read(name), x) for name, x in gguf[1].items())


def test_gguf_metadata_of_any_type_are_read_or_refused(gguf):
    metadata = dict(gguf_file.GGUFFile(gguf[0]).metadata)
    sentencepiece = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [0.0] * 260,
        "tokenizer.ggml.token_type": [1] * 260,
    }
    rows = [*WRONG, 2**64 - 1, ["a"], ["a b c"]]
    rows += [[x] * 260 for x in ("x", 1, 99, -1, 1.5, True, float("nan"))]
    keys = [key for key in metadata if key.startswith("tokenizer")]
    keys += [f"tokenizer.{key}" for key in gguf_tokenizer.TYPES]
    refused = 0
    for base in (metadata, metadata | sentencepiece):
        for key in keys:
            for value in rows:
                changed = base | {key: value}
                refused += is_refused(gguf_tokenizer.texts, changed, 272, "m.gguf")
    assert refused > len(keys) * len(rows)
    # A template that is no text, and a switch that is no bool, were taken as none.
    for key in ("chat_template", "ggml.add_bos_token"):
        changed = metadata | {f"tokenizer.{key}": 5}
        assert is_refused(gguf_tokenizer.texts, changed, 272, "m.gguf")


def test_a_gguf_header_with_any_byte_changed_is_read_or_refused(gguf, tmp_path):
    data, drawn, refused = gguf[0].read_bytes(), random.Random(0), 0
    header = len(data) - sum(x.nbytes for x in gguf[1].values())
    path = tmp_path / "changed.gguf"
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(drawn.choice([1, 1, 2, 8])):
            changed[drawn.randrange(header)] = drawn.randrange(32, 256)
        path.write_bytes(bytes(changed))
        refused += is_refused(lambda: prepare(open_gguf(path)))
    assert refused > 100


# ---------------------------------------------------------------- while it is read


@pytest.fixture(params=["safetensors", "gguf"])
def conversion(request, tmp_path, gguf):
    """(the words of an import, its file of weights, how its header is read)."""
    out = str(tmp_path / "out")
    if request.param == "gguf":
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf[0].read_bytes())
        return ["convert", "from-gguf", str(path), out], path, open_gguf
    foreign.write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    return ["convert", "from-hf", str(tmp_path / "model"), out], path, read_header


def at_the_second_tensor(monkeypatch, act):
    """Calls act() when a conversion has read the embedding and one layer's norm."""
    count = []

    def read(array, tensor, model):
        count.append(array)
        if len(count) == 2:
            act()
        return to_ours(array, tensor, model)

    to_ours = layout.to_ours
    monkeypatch.setattr(layout, "to_ours", read)


def test_a_file_that_is_cut_off_while_it_is_read(
    conversion, tmp_path, capsys, monkeypatch
):
    """A mapped file would end this process by SIGBUS."""
    words, path, _ = conversion
    at_the_second_tensor(monkeypatch, lambda: os.truncate(path, 100))
    assert cli.run(words) == 2
    error = capsys.readouterr().err
    assert f"{path} was cut off while it was read: byte " in error
    assert "it ends at byte 100\n" in error and error.count("\n") == 1
    assert [x.name for x in tmp_path.iterdir() if "out" in x.name] == []


def test_a_file_that_becomes_another_one_while_it_is_read(
    conversion, tmp_path, capsys, monkeypatch
):
    words, path, _ = conversion
    at_the_second_tensor(monkeypatch, lambda: os.utime(path, (1, 1)))
    assert cli.run(words) == 2
    error = capsys.readouterr().err
    assert f"{path} changed while it was read" in error and error.count("\n") == 1
    assert [x.name for x in tmp_path.iterdir() if "out" in x.name] == []


def test_a_file_that_is_cut_off_while_its_header_is_read(conversion, monkeypatch):
    """The system says the size that the file had when it was opened."""
    _, path, read = conversion
    size = path.stat().st_size
    os.truncate(path, 100)
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0,) * 6 + (size,) * 4))
    assert is_refused(read, path)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "value, dtype, kept",
    [
        (np.nan, "float32", None),
        (-np.inf, "float32", None),
        (1e300, "float64", None),  # more than float32 holds
        (3e38, "float32", "float32"),
        (3.4e38, "float32", None),  # bfloat16 holds 3.39e38
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_are_refused(tmp_path, capsys, value, dtype, kept):
    values = foreign.write(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    values[name] = values[name].astype(dtype)
    values[name][-1, -1] = value
    foreign.rewrite(tmp_path / "model", values)
    words = ["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "out")]
    if value == 3.4e38:
        words += ["--dtype", "bfloat16"]
    assert cli.run(words) == (0 if kept else 2)
    error = capsys.readouterr().err
    assert kept or (f"{name} holds NaN, infinity" in error and error.count("\n") == 1)
    assert (tmp_path / "out").exists() == bool(kept)
    assert not (tmp_path / ".out.part").exists()
