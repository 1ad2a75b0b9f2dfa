"""An import that is cut off goes on after the parameters that are whole.

tests/test_killed.py kills one at any moment; here it stops at chosen ones, and the
reads of the next run are counted.
"""

import json
import os
import re
from pathlib import Path

import foreign_folder as foreign
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import ladder_jax
from ladder_jax import checkpoint, cli
from ladder_jax.convert import needs, parts
from ladder_jax.convert.from_hf import prepare
from ladder_jax.convert.gguf_source import open_gguf
from ladder_jax.convert.safetensors_source import SafetensorsSource, open_source

pytestmark = pytest.mark.usefixtures("fast_compiler")

PARAMETERS = 12  # of foreign.CONFIG's model
CUT = 5  # of them are whole when the import is cut off
OTHER = "its source or its options were others"
DAMAGED = "its files are damaged"


class Stopped(BaseException):
    """The import ends here."""


def run(folder, *options):
    words = ["convert", "from-hf", folder / "model", folder / "out", *options]
    return cli.run([str(word) for word in words])


def leaves(path):
    return [np.asarray(x) for x in jax.tree.leaves(ladder_jax.load(path).model)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model, and an import of it that was cut off in a save."""
    foreign.write(tmp_path / "model", shards=2)
    cut_off(tmp_path, monkeypatch)
    return tmp_path


def cut_off(folder, monkeypatch, *options):
    """Stops an import after Orbax's save of one parameter, before the record of it."""
    save, count = ocp.partial.save, []

    def stopping(*arguments):
        save(*arguments)
        count.append(1)
        if len(count) > CUT:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(ocp.partial, "save", stopping)
        with pytest.raises(Stopped):
            run(folder, *options)
    assert sorted(path.name for path in folder.iterdir()) == [".out.part", "model"]


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors that are read, in order."""
    names, read = [], SafetensorsSource.read

    def counting(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsSource, "read", counting)
    return names


def whole(folder, reads, *options):
    """The reads of an import that starts anew, and its arrays."""
    reads.clear()
    other = folder / "other"
    words = ["convert", "from-hf", folder / "model", other, *options]
    assert cli.run([str(word) for word in words]) == 0
    return list(reads), leaves(other)


def test_an_import_goes_on_and_repeats_nothing_but_the_save_that_was_cut_off(
    folder, reads, capsys
):
    assert run(folder) == 0
    said = capsys.readouterr().out
    assert f"{CUT} of {PARAMETERS} parameters are there already" in said
    rest = list(reads)
    all_reads, expected = whole(folder, reads)
    assert all_reads[-len(rest) :] == rest
    skipped = all_reads[: -len(rest)]
    assert skipped and not set(skipped) & set(rest)
    assert all(map(np.array_equal, leaves(folder / "out"), expected))
    # The checkpoint is like all others: plain Orbax opens it, another format is made.
    files = {path.name for path in (folder / "out").iterdir()}
    assert files == {"checkpoints", "tokenizer"}
    step = folder / "out" / "checkpoints" / "0"
    tree = ocp.load_checkpointables(step, {"model": None})["model"]
    embedding = np.asarray(tree["embedding"])
    assert any(np.array_equal(embedding, leaf) for leaf in expected)
    words = ["to-hf", str(folder / "out"), str(folder / "back")]
    assert cli.run(["convert", *words]) == 0
    source, back = open_source(folder / "model"), open_source(folder / "back")
    for name in source.tensors:
        assert np.array_equal(source.read(name), back.read(name)), name


def other_weights(folder):
    path = folder / "model" / "part-0.safetensors"
    os.utime(path, ns=(1, 1))


def damage(change):
    def damaged(folder):
        unfinished = folder / ".out.part" / parts.FOLDER
        files = [path for path in unfinished.rglob("*") if path.is_file()]
        change(max(files, key=lambda path: path.stat().st_size))

    return damaged


def record(folder):
    return folder / ".out.part" / parts.RECORD


def other_record(**values):
    def changed(folder):
        path = record(folder)
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return changed


@pytest.mark.parametrize(
    "change, options, reason",
    [
        (other_weights, (), OTHER),
        (lambda folder: None, ("--dtype", "bfloat16"), OTHER),
        (lambda folder: None, ("--residual", "ladder"), OTHER),
        (lambda folder: None, ("--fsdp", "2"), OTHER),
        (damage(Path.unlink), (), DAMAGED),
        (damage(lambda path: path.write_bytes(b"half")), (), DAMAGED),
        (other_record(ends=True), (), "it had begun to make the checkpoint"),
        (other_record(sizes=3), (), DAMAGED),
        (lambda folder: record(folder).write_text("{"), (), DAMAGED),
        (lambda folder: record(folder).unlink(), (), "no parameter was whole"),
    ],
)
def test_another_import_or_a_damaged_one_starts_over_and_says_so(
    folder, reads, capsys, change, options, reason
):
    change(folder)
    assert run(folder, *options) == 0
    said = capsys.readouterr().out
    assert f"starts over after one that was cut off: {reason}\n" in said
    assert "already" not in said
    ours, expected = list(reads), leaves(folder / "out")
    assert (ours, True) == (
        (both := whole(folder, reads, *options))[0],
        all(map(np.array_equal, expected, both[1])),
    )


def test_an_import_that_is_not_cut_off_says_nothing_of_one_that_was(tmp_path, capsys):
    foreign.write(tmp_path / "model")
    assert run(tmp_path) == 0
    assert not re.search("starts over|already", capsys.readouterr().out)


def test_every_file_of_a_gguf_model_tells_imports_apart(tmp_path):
    """The second one of several, too."""
    values = foreign.values_of(foreign.infos_of(foreign.CONFIG))
    path = foreign.write_gguf(tmp_path / "m.gguf", values, files=2)
    source = open_gguf(path)
    assert source.tensors.keys() == values.keys()
    before = source.files()
    assert len(before) == 2
    os.utime(before[1][0], ns=(1, 1))
    after = source.files()
    assert after[0] == before[0] and after[1] != before[1]


def test_an_import_is_cut_off_again_and_again(folder, monkeypatch):
    """Each time a little more is whole, until nothing is left."""
    sizes = []
    monkeypatch.setattr(f"{__name__}.CUT", 1)
    for _ in range(PARAMETERS - 5 - 2):
        cut_off(folder, monkeypatch)
        sizes.append(len(json.loads(record(folder).read_text())["saved"]))
    assert sizes == list(range(6, PARAMETERS - 1))
    assert run(folder) == 0
    assert checkpoint.saved_steps(folder / "out" / "checkpoints") == [0]


def test_weights_that_cannot_be_read_leave_nothing(folder, monkeypatch, capsys):
    def damaged(self, name):
        raise ladder_jax.config.ConfigError("the file is shorter than its header says")

    monkeypatch.setattr(SafetensorsSource, "read", damaged)
    assert run(folder) == 2
    assert "shorter than its header says" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_an_import_needs_the_memory_of_its_largest_parameter(folder):
    job = prepare(open_source(folder / "model"))
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    groups = [tensor.parts for tensor in job.imported.tensors]
    whole_model = needs.needs_of(job.model, "float32", mesh)
    importing = needs.needs_of(job.model, "float32", mesh, groups)
    assert importing.disk == whole_model.disk
    stack = 3 * 32 * 64  # the gates of three layers
    assert importing.device == 4 * 3 * max(stack, 272 * 32)
