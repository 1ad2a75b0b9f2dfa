"""Conversion without other tools: every refusal, streaming, runs that are cut off.

tests/hf compares the numbers with transformers.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import foreign_folder as foreign
import jax
import ml_dtypes
import numpy as np
import pytest

import ladder_jax
from ladder_jax import checkpoint, cli, config, inspection
from ladder_jax import model as models
from ladder_jax.config import ConfigError
from ladder_jax.convert import from_hf, needs, shards
from ladder_jax.convert.safetensors_file import read_header, read_tensor
from ladder_jax.convert.safetensors_source import open_source

pytestmark = pytest.mark.usefixtures("fast_compiler")


def run(*words):
    """The exit status of a command in this process."""
    return cli.run([str(word) for word in words])


def leaves(model):
    return [np.asarray(x) for x in jax.tree.leaves(model)]


def same(model, other):
    return all(map(np.array_equal, leaves(model), leaves(other)))


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
    "post-norms": (dict(model_type="olmo2"), "norms after its blocks"),
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


def config_of(**fields):
    def change(folder, values):
        (folder / "config.json").write_text(json.dumps(foreign.CONFIG | fields))

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
    config_of(tie_word_embeddings=True)(folder, values)
    foreign.rewrite(folder, values | {"lm_head.weight": np.zeros((4, 4), np.float32)})


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
    "another width": (config_of(intermediate_size=128), "shape.*config says"),
    "another vocabulary": (config_of(vocab_size=300), "shape.*config says"),
    "more layers": (config_of(num_hidden_layers=4), "lacks"),
    "fewer layers": (config_of(num_hidden_layers=2), "does not explain"),
    "fewer heads": (config_of(num_key_value_heads=2), "shape.*config says"),
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
    "no tokenizer": (no_tokenizer, "no tokenizer.json"),
    "tokenizer.model alone": (sentencepiece, "tokenizer.model alone"),
    "tokenizer is no JSON": (text("tokenizer.json", "{"), "tokenizer.json"),
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


# ---------------------------------------------------------------- what is read


def test_every_mesh_holds_the_same_parameters(tmp_path):
    foreign.write(tmp_path / "model", shards=2)
    one = ladder_jax.load_hf(tmp_path / "model")
    mesh = config.Mesh(data=1, fsdp=2, tensor=4)
    many = ladder_jax.load_hf(tmp_path / "model", mesh=mesh)
    assert same(one.model, many.model)
    wq = many.model.layers.attention.wq[...]
    assert len({str(shard.index) for shard in wq.addressable_shards}) == 8


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_short_dtypes_are_widened_exactly(tmp_path, dtype):
    values = foreign.write(tmp_path / "model", dtype=dtype)
    loaded = ladder_jax.load_hf(tmp_path / "model")
    table = np.asarray(loaded.model.embedding[...])
    expected = values["model.embed_tokens.weight"]
    assert table.dtype == np.float32 and np.array_equal(table, expected)
    assert loaded.config.model.dtype == "bfloat16"
    wide = ladder_jax.load_hf(tmp_path / "model", compute_dtype="float32")
    assert wide.config.model.dtype == "float32"


def test_a_head_that_equals_the_embedding_is_tied_and_another_is_not(tmp_path):
    values = foreign.write(tmp_path / "model")
    config_of(tie_word_embeddings=True)(tmp_path / "model", values)
    assert not ladder_jax.load_hf(tmp_path / "model").config.model.tie_embeddings
    equal = values | {"lm_head.weight": values["model.embed_tokens.weight"]}
    foreign.rewrite(tmp_path / "model", equal)
    assert ladder_jax.load_hf(tmp_path / "model").config.model.tie_embeddings


def test_rotary_buffers_of_old_files_are_skipped(tmp_path):
    values = foreign.write(tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    foreign.rewrite(tmp_path / "model", values | {name: np.ones(2, np.float32)})
    assert ladder_jax.load_hf(tmp_path / "model")


def test_the_authors_hybrids_keep_their_layers(tmp_path):
    fields = dict(model_type="llamaLadder", architectures=["LlamaLadderForCausalLM"])
    for number, (stale, residual) in enumerate([(2, "last2"), ([0, 2], "0,2")]):
        folder = tmp_path / str(number)
        foreign.write(folder, ladder_layers=stale, **fields)
        loaded = ladder_jax.load_hf(folder)
        assert loaded.config.model.residual == f"hybrid:{residual}"


def test_a_run_that_was_imported_generates_and_is_exported_again(tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "run"
    values = foreign.write(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert run("convert", "from-hf", folder, out) == 0
    assert run("generate", out, "--prompt", "ab", "--max-tokens", 4) == 0
    loaded = ladder_jax.load(out)
    assert same(loaded.model, ladder_jax.load_hf(folder).model)
    assert loaded.tokenizer.eos_ids == (257, 258)
    assert loaded.config.data.tokenizer == str(out / "tokenizer")
    back = tmp_path / "back"
    assert run("convert", "to-hf", out, back, "--shard-size", "30kB") == 0
    written = open_source(back)
    assert sorted(written.tensors) == sorted(values)
    for name, value in values.items():
        assert np.array_equal(written.read(name), value), name
    assert len(list(back.glob("model-*.safetensors"))) > 2
    ids = json.loads((back / "generation_config.json").read_text())["eos_token_id"]
    assert ids == [257, 258]
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_engine_and_generate_stop_at_every_end_id(tmp_path):
    values = foreign.write(tmp_path / "model", tokens=False)
    names = ["<s>", "</s>", *(f"<|{i}|>" for i in range(7))]
    foreign.write_tokenizer(tmp_path / "model", names)
    loaded = ladder_jax.load_hf(tmp_path / "model")
    plain = list(loaded.generate("abc", max_tokens=8, stop_token_ids=()))
    assert len(plain) == 9  # and the flush of the text
    ends = [int(x) for x in greedy(loaded, "abc", 8)]
    # More ends than a request may name itself.
    ids = list(dict.fromkeys([*range(258, 265), ends[3]]))
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ids}))
    loaded = ladder_jax.load_hf(tmp_path / "model")
    first = min(ends.index(i) for i in ids if i in ends)
    options = config.Decode(slots=2)
    engine = ladder_jax.Engine(
        loaded.model, loaded.config.model, loaded.mesh, options, loaded.tokenizer
    )
    result = engine.submit("abc", max_tokens=8).result()
    assert result.tokens == ends[:first]
    assert len(list(loaded.generate("abc", max_tokens=8))) == first + 1
    assert values


def greedy(loaded, prompt, count):
    from ladder_jax.generate import generate

    ids = loaded.tokenizer.prompt(prompt)
    return generate(
        loaded.model,
        loaded.config.model,
        loaded.mesh,
        ids,
        max_tokens=count,
        vocabulary=loaded.tokenizer.size,
    )


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("residual", ["desync:2", "dtp:1", "upper-bound"])
def test_a_model_that_depends_on_its_shards_is_not_exported(tmp_path, residual):
    foreign.write(tmp_path / "model")
    loaded = ladder_jax.load_hf(tmp_path / "model", residual=residual)
    with pytest.raises(ConfigError, match="number of shards"):
        ladder_jax.save_hf(loaded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("residual", ["ladder", "hybrid:last1", "delays:0,1,2,0,1,1"])
def test_other_schedules_are_never_called_llama(tmp_path, residual):
    foreign.write(tmp_path / "model")
    loaded = ladder_jax.load_hf(tmp_path / "model", residual=residual)
    out = ladder_jax.save_hf(loaded, tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    assert values["model_type"] == "ladder_llama" and "auto_map" in values
    again = ladder_jax.load_hf(out)
    assert again.config.model == loaded.config.model
    assert same(again.model, loaded.model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_parallel_model_goes_out_and_comes_back(tmp_path, tied):
    """Its layers have one norm, which both of their blocks read."""
    foreign.write(tmp_path / "model")
    donor = ladder_jax.load_hf(tmp_path / "model")
    parallel = dataclasses.replace(
        donor.config.model, residual="parallel", tie_embeddings=tied
    )
    draw = np.random.default_rng(0).standard_normal
    noise = lambda x: jax.numpy.asarray(draw(x.shape, np.float32))
    loaded = donor._replace(
        model=jax.tree.map(noise, models.abstract(parallel)),
        config=dataclasses.replace(donor.config, model=parallel),
    )
    out = ladder_jax.save_hf(loaded, tmp_path / "out")
    names = open_source(out).tensors
    assert not any("post_attention_layernorm" in name for name in names)
    again = ladder_jax.load_hf(out)
    assert again.config.model == parallel and same(again.model, loaded.model)
    assert inspection.inspect(out)["model"]["residual"] == "parallel"
    values = json.loads((out / "config.json").read_text()) | dict(parallel=False)
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="post_attention_layernorm"):
        ladder_jax.load_hf(out)


def test_bfloat16_export_rounds_to_nearest(tmp_path):
    values = foreign.write(tmp_path / "model")
    loaded = ladder_jax.load_hf(tmp_path / "model")
    out = ladder_jax.save_hf(loaded, tmp_path / "out", dtype="bfloat16")
    source = open_source(out)
    for name, value in values.items():
        assert np.array_equal(source.read(name), value.astype(ml_dtypes.bfloat16)), name


def test_a_folder_that_exists_is_not_written_to(tmp_path):
    foreign.write(tmp_path / "model")
    loaded = ladder_jax.load_hf(tmp_path / "model")
    with pytest.raises(ConfigError, match="exists already"):
        ladder_jax.save_hf(loaded, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    assert ladder_jax.save_hf(loaded, tmp_path / "empty").is_dir()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    foreign.write(tmp_path / "model")
    loaded = ladder_jax.load_hf(tmp_path / "model")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_file", fail)
    with pytest.raises(OSError, match="No space left"):
        ladder_jax.save_hf(loaded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------- size


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    foreign.write(tmp_path / "model")
    words = ("convert", "from-hf", tmp_path / "model", tmp_path / "out")
    for there, message in (
        (needs.Available(1000, None), "of disk"),
        (needs.Available(None, 1000), "of memory"),
    ):
        monkeypatch.setattr(from_hf, "available", lambda *_, there=there: there)
        assert run(*words) == 2
        assert re.search(f"needs.*{message}.*free", capsys.readouterr().err)
    # The parameters fit, but not Orbax's copy of them.
    model = from_hf.prepare(open_source(tmp_path / "model")).model

    def just_the_parameters(_, mesh):
        return needs.Available(None, needs.needs_of(model, "float32", mesh).device)

    monkeypatch.setattr(from_hf, "available", just_the_parameters)
    assert run(*words) == 2
    assert "of memory" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*words, "--dry-run") == 0
    assert "parameters in float32: needs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_70b_model_is_planned_without_allocating_it():
    sizes = dict(vocab_size=128256, dim=8192, layers=80, heads=64, kv_heads=8)
    model = config.Model(
        **sizes, head_dim=128, ffn_dim=28672, max_length=8192, residual="standard"
    )
    mesh = jax.make_mesh((1, 1, 8), ("data", "fsdp", "tensor"))
    plan = needs.needs_of(model, "bfloat16", mesh)
    assert plan.parameters == 70_553_706_496
    assert plan.disk == 2 * plan.parameters
    share = plan.disk / 8
    assert share < plan.device < 1.03 * share  # its shards, and one tensor more
    # Saving: the shards a second time, of the host's memory where devices have theirs.
    saving = needs.needs_of(model, "bfloat16", mesh, saves=True)
    assert 2 * share < saving.device < 2.01 * share and not saving.host
    elsewhere = plan._replace(host=plan.disk)
    assert "of the host's" in elsewhere.text()
    with pytest.raises(ConfigError, match="needs 141.1 GB of the host"):
        elsewhere.check(needs.Available(None, None, host=10**11))


MEMORY = """
import re, sys, threading, time
import jax
import ladder_jax, ladder_jax.hugging_face
jax.devices()
def anonymous():
    with open("/proc/self/status") as file:
        return int(re.search("RssAnon:\\\\s+(\\\\d+)", file.read())[1]) * 1024
peak = before = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
loaded = ladder_jax.load_hf(sys.argv[1])
done = True
thread.join()
print(peak - before, sum(x.nbytes for x in jax.tree.leaves(loaded.model)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_memory_is_the_model_and_about_one_tensor(tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=4096, num_hidden_layers=12)
    foreign.write(tmp_path / "model", vocab_size=1024, **sizes)
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "model")]
    # One device: eight emulated ones would have eight allocators.
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=True)
    peak, model = map(int, done.stdout.split())
    # A stack of a layer's largest matrix is 100 MB here, one such matrix 8 MB. The
    # programs that write into a stack take some MB, too.
    assert model > 300e6
    assert peak - model < 80e6, f"{peak / 1e6:.0f} MB for {model / 1e6:.0f} MB"


# ---------------------------------------------------------------- cut off


def test_what_a_killed_conversion_left_is_removed(tmp_path):
    foreign.write(tmp_path / "model")
    part = tmp_path / ".out.part"
    (part / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    (part / "tokenizer").mkdir()
    (part / "tokenizer" / "half").write_text("{")
    assert run("convert", "from-hf", tmp_path / "model", tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert checkpoint.saved_steps(tmp_path / "out" / "checkpoints") == [0]
    assert not (tmp_path / "out" / "lease.json").exists()


def test_two_conversions_do_not_write_one_folder(tmp_path, capsys):
    from ladder_jax.run_folder import Lease

    foreign.write(tmp_path / "model")
    with Lease(tmp_path / ".out.part"):
        words = ("convert", "from-hf", tmp_path / "model", tmp_path / "out")
        assert run(*words) == 2
    assert "writes there" in capsys.readouterr().err


def test_safetensors_are_read_back_as_written(tmp_path):
    values = foreign.write(tmp_path / "model", dtype=ml_dtypes.bfloat16)
    path = tmp_path / "model" / "model.safetensors"
    places = read_header(path)
    for name, value in values.items():
        assert np.array_equal(read_tensor(path, places[name]), value)
