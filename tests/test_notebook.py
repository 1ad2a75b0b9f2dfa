"""The notebooks: all cells of each run, in order, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import run_notebook
import tiny

from ladder_jax.hardware import malloc

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What each prints, in order (regular expressions), and how many pictures it shows.
SHOWN = {
    "checkpoint": (
        [
            r"layers\.attention\.wq +\(2, 32, 4, 8\) +2,048  float32",
            r"layers\.attention\.wq +on a device \(2, 32, 2, 8\)",
            r"layer   1:  attention \(delay 1\)",
            r"layer 1: \d\.\d\d bits, heads \[.*\]",
            r"ladder +\d\.\d\d bits a token   \(as trained\)",
            r"standard +\d\.\d\d bits a token\n",
            r"10 \['meta', 'model'",
        ],
        2,
    ),
    "ladder": (
        [
            r"the loop and the compiled forward pass agree for both schedules",
            r"mean \d+\.\d\d\d bits a token",
        ],
        4,
    ),
    "train": (
        [
            r"8 devices",
            r"mesh data=2 x fsdp=1 x tensor=4 of cpu",
            r"'step': 60",
            r"resumed at step 60 of 100",
            r"step 100: \d\.\d\d bits per byte",
            r"wq: \(4, 64, 8, 8\), on each device \(4, 64, 2, 8\)",
        ],
        1,
    ),
    "convert": (
        [
            r"'model.safetensors': \d+",
            r"\['LlamaForCausalLM'\]",
            r"done: .*parent",
            r"standard \(the parent\) +\d\.\d\d\d bits per byte",
            r"the conversion lost \d\.\d\d\d bits per byte, distillation gained \d",
            r"\['LadderLlamaForCausalLM'\]",
        ],
        1,
    ),
}


def run(name, pictures, devices=None, **variables):
    """What a notebook prints; it must end without an error."""
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, run_notebook.__file__, FOLDER / f"{name}.ipynb", pictures],
        cwd=FOLDER,  # where Jupyter runs it
        env=helpers.code_environment(devices, fast=False) | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(name, printed, pictures):
    position = 0
    patterns, count = SHOWN[name]
    for pattern in patterns:
        found = re.compile(pattern).search(printed, position)
        assert found, f"{name} does not print {pattern} there:\n{printed}"
        position = found.end()
    files = sorted(pictures.glob("*.png"))
    assert len(files) == count
    assert all(path.stat().st_size > 5000 for path in files)


def test_every_notebook_is_run_here():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared_and_nothing_needs_a_network(path):
    for cell in run_notebook.code_cells(path):
        assert not cell["outputs"] and not cell["execution_count"], "clear all outputs"
        source = "".join(cell["source"])
        assert not re.search(r"^\s*[%!]|https?://", source, re.M), source


def test_checkpoint(tmp_path):
    tiny.write_run(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    printed = run("checkpoint", pictures, devices=2, LADDER_JAX_RUN=str(tmp_path))
    check("checkpoint", printed, pictures)


@pytest.mark.parametrize("name", ["train", "convert"])
def test_notebook(name, tmp_path):
    printed = run(name, tmp_path, TMPDIR=str(tmp_path))
    check(name, printed, tmp_path)
    if name == "convert":
        lost, gained = re.search(r"lost (\S+) bits .* gained (\S+)", printed).groups()
        assert float(gained) > 0.3 * float(lost) > 0
    if name == "train":
        bits = float(re.search(r"step 100: (\d\.\d\d) bits", printed)[1])
        assert bits < 5  # 8 at random


def test_timeline(tmp_path):
    """ladder.ipynb plans where XLA's compilers are installed; elsewhere it says how to
    install them, and shows the project's picture."""
    printed = run("ladder", tmp_path, TMPDIR=str(tmp_path))
    check("ladder", printed, tmp_path)
    planned = "Plan(decode of 80 layers, ladder, batch 16, on h100:1x8: step"
    if malloc.installed("jax_plugins.xla_cuda12"):
        assert planned in printed
    else:
        assert re.search("ladder_jax.plan.' installs it\nHere is the picture", printed)
