"""Conversions that are killed at any moment leave nothing half-written."""

import json
import random
import subprocess
import sys

import foreign_folder as foreign
import helpers
import jax
import numpy as np
import pytest

import ladder_jax
from ladder_jax import cli
from ladder_jax.convert.safetensors_source import open_source

FEW = "1,-1,-2,-12,150,0.5,0.9"
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4)


def kill(folder, points, *words):
    """What killed.py prints, for a command whose output is folder/out."""
    script = [sys.executable, helpers.ROOT / "tests" / "killed.py", folder]
    command = [*script, folder / "out", points, *words]
    done = subprocess.run(
        list(map(str, command)),
        env=helpers.code_environment(),
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


def model_of(path):
    """The arrays in a folder of either kind."""
    if (path / "config.json").exists():
        source = open_source(path)
        return {name: np.array(source.read(name)) for name in source.tensors}
    return dict(enumerate(jax.tree.leaves(ladder_jax.load(path).model)))


def same(path, other):
    ours, theirs = model_of(path), model_of(other)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of Hugging Face, and the run that it becomes."""
    folder = tmp_path_factory.mktemp("sources")
    values = foreign.write(folder / "model", **SIZES)
    foreign.write_gguf(folder / "model.gguf", values, **SIZES)
    words = ["convert", "from-hf", str(folder / "model"), str(folder / "run")]
    assert cli.run(words) == 0
    return {name: folder / name for name in ("model", "model.gguf", "run")}


COMMANDS = {
    "from-hf": ("model", ()),
    "from-gguf": ("model.gguf", ()),
    "to-hf": ("run", ("--shard-size", "60kB")),
    "ladderize": ("run", ("--layers", "last:2")),
}


def check(tmp_path, sources, kind, points):
    source, options = COMMANDS[kind]
    out = tmp_path / "out"
    words = ("convert", kind, sources[source], out, *options)
    # The same names below tmp_path in every process.
    report = kill(tmp_path, points, *words)
    count = len(points.split(","))
    assert report["left"] == [
        f"out.{number}" for number in sorted(range(count), key=str)
    ]
    renames = [row for row in report["operations"] if row[0] == "os.rename"]
    assert renames[-1][2] == str(out), "the last rename gives the final name"
    expected = sources["run" if kind != "to-hf" else "model"]
    for number in range(count):
        assert same(tmp_path / f"out.{number}", expected), points.split(",")[number]
    return report


@pytest.mark.parametrize("kind", COMMANDS)
def test_killed_at_some_moments(tmp_path, sources, kind):
    """Before the first operations on files and the last ones, and at two times."""
    report = check(tmp_path, sources, kind, FEW)
    before_operations = report["results"][:4]
    assert all(row["killed"] and not row["there"] for row in before_operations)
    whole, last = len(report["operations"]), before_operations[-1]["again"]
    # The run after it: to-hf goes on after the files that are whole; others start over,
    # imports since they were about to make one checkpoint of their parameters.
    assert last < whole / 2 if kind == "to-hf" else last >= whole
    if kind.startswith("from-"):  # four parameters or so were whole
        assert report["results"][4]["again"] < whole - 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_killed_before_every_few_operations_on_files_and_at_many_times(
    tmp_path, sources, kind
):
    (tmp_path / "some").mkdir()
    few = check(tmp_path / "some", sources, kind, "0")
    times = [f"{random.uniform(0.05, 1.05):.3f}" for _ in range(20)]
    count = len(few["operations"])
    points = [*map(str, range(0, count, max(count // 30, 1))), *times]
    (tmp_path / "all").mkdir()
    check(tmp_path / "all", sources, kind, ",".join(points))
