"""What `ladder-jax plan` gives beside a step: speed, cost, sweeps, traces, sources."""

import dataclasses
import json

import pytest
from hlo_programs import compute, done, play_seconds, program, start

from ladder_jax import cli
from ladder_jax.config import ConfigError
from ladder_jax.hardware import aot, chips, cost
from ladder_jax.hardware.cost import Transfer
from ladder_jax.planner import calibration, operations, sweep, trace, use

# ---------------------------------------------------------------- speed and cost


def test_the_plan_says_its_speed_its_cost_and_the_largest_batch(plan_on_cpu):
    plan = json.loads(plan_on_cpu("--json", "--price", "3"))
    step_s, used, memory = plan["totals"]["step_us"] / 1e6, plan["use"], plan["memory"]
    assert (used["devices"], used["tokens"]) == (8, 8)
    assert used["tokens_per_s"] == pytest.approx(8 / step_s)
    assert used["tokens_per_s_device"] == pytest.approx(1 / step_s)
    assert used["tokens_per_s_request"] == pytest.approx(1 / step_s)
    # 8 devices at 3 an hour, for as long as a million tokens take.
    hours = 1e6 / used["tokens_per_s"] / 3600
    assert used["cost_per_million"] == pytest.approx(hours * 8 * 3)
    assert 0 < used["mfu"] < 1
    # Two replicas, each with a half of the batch.
    largest = used["largest_batch"]
    grown = (memory["kv_bytes"] + memory["temporary_bytes"]) / 8
    room = memory["capacity_bytes"] - memory["weights_bytes"]
    assert largest % 2 == 0 and largest * grown <= room < (largest + 2) * grown


def test_a_prefill_and_a_training_step_count_all_their_tokens(plan_on_cpu):
    prefill = json.loads(
        plan_on_cpu("--json", "--workload", "prefill", "--context", "16")
    )
    assert prefill["use"]["tokens"] == 8 * 16
    assert use.tokens_of("train", 4, 32) == 128 and use.tokens_of("decode", 4, 32) == 4


def test_a_plan_that_does_not_fit_has_a_status_of_its_own(plan_on_cpu, monkeypatch):
    small = chips.CHIPS["v5e"]._replace(hbm_bytes=1e6)
    monkeypatch.setattr(aot.Target, "chip", property(lambda self: small))
    text = plan_on_cpu(status=cli.NO_MEMORY)
    assert "\ndoes not fit: 0.0 of 0 GB a device; the largest batch" in text


def test_no_batch_fits_where_the_weights_do_not():
    memory = dict(weights_bytes=5, kv_bytes=1, temporary_bytes=1, capacity_bytes=4)
    assert use.largest_batch(memory, 8, 1) == 0


# ---------------------------------------------------------------- sweeps


def test_a_sweep_plans_every_combination_in_one_process(plan_on_cpu, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "pareto.png"
    words = ["--sweep", "batch=2,8", "schedule=ladder", "--context", "16"]
    text = plan_on_cpu(*words, "--price", "2", "--plot", str(picture))
    titles, *rows = text.splitlines()
    assert titles.split()[:4] == ["batch", "schedule", "step", "us"]
    assert "a million tokens" in titles
    assert [row.split()[:2] for row in rows] == [
        ["2", "ladder"],
        ["8", "ladder"],
    ]
    assert any(row.endswith("*") for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (one,) = json.loads(plan_on_cpu("--sweep", "batch=2", "--context", "16", "--json"))
    alone = ["--batch", "2", "--context", "16", "--json"]
    assert one["values"] == dict(batch=2)
    assert one["plan"] == json.loads(plan_on_cpu(*alone))


def cell(request: float, device: float, fits: bool = True) -> sweep.Cell:
    used = dict(tokens_per_s_request=request, tokens_per_s_device=device)
    return sweep.Cell({}, dict(use=used, memory=dict(fits=fits)))


def test_the_frontier_has_what_nothing_beats_in_both_speeds():
    cells = [cell(9, 1), cell(8, 1), cell(7, 3), cell(9, 9, fits=False), cell(7, 2)]
    cells.append(sweep.Cell({}, None, "it does not compile"))
    assert sweep.frontier(cells) == [cells[0], cells[2]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sweep", "batch"], "sweep='batch' is not accepted"),
        (["--sweep", "layers=1,2"], "it must be one of batch, context, tensor"),
        (["--sweep", "batch=1", "batch=2"], "each once"),
        (["--sweep", "batch=1,x"], "its values must be whole numbers"),
        (["--sweep", "batch=1,0"], "batch=0 is not accepted"),
        (["--sweep", "tensor=2,3"], "does not divide"),
        (["--sweep", "batch=1,2", "--compare"], "leave out --compare"),
        (["--sweep", "batch=1,2", "--trace", "x.json"], "leave out --trace"),
        (["--price", "-1"], "price=-1.0 is not accepted"),
        (["--trace", "nowhere/x.json"], "trace='nowhere/x.json' is not accepted"),
        (["--network", "pcie"], "a TPU's network is that of its slice"),
        (
            ["--calibration", "missing.json"],
            "calibration='missing.json' cannot",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_compiled(
    plan_on_cpu, monkeypatch, arguments, message
):
    from ladder_jax.planner import plan

    monkeypatch.setattr(plan, "make_program", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(ConfigError) as error:
        plan_on_cpu(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- traces


def test_a_trace_has_the_device_and_the_network_with_interference(tmp_path):
    """Two transfers of 6 s on links of their own beside a product of 2 s."""
    module = program(
        start("a", "layer0/mlp"),
        start("b", "layer0/mlp"),
        compute("product", 2, "layer0/mlp"),
        done("a", "layer0/mlp"),
        done("b", "layer0/mlp"),
    )
    slowed = lambda *_: operations.Interference(0.5)
    played = play_seconds(module, Transfer(0.0, 6.0), interference=slowed)
    path = tmp_path / "trace.json"
    trace.write(path, [("ladder", played), ("again", played)])
    read = json.loads(path.read_text())
    assert set(read) == {"traceEvents", "displayTimeUnit"}
    named = {
        (one["pid"], one["tid"]): one["args"]["name"]
        for one in read["traceEvents"]
        if one["name"] == "thread_name"
    }
    assert named[0, 0] == "compute" and named[0, 2] == "network 1"
    slices = [one for one in read["traceEvents"] if one["ph"] == "X"]
    assert {one["pid"] for one in slices} == {0, 1}
    for one in slices:
        assert one["ts"] >= 0 and one["dur"] > 0 and (one["pid"], one["tid"]) in named
    tracks = {}
    for one in slices:
        tracks.setdefault((one["pid"], one["tid"]), []).append(
            (one["ts"], one["ts"] + one["dur"])
        )
    for spans in tracks.values():  # nothing of a track overlaps
        spans.sort()
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    product = next(one for one in slices if one["args"].get("instruction") == "product")
    assert (product["dur"], product["args"]["interference_us"]) == (4e6, 2e6)
    waits = [one["dur"] for one in slices if one["name"].startswith("waits")]
    assert waits == [2e6] * 2
    ends = max(one["ts"] + one["dur"] for one in slices if one["tid"] == 0)
    assert ends == played.events[-1].end * 1e6


def test_the_command_writes_a_trace(plan_on_cpu, tmp_path):
    path = tmp_path / "trace.json"
    plan_on_cpu("--trace", str(path), "--context", "16")
    events = json.loads(path.read_text())["traceEvents"]
    assert {"M", "X"} == {one["ph"] for one in events}
    assert any(one["tid"] == 1 and one["ph"] == "X" for one in events)


# ---------------------------------------------------------------- calibration

MEASURED = dict(
    format=calibration.FORMAT,
    device="NVIDIA H100 80GB HBM3",
    platform="cuda",
    devices=8,
    is_accelerator=True,
    matmul=[dict(m=8192, k=8192, n=8192, tflops=494.5)],
    hbm=dict(gb_per_s=1675.0),
    all_reduce_devices=8,
    all_reduce=[dict(bytes=16384, us=30.0), dict(bytes=2**20, us=50.0)],
    decode=[dict(schedule="ladder", batch=4, us=200.0, planned_us=100.0)],
)


def test_a_calibration_replaces_the_rates_of_the_table(tmp_path):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(MEASURED))
    target = aot.parse("h100:1x8")
    measured = calibration.read(str(path))
    changed = calibration.apply(target, measured, str(path))
    assert changed.chip.product_efficiency == 0.5
    assert changed.chip.hbm_efficiency == 0.5
    network = cost.Network(changed.chip, [0] * 8)
    transfer = network.collective("all-reduce", [list(range(8))], 2**20)
    assert transfer.seconds == pytest.approx(50e-6)
    labels = {name: source.label for name, source in changed.sources.items()}
    assert labels["hbm_efficiency"] == labels["all_reduce_points"] == "measured"
    assert labels["kernel_launch_s"] == "modelled"
    lines = calibration.comparison(target, measured).splitlines()
    assert [line.split()[-3:] for line in lines[2:]] == [
        ["2,847.5", "1,675.0", "1.70"],
        ["24.0", "30.0", "0.80"],
        ["31.4", "50.0", "0.63"],
        ["100.0", "200.0", "0.50"],
    ]


def test_a_calibration_of_a_tpu_changes_its_links():
    target = aot.parse("v5e:2x4")
    chip = target.chip._replace(link_bandwidth=30e9, collective_launch_s=5e-6)
    places = [(i, j, 0) for i in range(2) for j in range(4)]
    ring = cost.Network(chip, places)
    seconds = lambda size: ring._tpu("all-reduce", [list(range(8))], size).seconds
    rows = [dict(bytes=size, us=seconds(size) * 1e6) for size in (1 << 10, 1 << 24)]
    measured = MEASURED | dict(device="TPU v5 lite", all_reduce=rows)
    changed = calibration.apply(target, measured, "device.json").chip
    assert changed.link_bandwidth == pytest.approx(30e9)
    assert changed.collective_launch_s == pytest.approx(5e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(format="something else"), "that `ladder-jax bench device` wrote"),
        (dict(is_accelerator=False), "its device is a CPU"),
        (dict(device="NVIDIA A100"), "it is of 'NVIDIA A100'"),
    ],
)
def test_a_file_of_another_device_is_refused(tmp_path, change, message):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(MEASURED | change))
    with pytest.raises(ConfigError, match=message):
        found = calibration.read(str(path))
        calibration.apply(aot.parse("h100:1x8"), found, str(path))


def test_a_calibrated_plan_prints_planned_beside_measured(plan_on_cpu, tmp_path):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(MEASURED | dict(device="TPU v5 lite")))
    text = plan_on_cpu("--calibration", str(path), "--context", "16")
    assert "planned beside measured" in text
    assert "measured: link_bandwidth, collective_launch_s" in text


def test_a_target_keeps_its_hash_and_its_name():
    target = aot.parse("h100:1x8")
    assert hash(target) == hash(aot.parse("h100:1x8"))
    assert dataclasses.is_dataclass(cli.PlanArguments)
