"""Reads and writes docs/overlap: plans as rows of a CSV file, and Markdown tables.

`python -m ladder_jax.planner.survey` adds rows and writes the tables again.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ladder_jax import files
from ladder_jax.planner import tables

CSV = "plans.csv"
SLICES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "h100:1x8")  # targets of eight devices
# The bar of docs/overlap.md: the share of the hideable that is hidden, or how much of
# the unavoidable may be exposed.
BAR, REST = 0.95, 1.10
TIMES = (
    "step_us",
    "compute_us",
    "sent_us",
    "hidden_us",
    "exposed_us",
    "unavoidable_us",
)


@dataclass(frozen=True)
class Record:
    """One plan: a row of the file. Times are in microseconds a step."""

    # The request. No two rows have the same request (see `key`).
    recipe: str
    target: str
    workload: str
    batch: int
    context: int
    tensor: int
    schedule: str
    mesh_reduction: str  # mesh.reduction, such as "auto"
    # Duration of a short all-reduce. 0: as the chip's network has it.
    all_reduce_us: float = 0.0
    # The result.
    reduction: str = ""  # the reduction in use; for "auto", the one that it picks
    step_us: float = 0.0
    compute_us: float = 0.0
    sent_us: float = 0.0  # simultaneous transfers over different links count once
    hidden_us: float = 0.0
    exposed_us: float = 0.0
    unavoidable_us: float = 0.0
    error: str = ""  # why there is no plan
    # What planned it.
    jaxlib: str = ""
    date: str = ""
    code: str = ""  # see recipe_plans.code_version; "": unknown

    @property
    def key(self) -> tuple[object, ...]:
        """The fields of the request, from `recipe` to `mesh_reduction` and
        `all_reduce_us`."""
        return dataclasses.astuple(self)[:9]

    @property
    def hidden_share(self) -> float | None:
        """The share of the hideable communication that is hidden, or None if less than
        1% of the communication is hideable."""
        hideable = self.sent_us - self.unavoidable_us
        if hideable <= 0.01 * self.sent_us:
            return None
        return min((self.sent_us - self.exposed_us) / hideable, 1.0)

    @property
    def hides(self) -> bool:
        """Whether a plan reaches the bar of docs/overlap.md."""
        share = self.hidden_share
        return (
            share is None
            or share >= BAR
            or self.exposed_us <= (REST * self.unavoidable_us)
        )


# ---------------------------------------------------------------- the file


def read(folder: str | Path) -> list[Record]:
    """The rows of a folder's CSV file; an empty list if there is no file."""
    return tables.read_csv(Path(folder) / CSV, Record)


def write(folder: str | Path, records: Iterable[Record]) -> None:
    """Writes the rows, sorted, to the CSV file, and writes their tables."""
    folder, records = Path(folder), sorted(records, key=_sort_key)
    tables.write_csv(folder / CSV, Record, records)
    for name, text in markdown_files(records).items():
        files.write_text(folder / name, text)


def _sort_key(record: Record) -> tuple[object, ...]:
    """Slices of eight chips first, as SLICES lists them; then by size and schedule."""
    target: tuple[int, str] = (len(SLICES), record.target)
    if record.target in SLICES:
        target = SLICES.index(record.target), ""
    schedules = (
        "standard",
        "parallel",
        "ladder",
        "hybrid",
        "desync",
        "dtp",
        "upper-bound",
    )
    kind = record.schedule.partition(":")[0]
    schedule = schedules.index(kind) if kind in schedules else len(schedules)
    return (
        record.workload,
        record.recipe != "llama3_8b",
        record.recipe,
        target,
        record.batch,
        record.context,
        schedule,
        record.schedule,
        record.mesh_reduction,
        record.all_reduce_us,
    )


# ---------------------------------------------------------------- the tables


class View(NamedTuple):
    """A Markdown file with a table of some of the rows."""

    title: str
    text: str
    command: str  # the arguments of survey.py that plan its rows
    includes: Callable[[Record], bool]


VIEWS = {
    "decode.md": View(
        "Ladder, decode",
        "Tensor parallel over eight devices.",
        "decode",
        lambda record: _matches(record, "decode", "ladder") and record.target in SLICES,
    ),
    "standard.md": View(
        "Standard, decode",
        "The same without delays: hardly any communication can be hidden.",
        "decode --schedules standard",
        lambda record: (
            _matches(record, "decode", "standard") and record.target in SLICES
        ),
    ),
    "pods.md": View(
        "Ladder, decode, on other machines",
        "Pods, TPU7x and two nodes, tensor parallel over eight devices; the other "
        "devices decode other rows.",
        "decode --recipes llama3_8b --shapes 512x2048 "
        "--targets h100:2x8 tpu7x:2x2x1 v5e:16x16 v5p:8x8x8",
        lambda record: (
            _matches(record, "decode", "ladder") and record.target not in SLICES
        ),
    ),
    "prefill.md": View(
        "Ladder, prefill",
        "Tensor parallel over eight devices. The stack's end computes the last "
        "positions alone, as in the engine.",
        "prefill",
        lambda record: _matches(record, "prefill", "ladder"),
    ),
    "train.md": View(
        "A training step, ladder and standard",
        "One sequence, forward and backward, rematerialized as in the recipe; tensor "
        "parallel over eight devices.",
        "train --schedules ladder standard",
        lambda record: _matches(record, "train", "ladder", "standard"),
    ),
}
SIDE_BY_SIDE = "schedules.md"  # see `_side_by_side`


def _matches(record: Record, workload: str, *schedules: str) -> bool:
    """Whether a row is of this workload, of one of these schedules, and of "auto"."""
    return (
        record.workload == workload
        and record.schedule in schedules
        and record.mesh_reduction == "auto"
    )


def markdown_files(records: Iterable[Record]) -> dict[str, str]:
    """The tables of the rows: {file name: its text}."""
    records = sorted(records, key=_sort_key)
    files = {}
    for name, view in VIEWS.items():
        rows = [record for record in records if view.includes(record)]
        table = tables.markdown_table(
            [PLAN, SHAPE, SCHEDULE, *NUMBERS, SHARE, JAXLIB], rows
        )
        files[name] = _page(view.title, view.text, view.command, table)
    files[SIDE_BY_SIDE] = _side_by_side(records)
    return files


def _page(title: str, text: str, command: str, body: str) -> str:
    return "\n".join(
        [
            f"# {title}",
            "",
            *textwrap.wrap(
                f"{text} Microseconds a step; [overlap.md](../overlap.md) says how "
                f"they are modelled. Generated from [{CSV}]({CSV}). To plan the rows "
                "anew:",
                width=88,
            ),
            "",
            "```sh",
            f"python -m ladder_jax.planner.survey {command}",
            "```",
            "",
            body,
            "",
        ]
    )


def _side_by_side(records: list[Record]) -> str:
    """The file with a table for every request that has rows of four schedules or more.

    Speed-ups are over the standard schedule with XLA's own all-reduce.
    """
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.workload == "decode":
            group = record.recipe, record.target, record.batch, record.context
            groups.setdefault(group, []).append(record)
    parts = []
    for (recipe, target, batch, context), rows in groups.items():
        if len({record.schedule for record in rows}) < 4:
            continue
        baseline = next(row for row in rows if _is_baseline(row))
        speed_up = tables.Column("speed-up", _speed_up_over(baseline))
        heading = f"## {recipe}, {target}, batch {batch}, context {context}"
        table = tables.markdown_table([SCHEDULE, *NUMBERS, speed_up, JAXLIB], rows)
        parts += [heading, "", table, ""]
    return _page(
        "Residual schedules side by side, decode",
        "Tensor parallel over eight devices. `upper-bound` communicates nothing. On "
        'GPUs "an all-reduce of 7.8 us" is the fastest one of other engines, for '
        '32 KiB, and "of 10 us" is NCCL\'s over symmetric buffers.',
        "compare",
        "\n".join(parts).rstrip(),
    )


def _is_baseline(record: Record) -> bool:
    """Whether a row is the standard schedule with XLA's own all-reduce."""
    reduction = record.mesh_reduction, record.all_reduce_us
    return record.schedule == "standard" and reduction == ("psum", 0.0)


def _speed_up_over(baseline: Record) -> Callable[[Record], str]:
    return lambda record: f"{baseline.step_us / record.step_us:.3f}"


def _schedule_cell(record: Record) -> str:
    if record.error:
        return f"{record.schedule}: {record.error}"
    reduction = record.reduction
    if record.mesh_reduction == "auto":
        reduction += " (auto)"
    if record.all_reduce_us:
        reduction += f", an all-reduce of {record.all_reduce_us:g} us"
    return f"{record.schedule}, {reduction}"


def _number_cell(name: str) -> Callable[[Record], str]:
    return lambda record: "" if record.error else f"{getattr(record, name):,.0f}"


def _share_cell(record: Record) -> str:
    share = None if record.error else record.hidden_share
    return "-" if share is None else f"{share:.0%}"


PLAN = tables.Column("", lambda record: f"{record.recipe}, {record.target}", left=True)
SHAPE = tables.Column(
    "batch x context", lambda record: f"{record.batch}x{record.context}", left=True
)
SCHEDULE = tables.Column("schedule, reduction", _schedule_cell, left=True)
TITLES = dict(sent_us="sent", unavoidable_us="at least")
NUMBERS = [
    tables.Column(TITLES.get(name, name.removesuffix("_us")), _number_cell(name))
    for name in TIMES
]
SHARE = tables.Column("of the hideable, hidden", _share_cell)
JAXLIB = tables.Column("jaxlib", lambda record: record.jaxlib)
