"""What a run leaves to look at, and the numbers behind MFU."""

import dataclasses
import json
import math
import resource
import sys
import types

import jax
import matplotlib.image
import numpy as np
import pytest

from ladder_jax import config, train_programs
from ladder_jax.config import ConfigError
from ladder_jax.hardware import chips
from ladder_jax.metrics import Metrics, plot, read


def test_rows_are_written_at_once_and_a_resumed_run_drops_rows_after_its_checkpoint(
    tmp_path,
):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(step, loss=1 / step)
            newest = read(tmp_path / "metrics.jsonl")[-1]
            assert newest == dict(step=step, loss=1 / step), "not equal bit for bit"
        metrics.write(5, held_out_loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill
    with Metrics(tmp_path, resumed_at=3) as metrics:
        metrics.write(4, loss=9.0)
    assert [(row["step"], row["loss"]) for row in read(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 1 / 2),
        (3, 1 / 3),
        (4, 9),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_whose_checkpoints_are_gone_are_kept_in_another_file(tmp_path, caplog):
    """Also those of a second and a third run; and of whatever else has the name."""
    for number, content in enumerate(('{"step": 9, "loss": 1.0}\n', "not a row\n"), 1):
        (tmp_path / "metrics.jsonl").write_text(content)
        with Metrics(tmp_path, resumed_at=0) as metrics:
            assert read(metrics.path) == []
        assert (tmp_path / f"metrics.{number}.jsonl").read_text() == content
        assert f"it is now metrics.{number}.jsonl" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


def test_an_empty_file_holds_no_run(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").touch()
    with Metrics(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert not caplog.records


@pytest.mark.parametrize("line", ['{"loss": 1.0}', "[1]", '{"step": "one"}', "garbage"])
def test_a_line_that_is_no_row_is_an_error_and_nothing_is_lost(tmp_path, line):
    content = f'{{"step": 1, "loss": 1.0}}\n{line}\n{{"step": 2, "loss": 1.0}}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2, is not a row") as e:
        Metrics(tmp_path, resumed_at=1)
    assert "\n" not in str(e.value)
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_row_that_does_not_fit_is_an_error_that_names_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with (
            pytest.raises(
                OSError, match="metrics.jsonl could not be written: File too large"
            ),
            Metrics(tmp_path) as m,
        ):
            m.write(1, loss=1.0)
            m.write(2, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(tmp_path / "metrics.jsonl") == [dict(step=1, loss=1.0)]
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match="file/metrics.jsonl could not be written: Not a directory"
    ):
        Metrics(tmp_path / "file")


def test_plot_draws_both_losses(tmp_path):
    rows = [dict(step=s, loss=5 / s) for s in range(1, 50)] + [
        dict(step=s, held_out_loss=6 / s) for s in (10, 20, 40)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    picture = matplotlib.image.imread(plot(tmp_path, "a title"))
    assert picture.shape == (540, 960, 4)
    near = lambda colour: (abs(picture[..., :3] - colour).max(axis=-1) < 0.1).sum()
    assert (
        near(np.array([0x1F, 0x77, 0xB4]) / 255) > 500
        and near(np.array([0xFF, 0x7F, 0x0E]) / 255) > 100
    )


@pytest.mark.filterwarnings("error")
def test_no_rows_give_an_empty_plot_and_no_matplotlib_gives_none(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    assert plot(tmp_path, "nothing yet").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot(tmp_path, "") is None


# ---------------------------------------------------------------- MFU


def test_flops_per_token_are_those_by_hand():
    """A layer: projections 64 * (8 + 2 + 2 + 8) * 8, MLP 3 * 64 * 96, norms 2 * 64."""
    fields = dict(
        vocab_size=1000, dim=64, layers=3, heads=8, kv_heads=2, head_dim=8, ffn_dim=96
    )
    layer = 64 * (8 + 2 + 2 + 8) * 8 + 3 * 64 * 96 + 2 * 64
    expected = 6 * (3 * layer + 64 + 1000 * 64) + 12 * 3 * 8 * 8 * 128
    for tied in (
        False,
        True,
    ):  # the output's matrix counts once, whatever else it is used for
        assert (
            train_programs.flops_per_token(
                config.Model(**fields, tie_embeddings=tied), 128
            )
            == expected
        )


def test_flops_per_token_count_what_a_window_sees():
    model = config.Model(layers=3, heads=4, head_dim=8, kv_heads=4)
    windowed = dataclasses.replace(model, sliding_window=100, window_layers="0,2")
    flops = train_programs.flops_per_token
    assert flops(model, 128) - flops(windowed, 128) == 12 * 2 * 32 * (128 - 100)
    assert flops(model, 64) == flops(windowed, 64), "the window is longer"


def test_flops_per_token_of_llama3_8b_are_those_by_hand():
    """8.03e9 parameters, 0.525e9 of them the input embedding; attention adds 12.9e9."""
    llama = config.Model(
        vocab_size=128256,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        max_length=8192,
    )
    assert (
        train_programs.flops_per_token(llama, 8192)
        == 6 * (8_030_261_248 - 128256 * 4096) + 12 * 32 * 4096 * 8192
    )


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_an_accelerator_has_the_peak_of_its_chip(kind, tflops):
    device = types.SimpleNamespace(
        platform="tpu" if "TPU" in kind else "gpu", device_kind=kind
    )
    assert chips.peak_flops(device, "bfloat16") == (tflops and tflops * 1e12)


def test_peak_of_this_cpu_is_measured_and_shared():
    whole = chips.peak_flops(jax.devices()[0], "float32") * jax.local_device_count()
    assert 1e9 < whole < 1e14 and math.isfinite(whole)
