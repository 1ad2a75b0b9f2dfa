"""Export from disk: tensor by tensor, in little memory, and again after a cut."""

import os
import re
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest

import ladder_jax
from ladder_jax import checkpoint, cli, config, saving
from ladder_jax.convert import shards, to_hf
from ladder_jax.data import tokenizer

MODEL = helpers.small_model("ladder", layers=3, vocab_size=264, tie_embeddings=False)
META = dict(
    config=config.to_dict(config.Config(MODEL)),
    tensor=1,
    tokenizer=tokenizer.ByteTokenizer().to_json(),
)


def save(folder, parameters, steps=(1,)):
    with saving.Checkpoints(folder, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, dict(model=parameters), None, META)
    return folder


def export(*words):
    """The exit status of a command in this process."""
    return cli.run(["convert", "to-hf", *map(str, words)])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two checkpoints of one run, of equal parameters."""
    parameters = helpers.random_parameters(MODEL, helpers.make_mesh())
    return save(tmp_path_factory.mktemp("run"), parameters, steps=(1, 2))


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [{}, dict(fsdp=2, tensor=4)], ids=str)
@pytest.mark.parametrize("chunks", ["of layers", "whole"])
def test_it_equals_the_export_of_a_model_in_memory(
    tmp_path, monkeypatch, axes, chunks, dtype
):
    """Bit for bit, however Orbax cut the arrays, and however many files there are."""
    if chunks == "whole":  # as older versions saved them
        monkeypatch.setattr(saving, "storage_options", lambda *_: None)
    parameters = helpers.random_parameters(MODEL, helpers.make_mesh(**axes))
    folder = save(tmp_path / "run", parameters)
    _, arrays = checkpoint.open_model(folder, parameters)
    gate = arrays["layers/mlp/gate"]
    assert gate.chunk[0] == (3 if chunks == "whole" else 1)
    assert (gate.chunk[1:] == gate.shape[1:]) == (not axes)
    loaded = ladder_jax.load(folder)
    for number, size in enumerate(("5GB", "3kB", "1B")):
        expected = ladder_jax.save_hf(
            loaded, tmp_path / f"a{number}", dtype=dtype, shard_size=size
        )
        out = tmp_path / f"b{number}"
        assert export(folder, out, "--dtype", dtype, "--shard-size", size) == 0
        assert contents(out) == contents(expected)
    assert len(contents(out)) > 30  # a file for each tensor


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    folder = save(tmp_path / "run", helpers.random_parameters(MODEL))
    data = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    text = bytearray(data.read_bytes())
    text[len(text) // 2 :] = os.urandom(len(text) - len(text) // 2)
    data.write_bytes(text)
    assert export(folder, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"ladder-jax convert: \S+ of the checkpoint is damaged.*\n", error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- cut off


@pytest.fixture
def written(monkeypatch):
    """The names of the files of weights that are written."""
    names = []
    write = shards.write_file

    def write_file(path, *arguments):
        names.append(path.name.removesuffix(".part"))
        if names[-1] == write_file.fails_at:
            path.write_bytes(b"half")
            raise write_file.error
        return write(path, *arguments)

    write_file.fails_at, write_file.error = None, None
    monkeypatch.setattr(shards, "write_file", write_file)
    return names


OPTIONS = ("--step", "1", "--shard-size", "20kB")
FILES = list(shards.split(to_hf.tensors(MODEL, "float32")[0], 20_000))
assert len(FILES) == 5
INTERRUPT = KeyboardInterrupt()


def cut_off(source, out, error=INTERRUPT, number=3):
    """Exports up to the file `number`, and fails in the middle of it."""
    shards.write_file.fails_at = FILES[number - 1]
    shards.write_file.error = error
    assert export(source, out, *OPTIONS) == (130 if error is INTERRUPT else 1)
    shards.write_file.fails_at = None


@pytest.mark.parametrize("error", [INTERRUPT, OSError(28, "No space left")])
def test_an_export_goes_on_after_the_files_that_are_whole(
    tmp_path, source, written, error, capsys
):
    out, part = tmp_path / "out", tmp_path / ".out.part"
    cut_off(source, out, error)
    assert not out.exists()
    assert sorted(contents(part)) == ["export.json", *FILES[:2]]
    assert written == FILES[:3]
    (part / "stray").write_text("of nobody")
    written.clear()
    capsys.readouterr()
    assert export(source, out, *OPTIONS) == 0
    assert "2 of 5 files are there already" in capsys.readouterr().out
    assert written == FILES[2:]
    expected = tmp_path / "expected"
    assert export(source, expected, *OPTIONS) == 0
    assert contents(out) == contents(expected)
    assert sorted(os.listdir(tmp_path)) == ["expected", "out"]


@pytest.mark.parametrize(
    "options",
    [("--dtype", "bfloat16"), ("--step", "2"), ("--shard-size", "21kB")],
    ids=" ".join,
)
def test_another_export_starts_over(tmp_path, source, written, options, capsys):
    """Step 2 has the same arrays, but is another checkpoint."""
    out = tmp_path / "out"
    cut_off(source, out)
    written.clear()
    capsys.readouterr()
    assert export(source, out, *OPTIONS, *options) == 0
    reason = "its checkpoint or its options were others"
    said = capsys.readouterr().out
    assert f"starts over after one that was cut off: {reason}\n" in said
    assert len(written) >= 3 and written[0].startswith("model-00001")
    assert export(source, tmp_path / "new", *OPTIONS, *options) == 0
    assert contents(out) == contents(tmp_path / "new")


def test_a_checkpoint_that_was_saved_again_starts_over(tmp_path, written):
    parameters = helpers.random_parameters(MODEL, helpers.make_mesh())
    folder, out = tmp_path / "run", tmp_path / "out"
    save(folder, parameters)
    cut_off(folder, out)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    save(folder, jax.tree.map(lambda x: x + 1, parameters))
    written.clear()
    assert export(folder, out, *OPTIONS) == 0
    assert written == FILES


def spoil(name, change):
    def act(part):
        path = part / name
        path.write_bytes(change(path.read_bytes()))

    return act


DAMAGES = {
    "a byte": (spoil(FILES[1], lambda x: x[:-1] + bytes([x[-1] ^ 1])), FILES[1:]),
    "cut": (spoil(FILES[0], lambda x: x[:-4]), [FILES[0], *FILES[2:]]),
    "gone": (lambda part: (part / FILES[0]).unlink(), [FILES[0], *FILES[2:]]),
    "no record": (lambda part: (part / "export.json").unlink(), FILES),
    "half a record": (spoil("export.json", lambda x: x[: len(x) // 2]), FILES),
    "another record": (spoil("export.json", lambda x: b"[]"), FILES),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_are_not_whole_are_written_again(tmp_path, source, written, name):
    damage, again = DAMAGES[name]
    out = tmp_path / "out"
    cut_off(source, out)
    damage(tmp_path / ".out.part")
    written.clear()
    assert export(source, out, *OPTIONS) == 0
    assert written == again
    assert export(source, tmp_path / "new", *OPTIONS) == 0
    assert contents(out) == contents(tmp_path / "new")


def test_nothing_stays_where_no_file_is_whole(tmp_path, source, written):
    cut_off(source, tmp_path / "out", number=1)
    assert not os.listdir(tmp_path)


def test_the_space_of_an_export_that_was_cut_off_counts_as_free(
    tmp_path, source, written, monkeypatch, capsys
):
    out = tmp_path / "out"
    cut_off(source, out)
    taken = sum(path.stat().st_size for path in (tmp_path / ".out.part").iterdir())
    needed = sum(x.size * 4 for x in jax.tree.leaves(ladder_jax.load(source).model))
    free = needed - taken
    usage = type("Usage", (), dict(free=free - 1))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert export(source, out, *OPTIONS) == 2
    assert "of disk" in capsys.readouterr().err
    usage.free = free
    assert export(source, out, *OPTIONS) == 0


# ---------------------------------------------------------------- memory

MEMORY = """
import re, sys, threading, time
import jax
import ladder_jax
from ladder_jax import hugging_face, loading
jax.devices()
path, out, how = sys.argv[1:]
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
what = ladder_jax.load(path) if how == "whole" else path
ladder_jax.save_hf(what, out, shard_size="30MB")
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_memory_is_a_few_tensors_and_not_the_model(tmp_path):
    """The same measurement finds the whole model where the whole model is loaded."""
    shape = config.Model(
        vocab_size=264,
        dim=512,
        layers=12,
        heads=8,
        kv_heads=8,
        head_dim=64,
        ffn_dim=2048,
        dtype="float32",
    )
    noise = np.random.default_rng(0).standard_normal(12 * 512 * 2048, np.float32)
    draw = lambda x: noise[: x.size].reshape(x.shape)
    parameters = jax.tree.map(draw, ladder_jax.model.abstract(shape))
    meta = META | dict(config=config.to_dict(config.Config(shape)))
    with saving.Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, dict(model=parameters), None, meta)
    model = sum(x.nbytes for x in jax.tree.leaves(parameters))
    assert model > 200e6
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    peaks = {}
    for how in ("pieces", "whole"):
        words = [sys.executable, "-c", MEMORY, tmp_path / "run", tmp_path / how, how]
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, env=env, check=True
        )
        peaks[how] = int(done.stdout)
    assert peaks["whole"] > model
    # The largest tensor takes 4 MB. Imports and threads take some MB, too.
    assert peaks["pieces"] < 50e6, peaks
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
