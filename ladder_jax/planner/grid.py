"""The grid: every program whose communication should be hidden, and what was found.

A cell is a program of a recipe on a machine of eight devices. `cells` lists them so
that a job which is cut short has planned an even sample: first those that once failed,
then the corners of every table of batches and contexts, then what lies between.

`python -m ladder_jax.planner.survey grid` plans them. This file imports no JAX.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax.planner import tables
from ladder_jax.planner.records import Record

CSV = "grid.csv"
TARGETS = (
    *("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"),
    *("h100:1x8", "h200:1x8", "b200:1x8"),
)
# By workload: the (data, fsdp, tensor) of eight devices. The first is planned first.
AXES = {
    "decode": ((1, 1, 8), (2, 1, 4), (4, 1, 2)),
    "prefill": ((1, 1, 8), (2, 1, 4), (4, 1, 2)),
    "train": ((1, 1, 8), (2, 1, 4), (1, 2, 4), (4, 1, 2), (1, 4, 2)),
}
# Rows of a tensor-parallel group, and their tokens: of the cache, a prompt, a sequence.
# A value's number says in which pass over the grid it is planned first.
BATCHES = {
    "decode": {1: 0, 2: 2, 4: 1, 8: 2, 16: 0, 32: 2, 64: 1, 128: 2, 256: 0},
    "prefill": {1: 0, 2: 2, 4: 1, 8: 0},
}
CONTEXTS = {
    "decode": {
        **{256: 0, 512: 1, 1024: 2, 2048: 0},
        **{4096: 2, 8192: 1, 16384: 2, 32768: 0},
    },
    "prefill": {128: 0, 256: 2, 512: 1, 1024: 0, 2048: 1, 4096: 0},
}
TRAINED = {(1, 2048): 0, (8, 512): 0, (1, 4096): 0, (2, 2048): 1, (1, 8192): 1}
# All published shapes but smollm2's: its nine heads have no tensor axis.
RECIPES = {
    **{"llama3_8b": 0, "llama3_70b": 0, "llama31_8b_hybrid": 1, "codellama_34b": 1},
    **{"llama3_405b": 1, "bloom_176b": 1, "scratch_1b": 2, "scratch_3b": 2},
}


class Cell(NamedTuple):
    """A program of the grid."""

    recipe: str
    target: str
    workload: str
    batch: int  # rows of all devices
    context: int
    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class Row(Record):
    """The plan of a cell, with a verdict."""

    data: int = 1
    fsdp: int = 1
    share: float = 0.0  # hidden of the hideable; 1 where nothing is hideable
    verdict: str = ""  # one of VERDICTS
    reason: str = ""  # one line: why it is not hidden, or not planned

    @property
    def key(self) -> tuple[object, ...]:
        return (*super().key, self.data, self.fsdp, self.jaxlib)

    @property
    def cell(self) -> Cell:
        return Cell(*(getattr(self, name) for name in Cell._fields))


# hidden: the bar of docs/overlap.md is reached. no room: the model does not fit into
# the devices' memory. no plan: XLA or the mesh refuses the program.
VERDICTS = ("hidden", "exposed", "no room", "no plan")

# Cells that did not hide what can be hidden when the grid was first planned.
CORNERS = [
    *(
        Cell("llama3_70b", target, "decode", 1, context, 1, 1, 8)
        for target in ("v6e:2x4", "v5p:2x2x2")
        for context in (512, 1024)
    ),
    *(
        Cell("llama3_8b", target, "decode", 1, context, 1, 1, 8)
        for target in ("v6e:2x4", "v5p:2x2x2")
        for context in (512, 1024)
    ),
    *(
        Cell("llama3_8b", "v6e:2x4", "decode", 32, context, 1, 1, 8)
        for context in (512, 1024)
    ),
    *(
        Cell("llama3_70b", "v5e:2x4", "decode", 32, context, 1, 1, 8)
        for context in (1024, 4096)
    ),
    Cell("llama3_8b", "v5e:2x4", "decode", 64, 1024, 1, 1, 8),
    *(
        Cell("llama3_8b", "v5e:2x4", "train", batch, length, 1, 1, 8)
        for batch, length in ((2, 2048), (8, 512), (1, 4096))
    ),
    Cell("llama3_8b", "v6e:2x4", "prefill", 1, 4096, 1, 1, 8),
]


def cells() -> list[Cell]:
    """All cells, in the order in which a job plans them."""
    ordered = sorted(_passes(), key=lambda one: (one[0], _scatter(one[1])))
    return list(dict.fromkeys([*CORNERS, *(cell for _, cell in ordered)]))


def _passes() -> Iterator[tuple[int, Cell]]:
    """Every cell with the number of the pass that plans it."""
    for recipe, target, workload in itertools.product(RECIPES, TARGETS, AXES):
        for number, axes in enumerate(AXES[workload]):
            for (rows, context), late in _shapes(workload):
                batch = rows * axes[0] * axes[1]
                place = RECIPES[recipe] + min(number, 1) + late
                yield place, Cell(recipe, target, workload, batch, context, *axes)


def _shapes(workload: str) -> Iterator[tuple[tuple[int, int], int]]:
    """((rows, context), how late they are planned) of a workload."""
    if workload == "train":
        yield from TRAINED.items()
        return
    batches, contexts = BATCHES[workload], CONTEXTS[workload]
    for rows, context in itertools.product(batches, contexts):
        yield (rows, context), max(batches[rows], contexts[context])


def sides(workload: str) -> tuple[list[int], list[int]]:
    """The rows and the contexts of a workload's table, in order."""
    shapes = [shape for shape, _ in _shapes(workload)]
    return sorted({rows for rows, _ in shapes}), sorted({each for _, each in shapes})


def _scatter(cell: Cell) -> bytes:
    """A sort key without any order, the same in every process."""
    return hashlib.sha256(repr(tuple(cell)).encode()).digest()


# ---------------------------------------------------------------- the file


def read(folder: str | Path) -> list[Row]:
    """The rows of a folder's grid, of each cell and jaxlib the last one, sorted."""
    found = tables.read_csv(Path(folder) / CSV, Row)
    places = {cell: place for place, cell in enumerate(_listed())}
    rows = {row.key: row for row in found}.values()
    last = len(places)
    return sorted(rows, key=lambda row: (places.get(row.cell, last), row.key))


def _listed() -> list[Cell]:
    """All cells, as a table lists them."""
    return [cell for _, cell in _passes()]


def write(folder: str | Path, rows: Sequence[Row]) -> None:
    """Writes the rows in place of those of a folder's grid."""
    tables.write_csv(Path(folder) / CSV, Row, rows)


# ---------------------------------------------------------------- verdicts


def judge(row: Row, report: dict[str, Any]) -> Row:
    """A planned row with its verdict.

    report: of the plan, see report.make_report.
    """
    share = 1.0 if row.hidden_share is None else row.hidden_share
    row = dataclasses.replace(row, share=round(share, 4))
    if row.hides:
        return dataclasses.replace(row, verdict="hidden")
    return dataclasses.replace(row, verdict="exposed", reason=evidence(report))


def evidence(report: dict[str, Any]) -> str:
    """One line about the block whose collectives a device waits for longest."""
    if not report["memory"]["overlaps"]:
        return "XLA:GPU overlaps nothing: arguments take over 80% of the memory"
    waits: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for one in report["collectives"]:
        words = [word for word in one["block"].split() if not word.startswith("layer")]
        beside = f"{' '.join(words) or 'a layer'}, {one['axis']}"
        waits.setdefault((beside, one["kind"], one["asynchronous"]), []).append(one)
    waited = lambda rows: sum(one["exposed_us"] * one["count"] for one in rows)
    (place, kind, asynchronous), rows = max(
        waits.items(), key=lambda item: waited(item[1])
    )
    count = sum(one["count"] for one in rows)
    mean = lambda name: sum(one[name] * one["count"] for one in rows) / count
    empty = sum(one["count"] for one in rows if one["window_compute_us"] < 0.05)
    what = (
        f"{empty:.0f} empty windows, {mean('window_compute_us'):.1f} us of compute in"
        " one on average"
        if asynchronous
        else "synchronous"
    )
    return (
        f"{kind} beside {place}: {waited(rows):,.0f} us in {count:.0f} waits; "
        f"{what}, {mean('communication_us'):.1f} us sent"
    )
