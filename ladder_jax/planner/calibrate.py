"""Compares the model of H100s with published measurements, and fits it to some of them.

    python -m ladder_jax.planner.calibrate                # the tables
    python -m ladder_jax.planner.calibrate fit            # fits the constants anew
    python -m ladder_jax.planner.calibrate 8B --gpus 4 --batch 16

The last form prints the modelled steps of any published model, by
planner/reference.py: milliseconds for each schedule. Ten numbers are fitted, by least
squares, to 70B on 8 GPUs alone (the tables called "fitted"): six of
`reference.Fitted`, and of chips.CHIPS["h100"] `long_all_reduce`, `interference` and
`product_interference`. Short all-reduces come from the same runs: 24.0 us for 16 KiB
among 8 GPUs and 14.5 us among 4, 31.4 us for 1 MiB. Nothing else in the tables is
fitted. Between nodes an all-reduce takes 47.2 us at 32 KiB and 79.7 us at 512 KiB
(derived from 405B's runs).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ladder_jax.hardware import chips, networks
from ladder_jax.planner import reference, tables
from ladder_jax.planner.published import (
    COMPILED_PREFILL,
    MODELS,
    NEW_TOKENS,
    NODES,
    NODES_BATCH_1,
    PREFILL,
    PREFILL_BOUND_64,
    SIZES,
    SPEED_UP_176B,
    TOKENS_PER_SECOND,
    WITHOUT_NVLINK,
    Times,
)
from ladder_jax.planner.reference import CHIP, Fitted, Setting

# Seconds of an all-reduce of 32 KiB among 8 H100 with NVLink, by SGLang's and by vLLM's
# kernel (SGLang pull request 2904).
LOSSLESS_ALL_REDUCES = (7.8e-6, 11.8e-6)


class Row(NamedTuple):
    """A published number beside the modelled one."""

    table: str
    case: str
    schedule: str
    unit: str  # "ms", "tokens/s", or "" for a speed-up over standard
    published: float
    modelled: float

    @property
    def error(self) -> float:
        return self.modelled / self.published - 1


def rows(chip: chips.Chip = CHIP, fitted: Fitted | None = None) -> list[Row]:
    """Every published number, with the modelled one."""
    fitted = fitted or Fitted()
    listed = [*_prefill_rows(chip, fitted), *_decode_rows(chip, fitted)]
    return [*listed, *_check_rows(chip, fitted)]


def _prefill_rows(chip: chips.Chip, fitted: Fitted) -> Iterator[Row]:
    """70B's prefills."""
    of_70b = Setting(MODELS["70B"], 8, 1, chip, fitted)
    for batch, published in PREFILL.items():
        modelled = reference.prefill(of_70b._replace(batch=batch))
        yield from _both("fitted, prefill", f"70B, batch {batch}", published, modelled)
    bound = reference.prefill(of_70b._replace(batch=64)).bound
    yield _milliseconds(
        "fitted, prefill", "70B, batch 64", "bound", PREFILL_BOUND_64, bound
    )
    compiled = reference.prefill(of_70b, kernel=False)
    for schedule, seconds in COMPILED_PREFILL.items():
        case = "70B, batch 1, without a kernel"
        modelled_s = getattr(compiled, schedule)
        yield _milliseconds(
            "fitted, compiled prefill", case, schedule, seconds, modelled_s
        )
        if schedule != "standard":
            yield Row(
                "fitted, compiled prefill",
                case,
                schedule,
                "",
                COMPILED_PREFILL["standard"] / seconds,
                compiled.standard / modelled_s,
            )


def _decode_rows(chip: chips.Chip, fitted: Fitted) -> Iterator[Row]:
    """70B's runs."""
    for batch, rates in TOKENS_PER_SECOND.items():
        setting = Setting(MODELS["70B"], 8, batch, chip, fitted)
        published = Times(*(NEW_TOKENS * batch / rate for rate in rates))
        modelled = reference.run(setting)
        yield from _both(
            "fitted, whole run", f"70B, batch {batch}", published, modelled
        )


def _check_rows(chip: chips.Chip, fitted: Fitted) -> Iterator[Row]:
    """Rows that nothing is fitted to."""
    for size, (standard, ladder) in SIZES.items():
        table, case = "check, whole run", f"{size}, batch 4, 8 GPUs"
        run = reference.run(Setting(MODELS[size], 8, 4, chip, fitted))
        for schedule, rate, seconds in zip(Times._fields, (standard, ladder), run):
            yield Row(table, case, schedule, "tokens/s", rate, 4 * NEW_TOKENS / seconds)
        yield Row(
            table, case, "ladder", "", ladder / standard, run.standard / run.ladder
        )
    for gpus in (8, 16):
        run = reference.run(Setting(MODELS["176B"], gpus, 4, chip, fitted))
        case = f"176B, batch 4, {gpus} GPUs"
        modelled = run.standard / run.ladder
        yield Row("check, 176B", case, "ladder", "", SPEED_UP_176B, modelled)
    for batch, speed_ups in NODES.items():
        run = reference.run(Setting(MODELS["405B"], 16, batch, chip, fitted))
        for schedule, value in zip(("ladder", "parallel", "bound"), speed_ups):
            modelled = run.standard / getattr(run, schedule)
            case = f"405B, batch {batch}, two nodes"
            yield Row("check, two nodes", case, schedule, "", value, modelled)
    run = reference.run(Setting(MODELS["405B"], 16, 1, chip, fitted))
    for schedule, rate in NODES_BATCH_1.items():
        modelled = NEW_TOKENS / getattr(run, schedule)
        case = "405B, batch 1, two nodes"
        yield Row("check, two nodes", case, schedule, "tokens/s", rate, modelled)
    far = networks.change(chip, "no-nvlink")
    for size, value in WITHOUT_NVLINK.items():
        run = reference.run(Setting(MODELS[size], 8, 4, far, fitted))
        case, modelled = f"{size}, batch 4, 8 GPUs", run.standard / run.ladder
        yield Row("check, no NVLink", case, "ladder", "", value, modelled)


def _both(table: str, case: str, published: Times, modelled: Times) -> Iterator[Row]:
    """Rows of the times of a case, and of the speed-ups over standard."""
    for schedule in Times._fields:
        seconds, modelled_s = getattr(published, schedule), getattr(modelled, schedule)
        yield _milliseconds(table, case, schedule, seconds, modelled_s)
        if schedule != "standard":
            speed_up = published.standard / seconds
            modelled_speed_up = modelled.standard / modelled_s
            yield Row(table, case, schedule, "", speed_up, modelled_speed_up)


def _milliseconds(
    table: str, case: str, schedule: str, published: float, modelled: float
) -> Row:
    return Row(table, case, schedule, "ms", published * 1e3, modelled * 1e3)


# ---------------------------------------------------------------- the fit

# Where the fit starts, and the step of each number.
FIRST = (12e-6, 20e-6, 2e-6, 10e-12, 3e-6, 0.3, 70e-6, 270e9, 0.3, 0.3)


def fit(without: Sequence[str] = ()) -> tuple[chips.Chip, Fitted]:
    """Fits the ten numbers by least squares of the times' logarithms.

    Args:
      without: cases of the fitted tables to leave out, such as "70B, batch 4".
    """
    import numpy as np
    from scipy.optimize import least_squares

    def unpack(scales: Any) -> tuple[chips.Chip, Fitted]:
        values = [float(scale * first) for scale, first in zip(scales, FIRST)]
        chip = CHIP._replace(
            long_all_reduce=(values[6], values[7]),
            interference=values[8],
            product_interference=values[9],
        )
        return chip, Fitted(*values[:6])

    def errors(scales: Any) -> list[float]:
        listed = rows(*unpack(scales))
        return [
            math.log(row.modelled / row.published)
            for row in listed
            if row.table.startswith("fitted") and row.unit and row.case not in without
        ]

    start = np.ones(len(FIRST))
    return unpack(least_squares(errors, start, bounds=(0.2, 5)).x)


# ---------------------------------------------------------------- the tables

COLUMNS = [
    tables.Column("table", lambda row: row.table, left=True),
    tables.Column("case", lambda row: row.case, left=True),
    tables.Column("schedule", lambda row: row.schedule, left=True),
    tables.Column("unit", lambda row: row.unit or "over standard", left=True),
    tables.Column("published", lambda row: _number(row, row.published)),
    tables.Column("modelled", lambda row: _number(row, row.modelled)),
    tables.Column("error", lambda row: f"{row.error:+.1%}"),
]


def _number(row: Row, value: float) -> str:
    return f"{value:,.1f}" if row.unit else f"{value:.3f}"


def summary(listed: Sequence[Row]) -> str:
    """The mean and the largest error of each table: of times and of speed-ups."""

    def errors(table: str, timed: bool) -> str:
        found = [
            abs(row.error)
            for row in listed
            if row.table == table and bool(row.unit) is timed
        ]
        if not found:
            return ""
        return f"{sum(found) / len(found):.1%}, {max(found):.1%}"

    columns = [
        tables.Column("table", str, left=True),
        tables.Column("times: mean, largest error", lambda name: errors(name, True)),
        tables.Column("speed-ups", lambda name: errors(name, False)),
    ]
    return tables.markdown_table(columns, dict.fromkeys(row.table for row in listed))


def left_out() -> str:
    """How well a fit predicts a batch that it has not seen: largest errors."""
    cases = [f"70B, batch {batch}" for batch in TOKENS_PER_SECOND]
    lines = []
    for case in cases:
        seen = rows(*fit([case]))
        for table in ("fitted, prefill", "fitted, whole run"):
            found = [row for row in seen if (row.table, row.case) == (table, case)]
            if found:
                lines.append((case, table.removeprefix("fitted, "), found))

    def largest(timed: bool) -> Any:
        def cell(line: tuple[str, str, list[Row]]) -> str:
            found = [abs(row.error) for row in line[2] if bool(row.unit) is timed]
            return f"{max(found, default=0.0):.1%}"

        return cell

    columns = [
        tables.Column("left out", lambda line: line[0], left=True),
        tables.Column("", lambda line: line[1], left=True),
        tables.Column("times, largest error", largest(True)),
        tables.Column("speed-ups", largest(False)),
    ]
    return tables.markdown_table(columns, lines)


def _ladder_over_standard(name: str, all_reduce: float | None) -> tables.Column:
    """A column with the speed-up, by batch, of ladder with NCCL over standard with
    another all-reduce."""

    def cell(batch: int) -> str:
        setting = Setting(MODELS["70B"], 8, batch)
        ladder = reference.decode_step(setting).ladder
        standard = reference.decode_step(setting._replace(all_reduce=all_reduce))
        return f"{standard.standard / ladder:.3f}"

    return tables.Column(name, cell)


def markdown() -> str:
    """The tables in Markdown."""
    listed = rows()
    columns_by_batch = [
        tables.Column("70B, 8 GPUs, decode, batch", str),
        _ladder_over_standard("ladder over standard, NCCL", None),
        _ladder_over_standard("over standard, 11.8 us", LOSSLESS_ALL_REDUCES[1]),
        _ladder_over_standard("over standard, 7.8 us", LOSSLESS_ALL_REDUCES[0]),
    ]
    return "\n\n".join(
        [
            summary(listed),
            tables.markdown_table(columns_by_batch, TOKENS_PER_SECOND),
            tables.markdown_table(COLUMNS, listed),
        ]
    )


def page() -> str:
    """The text of docs/overlap/published.md."""
    return (
        "# The H100 model beside the published numbers\n\n"
        "`python -m ladder_jax.planner.calibrate` prints these tables; its docstring\n"
        "says which numbers are fitted and to what. The model is of the reference\n"
        "implementation (planner/reference.py), not of this project. A whole run is\n"
        "a prefill of 1024 tokens without a kernel for attention, and 511 decode\n"
        "steps. For 176B the published table says 8 GPUs; its speed-up is that of\n"
        "the model on 16 GPUs in two nodes.\n\n" + markdown() + "\n"
    )


def steps_text(size: str, gpus: int, batch: int, tokens: int, network: str) -> str:
    """The modelled steps of a published model, in milliseconds."""
    chip = networks.change(CHIP, network)
    setting = Setting(MODELS[size], gpus, batch, chip)
    steps = {
        "decode": reference.decode_step(setting),
        "prefill": reference.prefill(setting, tokens),
        "prefill without a kernel": reference.prefill(setting, tokens, kernel=False),
    }

    def cell(schedule: str) -> Any:
        return lambda name: (
            f"{getattr(steps[name], schedule) * 1e3:.3f} "
            f"({steps[name].standard / getattr(steps[name], schedule):.3f})"
        )

    columns = [tables.Column("ms (over standard)", str, left=True)]
    columns += [tables.Column(each, cell(each)) for each in Times._fields]
    return tables.text_table(columns, steps)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["fit", "left-out", *MODELS])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--network", default="nvlink", choices=networks.NAMES)
    args = parser.parse_args()
    if args.what is None:
        print(markdown())
    elif args.what == "left-out":
        print(left_out())
    elif args.what == "fit":
        chip, fitted = fit()
        print(fitted)
        print(f"long_all_reduce={chip.long_all_reduce}")
        print(f"interference={chip.interference}, {chip.product_interference}")
    else:
        print(steps_text(args.what, args.gpus, args.batch, args.tokens, args.network))


if __name__ == "__main__":
    main()
