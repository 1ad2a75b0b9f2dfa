"""The own code of the benchmarks beside other libraries, at a tiny size and without those."""

import importlib.util
import json
import sys

import pytest

from ladder_jax.bench import contest, peers
from ladder_jax.bench import train as bench
from ladder_jax.config import ConfigError


def test_alone_it_writes_a_row_of_its_own_measurements(tmp_path, capsys):
    out = tmp_path / "rows.json"
    bench.main(
        [
            "--sizes",
            "tiny",
            "--dtypes",
            "float32",
            "--length",
            "32",
            "--rounds",
            "2",
            "--seconds",
            "0.05",
            "--alone",
            "--json",
            str(out),
        ]
    )
    written = json.loads(out.read_text())
    (row,) = written["rows"]
    assert written["arguments"]["rounds"] == len(row["turns"]) == 2
    assert (row["size"], row["dtype"], row["name"]) == ("tiny", "float32", "ladder_jax")
    assert len(row["losses"]) == bench.CHECKED and row["losses"][-1] < row["losses"][0]
    assert row["best"] >= max(row["turns"]) > 0 and row["best_per_core"] > 0
    assert row["peak_bytes"] > 50e6 and row["losses_apart"] == 0
    assert capsys.readouterr().out.splitlines()[0] == bench.HEADER


def test_without_the_peer_installed_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install ladder_jax\[peers\]"):
        bench.main(["--sizes", "tiny"])


@pytest.mark.parametrize("arguments", [["--sizes", "huge"], ["--dtypes", "float16"]])
def test_an_unknown_size_or_dtype_is_one_line_that_names_the_known(arguments):
    with pytest.raises(SystemExit, match="it must be among"):
        bench.main(arguments)


def test_both_sides_get_the_same_batch_of_whole_sequences():
    config = bench.config_of("tiny", "float32", batch=3, length=5)
    batch = bench.batch_of(config)
    assert {value.shape for value in batch.values()} == {(3, 5)}
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all() and (
        batch["segments"] == 1
    ).all()
    assert all(
        (bench.batch_of(config)[name] == value).all() for name, value in batch.items()
    )


def test_a_contender_that_stops_is_named():
    with pytest.raises(ConfigError, match="contender broken stopped with status 3"):
        contest.Contender("broken", [sys.executable, "-c", "raise SystemExit(3)"])


def test_the_engine_alone_is_a_row(tmp_path, capsys):
    out = tmp_path / "rows.json"
    peers.run(
        peers.Arguments(
            size="tiny",
            batches=(2,),
            prompt=8,
            tokens=16,
            rounds=1,
            engines=(),
            json=str(out),
        )
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["name"], row["batch"], len(row["turns"]), row["ratio"]) == (
        "ladder_jax",
        2,
        1,
        1,
    )
    assert "batch   2: ladder_jax" in capsys.readouterr().out


def test_a_peer_in_another_environment_is_looked_for_there(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    found = peers.find(peers.Arguments(engines=("vllm",), pythons=(f"vllm={python}",)))
    assert found == {"ladder_jax": sys.executable}
    assert (
        f"vllm is left out: {python} does not have all of ladder_jax, vllm, trans"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(size="huge"),
            "size='huge' is not accepted: it must be one of tiny, small, m125",
        ),
        (dict(rounds=0), "rounds=0 is not accepted: it must be 1 or more"),
        (dict(tokens=1), "tokens must be 2 or more"),
        (dict(batches=(0,)), "every one of batches 1 or more"),
        (
            dict(engines=("tgi",)),
            "engines='tgi' is not accepted: it must be among ladder_jax, trans",
        ),
        (
            dict(pythons=("vllm",)),
            "pythons='vllm' is not accepted: it must be NAME=PATH",
        ),
        (
            dict(pythons=("vllm=/no/python",)),
            "pythons='vllm=/no/python' is not accepted",
        ),
    ],
)
def test_what_the_comparison_does_not_accept(arguments, message):
    with pytest.raises(ConfigError, match=message):
        peers.run(peers.Arguments(**arguments))
