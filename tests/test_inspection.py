"""`ladder-jax inspect`: what a checkpoint holds, without its arrays."""

import json

import foreign_folder as foreign
import pytest
import tiny

import ladder_jax
from ladder_jax import checkpoint, cli, config, inspection
from ladder_jax.config import ConfigError


def test_a_run_and_the_folder_it_came_from_say_the_same(tmp_path, capsys):
    values = foreign.write(tmp_path / "model")
    words = ["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "run")]
    assert cli.run(words) == 0
    run = inspection.inspect(tmp_path / "run")
    folder = inspection.inspect(tmp_path / "model")
    total = sum(value.size for value in values.values())
    for report in (run, folder):
        assert report["parameters"] == total and report["bytes"] == 4 * total
        modules = report["modules"]
        assert sum(row["parameters"] for row in modules.values()) == total
        assert set(modules) == {"embedding", "attention", "mlp", "norms", "unembedding"}
        assert modules["mlp"]["dtypes"] == ["float32"]
    assert run["fits"] == folder["fits"]
    assert run["modules"]["attention"]["shardings"]["attention.wq"] == "- fsdp tensor -"
    assert run["tokenizer"] == folder["tokenizer"]
    capsys.readouterr()
    assert cli.run(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 0
    assert cli.run(["inspect", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert "Hugging Face llama" in text and "3 layers, 32 wide" in text


def test_arrays_are_not_read(tmp_path, capsys, monkeypatch):
    tiny.write_run(tmp_path / "run")
    read, parts = checkpoint.ocp.load_checkpointables, []

    def load(path, wanted):
        parts.extend(wanted)
        return read(path, wanted)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", load)
    report = inspection.inspect(tmp_path / "run")
    assert report["step"] == 10 and report["tokenizer"]["kind"] == "bytes"
    assert inspection.inspect(tmp_path / "run", 2)["step"] == 2
    assert cli.run(["inspect", str(tmp_path / "run")]) == 0
    assert "schedule      ladder" in capsys.readouterr().out
    assert set(parts) == {"meta"}


def test_what_it_fits_on():
    sizes = dict(vocab_size=128256, dim=8192, layers=80, heads=64, kv_heads=8)
    model = config.Model(**sizes, head_dim=128, ffn_dim=28672, max_length=8192)
    devices = inspection.fits(model, 70_553_706_496)
    # 141 GB of weights and 2.7 GB of cache.
    assert devices["h100"] == dict(decode=2, train=16)
    assert devices["v5e"] == dict(decode=16, train=128)
    assert devices["v5p"]["decode"] == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no checkpoint"),
        (
            lambda path: foreign.write(path) and cut(path),
            "damaged",
        ),
    ],
)
def test_what_cannot_be_inspected(tmp_path, make, message):
    make(tmp_path / "it")
    with pytest.raises(ConfigError, match=message) as error:
        inspection.inspect(tmp_path / "it")
    assert "\n" not in str(error.value)


def test_only_a_run_has_steps(tmp_path):
    foreign.write(tmp_path / "it")
    with pytest.raises(ConfigError, match="step=3 is not accepted"):
        inspection.inspect(tmp_path / "it", step=3)


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def test_load_hf_is_public():
    assert {"load_hf", "save_hf"} <= set(ladder_jax.__all__)
