"""Takes what `ladder-jax bench device` measured into a plan, and shows both."""

import json
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError
from ladder_jax.hardware import chips, cost, networks
from ladder_jax.hardware.aot import Target
from ladder_jax.hardware.chip_sources import Source
from ladder_jax.planner import tables

FORMAT = "ladder_jax device 1"


def read(path: str) -> dict[str, Any]:
    """A file of `bench device`.

    Raises ConfigError for a file that is not one, or that a CPU measured.
    """
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibration={path!r} cannot be read: {error}") from None
    if not isinstance(measured, dict) or measured.get("format") != FORMAT:
        raise ConfigError(
            f"calibration={path!r} is not accepted: it must be a file that "
            "`ladder-jax bench device` wrote"
        )
    if not measured.get("is_accelerator"):
        raise ConfigError(
            f"calibration={path!r} is not accepted: its device is a CPU, which says "
            "nothing about a GPU or a TPU"
        )
    return measured


def apply(target: Target, measured: dict[str, Any], path: str) -> Target:
    """The target with the measured rates in place of the table's.

    Of a TPU, whose compiler estimates what is computed, only the links' rates change.

    Args:
      target: of the plan.
      measured: what `read` returns.
      path: its file, for messages and sources.
    Raises ConfigError where the file is of another chip.
    """
    kind = kind_of(measured)
    if kind != target.kind:
        raise ConfigError(
            f"calibration={path!r} is not accepted for {target.name}: it is of "
            f"{measured['device']!r}"
        )
    chip = target.chip
    points: tuple[tuple[float, float], ...] = ()
    if measured["all_reduce"]:
        points = networks.points_of(measured["all_reduce"], f"calibration={path!r}")
    if chip.is_tpu:
        return target.change(_tpu(chip, points, measured), _source(path))
    best = max(row["tflops"] for row in measured["matmul"]) * 1e12
    chip = chip._replace(
        product_efficiency=min(best / chip.peak_flops, 1.0),
        hbm_efficiency=min(measured["hbm"]["gb_per_s"] * 1e9 / chip.hbm_bandwidth, 1.0),
        all_reduce_points=points,
    )
    return target.change(chip, _source(path))


def _source(path: str) -> Source:
    return Source("measured", f"bench device, {path}")


def _tpu(chip: chips.Chip, points: Any, measured: dict[str, Any]) -> chips.Chip:
    """A TPU's row with the rates of the shortest and the longest all-reduce."""
    if len(points) < 2:
        return chip
    devices = measured["all_reduce_devices"]
    steps = 2 * (devices - 1)  # around the ring, as cost.Network has it
    (short, short_s), (long, long_s) = points[0], points[-1]
    bandwidth = steps / devices / 2 * (long - short) / max(long_s - short_s, 1e-9)
    latency_s = short_s - steps / devices / 2 * short / bandwidth
    launch_s = max(latency_s - steps * chip.hop_latency_s, 0.0)
    return chip._replace(link_bandwidth=bandwidth, collective_launch_s=launch_s)


def kind_of(measured: dict[str, Any]) -> str | None:
    """The name in chips.CHIPS of the measured device."""

    class Device:
        device_kind = measured["device"]

    return chips.kind_of(Device())


def comparison(target: Target, measured: dict[str, Any]) -> str:
    """What the table of chips says beside what was measured, as text.

    Args:
      target: as it was before `apply`.
      measured: what `read` returns.
    """
    rows = [*_rates(target, measured), *_steps(measured)]

    def ratio(row: tuple[str, str, float, float]) -> str:
        return f"{row[2] / row[3]:.2f}"

    columns = [
        tables.Column("planned beside measured", lambda row: row[0], left=True),
        tables.Column("unit", lambda row: row[1], left=True),
        tables.Column("planned", lambda row: f"{row[2]:,.1f}"),
        tables.Column("measured", lambda row: f"{row[3]:,.1f}"),
        tables.Column("ratio", ratio),
    ]
    return tables.text_table(columns, rows)


def _rates(target: Target, measured: dict[str, Any]) -> Any:
    """Rows (what, unit, planned, measured) of products, HBM and all-reduces."""
    chip = target.chip
    for row in measured["matmul"]:
        m, k, n = row["m"], row["k"], row["n"]
        flops = 2.0 * m * k * n
        planned = chip.peak_flops
        if not chip.is_tpu:
            planned = flops / cost.product_seconds(chip, cost.Product(flops, k))[0]
        yield f"product {m}x{k}x{n}", "TFLOP/s", planned / 1e12, row["tflops"]
    planned = chip.hbm_efficiency * chip.hbm_bandwidth / 1e9
    yield "HBM", "GB/s", planned, measured["hbm"]["gb_per_s"]
    devices = measured["all_reduce_devices"]
    if chip.is_tpu or devices > chip.domain:
        return
    network = cost.Network(chip, [0] * devices)
    for row in measured["all_reduce"]:
        group = [list(range(devices))]
        seconds = network.collective("all-reduce", group, row["bytes"]).seconds
        yield f"all-reduce of {row['bytes']:,} bytes", "us", seconds * 1e6, row["us"]


def _steps(measured: dict[str, Any]) -> Any:
    """Rows of the decode steps that `bench device` planned and measured."""
    for row in measured["decode"]:
        if row.get("planned_us"):
            what = f"decode step, {row['schedule']}, batch {row['batch']}"
            yield what, "us", row["planned_us"], row["us"]
