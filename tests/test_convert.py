"""Conversion without other tools: streaming, sizes, runs that are cut off.

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
from ladder_jax.convert import from_hf, layout, needs, shards
from ladder_jax.convert.safetensors_file import read_header, read_tensor
from ladder_jax.convert.safetensors_source import SafetensorsSource, open_source

pytestmark = pytest.mark.usefixtures("fast_compiler")


def run(*words):
    """The exit status of a command in this process."""
    return cli.run([str(word) for word in words])


def leaves(model):
    return [np.asarray(x) for x in jax.tree.leaves(model)]


def same(model, other):
    return all(map(np.array_equal, leaves(model), leaves(other)))


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
    foreign.config_of(tie_word_embeddings=True)(tmp_path / "model", values)
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
    # The largest parameter fits, but not Orbax's copy of it.
    job = from_hf.prepare(open_source(tmp_path / "model"))
    groups = [tensor.parts for tensor in job.imported.tensors]

    def a_byte_too_little(_, mesh):
        need = needs.needs_of(job.model, "float32", mesh, groups)
        return needs.Available(None, need.device - 1)

    monkeypatch.setattr(from_hf, "available", a_byte_too_little)
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
    # Importing: the largest parameter, three times while Orbax saves it. On a CPU all
    # are the devices' memory.
    groups = [tensor.parts for tensor in layout.tensors(model)]
    saving = needs.needs_of(model, "bfloat16", mesh, groups)
    assert saving.device == 3 * 2 * 80 * 8192 * 28672 // 8 and not saving.host
    assert saving.disk == plan.disk
    elsewhere = plan._replace(host=plan.disk)
    assert "of the host's" in elsewhere.text()
    with pytest.raises(ConfigError, match="needs 141.1 GB of the host"):
        elsewhere.check(needs.Available(None, None, host=10**11))


def test_a_folder_of_70b_is_planned_before_a_tensor_is_read(
    tmp_path, capsys, monkeypatch
):
    """Its files of 141 GB are holes, which take no disk."""
    sizes = dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672)
    sizes |= dict(num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    foreign.write_holes(tmp_path / "model", **sizes)
    monkeypatch.delattr(SafetensorsSource, "read")
    words = ["convert", "from-hf", tmp_path / "model", tmp_path / "out"]
    words += ["--dtype", "bfloat16"]
    there = needs.Available(10**9, None)
    monkeypatch.setattr(from_hf, "available", lambda *_: there)
    for more in ((), ("--dry-run",)):
        assert run(*words, *more) == 2
        said = capsys.readouterr()
        assert "70,553,706,496 parameters in bfloat16: needs 141.1 GB of" in said.out
        # It is bfloat16 already.
        assert said.err.endswith("1.0 GB are free there: choose another folder\n")
    monkeypatch.setattr(from_hf, "available", lambda *_: needs.Available(None, None))
    assert run(*words, "--dry-run", "--tensor", "8") == 0
    assert "14.1 GB of memory on each of 8 devices" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
