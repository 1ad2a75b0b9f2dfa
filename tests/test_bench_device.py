"""`ladder-jax bench device`, on emulated devices of a CPU."""

import json

import pytest

from ladder_jax.bench import device
from ladder_jax.config import ConfigError
from ladder_jax.planner import calibration

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_it_measures_writes_json_and_says_that_a_cpu_is_no_accelerator(
    tmp_path, capsys
):
    path = tmp_path / "device.json"
    arguments = device.Arguments(str(path), trace=str(tmp_path / "trace"), rounds=1)
    measured = device.run(arguments)
    assert json.loads(path.read_text()) == json.loads(json.dumps(measured))
    assert measured["format"] == calibration.FORMAT
    assert not measured["is_accelerator"] and measured["devices"] == 8
    assert [row["tflops"] > 0 for row in measured["matmul"]] == [True] * 2
    assert measured["hbm"]["gb_per_s"] > 0
    assert [row["us"] > 0 for row in measured["all_reduce"]] == [True] * 2
    steps = [(row["schedule"], row["batch"]) for row in measured["decode"]]
    assert steps == [
        (schedule, batch)
        for schedule in ("standard", "ladder")
        for batch in (1, 2, 3, 4)
    ]
    assert all(row["us"] > 0 and row["tensor"] == 8 for row in measured["decode"])
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("a CPU is not an accelerator")
    with pytest.raises(ConfigError, match="its device is a CPU"):
        calibration.read(str(path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (device.Arguments("nowhere/device.json"), "out='nowhere/device.json' is not"),
        (device.Arguments(rounds=0), "rounds=0 is not accepted"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(arguments, message):
    with pytest.raises(ConfigError, match=message):
        device.run(arguments)
