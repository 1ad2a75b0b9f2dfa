"""The benchmarks beside other libraries: their own code, at a tiny size, no peers."""

import dataclasses
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
from helpers import FAST_FLAGS

from ladder_jax import sharding, train_programs
from ladder_jax.bench import contest, machine, peers, sizes
from ladder_jax.bench import train as bench
from ladder_jax.config import ConfigError
from ladder_jax.optimizer import make_optimizer


@pytest.fixture
def fast_children(monkeypatch):
    """XLA compiles the programs of the contenders' processes with helpers.FAST."""
    monkeypatch.setenv("XLA_FLAGS", FAST_FLAGS)


@pytest.mark.usefixtures("fast_children")
def test_bench_train_alone_writes_a_row_of_its_own_measurements(tmp_path, capsys):
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
    assert (
        len(row["losses"]) == bench.CHECKED_STEPS
        and row["losses"][-1] < row["losses"][0]
    )
    assert row["best"] >= max(row["turns"]) > 0 and row["best_per_core"] > 0
    assert row["peak_bytes"] > 50e6 and row["losses_apart"] == 0
    rate = written["machine"]["gflops"]["jax"]["float32"] * 1e9
    flops = row["best"] * row["flops_per_token"]
    assert row["of_matmul"] == pytest.approx(flops / rate)
    cpu, header, line = capsys.readouterr().out.splitlines()
    assert cpu.startswith(written["machine"]["cpu"]) and "GFLOP/s: jax float32 " in cpu
    assert header == bench.HEADER and line.startswith("tiny  float32   ladder_jax")


def test_bench_train_says_what_to_install_where_the_peer_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install ladder_jax\[peers\]"):
        bench.main(["--sizes", "tiny"])


@pytest.mark.parametrize("arguments", [["--sizes", "huge"], ["--dtypes", "float16"]])
def test_an_unknown_size_or_dtype_is_one_line_that_names_the_known(arguments):
    with pytest.raises(SystemExit, match="it must be among"):
        bench.main(arguments)


def test_a_steps_temporaries_are_what_its_backward_pass_needs():
    config = bench.config_of("tiny", "float32", batch=4, length=128)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, 10)
    state = train_programs.abstract_state(config, mesh, optimizer)
    specs = sharding.named_shardings(mesh, sharding.TOKENS)
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=specs)
        for name, array in bench.batch_of(config).items()
    }
    compiled = (
        train_programs.make_step(config, mesh, optimizer).lower(state, batch).compile()
    )
    memory = compiled.memory_analysis()
    sizes = config.model
    parameters = sum(x.size for x in jax.tree.leaves(state.model))
    logits = 2 * sizes.vocab_size  # and their derivatives
    heads = sizes.heads * sizes.head_dim
    layer = 5 * sizes.dim + 8 * heads + 5 * sizes.ffn_dim
    layer += 2 * sizes.heads * config.train.seq_len  # weights and scores of attention
    tokens = config.train.global_batch * config.train.seq_len
    # Gradients and a second copy of the parameters, by layer.
    needed = 4 * (2 * parameters + tokens * (logits + sizes.layers * layer))
    assert memory.temp_size_in_bytes < needed, (
        f"{memory.temp_size_in_bytes:,} bytes of temporaries, {needed:,} expected"
    )
    # The new state is written over the old one.
    assert memory.alias_size_in_bytes >= 3 * 4 * parameters


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


@pytest.mark.usefixtures("fast_children")
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
    assert (row["name"], row["batch"]) == ("ladder_jax", 2)
    assert len(row["turns"]) == row["ratio"] == 1
    # Of 15 tokens: on a busy machine, noise makes both figures negative.
    flops = 2 * sizes.multiplied_parameters(sizes.DECODE_SIZES["tiny"])
    gflops = json.loads(out.read_text())["machine"]["gflops"]["jax"]["float32"]
    assert row["of_matmul"] == pytest.approx(
        row["tokens_per_s"] * flops / (gflops * 1e9)
    )
    assert "batch   2: ladder_jax" in capsys.readouterr().out


def test_a_peer_in_another_environment_is_looked_for_there(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    contenders = peers.find_contenders(
        peers.Arguments(engines=("vllm",), pythons=(f"vllm={python}",))
    )
    assert contenders == {"ladder_jax": sys.executable}
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
        (dict(tokens=1), "tokens=1 is not accepted: it must be 2 or more"),
        (dict(batches=(0,)), "batches=0 is not accepted: it must be 1 or more"),
        (dict(dtypes=("int8",)), "dtypes='int8' is not accepted"),
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
def test_the_comparison_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        peers.run(peers.Arguments(**arguments))


def test_the_machine_has_a_rate_for_every_library_and_dtype():
    rates = {
        "jax": {"float32": 50.0, "bfloat16": 100.0},
        "torch": {"float32": 60.0, "bfloat16": 80.0},
    }
    cpu = machine.Machine("Model 1", 4, rates)
    assert cpu.share("bfloat16", 25e9) == 0.25  # of the fastest library's
    assert cpu.share("bfloat16", 20e9, "torch") == 0.25
    assert cpu.share("float32", 25e9, "jax") == 0.5
    assert str(cpu) == (
        "Model 1, 4 cores; matrix products, GFLOP/s: "
        "jax float32 50, bfloat16 100; torch float32 60, bfloat16 80"
    )
    assert "jax" in machine.libraries()
    assert machine.matmul_gflops("float32", size=64, repeats=2) > 0


def test_each_side_gets_the_share_of_its_own_librarys_rate():
    rates = {"jax": {"float32": 50.0}, "torch": {"float32": 100.0}}
    rows = [
        dict(name="ladder_jax", dtype="float32", best=10.0, flops_per_token=1e9),
        dict(name="transformers", dtype="float32", best=10.0),
    ]
    bench.add_shares(rows, machine.Machine("Model 1", 4, rates))
    assert [row["of_matmul"] for row in rows] == [0.2, 0.1]


def test_the_cpus_name_tells_kinds_of_one_brand_apart(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        "flags\t\t: fpu avx2 avx512f avx512_bf16\n\n"
        "processor\t: 1\nmodel name\t: other\n"
    )
    assert machine.cpu_name(info) == (
        "AMD EPYC (cpu family 25, model 17, avx2, avx512f, avx512_bf16)"
    )
    info.write_text("processor\t: 0\nmodel name\t: Model 1\n")
    assert machine.cpu_name(info) == "Model 1"
    assert machine.cpu_name() and "\n" not in machine.cpu_name()


def test_a_token_is_multiplied_by_all_parameters_but_the_embedding():
    model_config = sizes.TRAIN_SIZES["tiny"]
    attention = 64 * (64 + 2 * 32) + 64 * 64
    layer = attention + 3 * 64 * 128 + 2 * 64
    expected = 2 * layer + 64 + 64 * 256
    assert sizes.multiplied_parameters(model_config) == expected
    tied = dataclasses.replace(model_config, tie_embeddings=True)
    assert sizes.multiplied_parameters(tied) == expected


def test_other_losses_are_other_work():
    ours = dict(size="tiny", dtype="float32", name="ladder_jax", parameters=10)
    ours["losses"] = [2.0, 1.0]
    peer = ours | dict(name="transformers", losses=[2.0, 1.0005])
    bench.check_same_work(peer, ours)
    assert peer["losses_apart"] == pytest.approx(5e-4)
    with pytest.raises(ArithmeticError, match="transformers does other work"):
        bench.check_same_work(peer | dict(losses=[2.0, 1.1]), ours)
    with pytest.raises(ArithmeticError, match="11 parameters against 10"):
        bench.check_same_work(peer | dict(parameters=11), ours)


def test_the_halves_of_a_head_are_interleaved_for_llama_cpp():
    matrix = np.arange(8)[:, None]  # two heads of four rows
    rows = peers.interleave_halves(matrix, head_dim=4)[:, 0]
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
