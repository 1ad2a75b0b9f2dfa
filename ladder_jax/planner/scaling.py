"""Plans every recipe's training step from 8 to 4096 chips: docs/overlap/scaling.csv.

    python -m ladder_jax.planner.scaling
    python -m ladder_jax.planner.scaling --recipes llama3_8b --chips 64 --kinds h100
    python -m ladder_jax.planner.scaling --table

The first form plans the rows that are missing, each written as soon as it is planned,
and goes on where it was stopped; a row that other code planned is planned again with
`--again`. `--table` plans nothing, and only writes the table into docs/scaling.md.

The batch is the recipe's at every size (strong scaling), and so are the sequences that
a device computes at once; fewer chips divide a step into more parts. Several TPU slices
are planned as one, with its share of the batch, and the sums of gradients between them
are added: XLA puts them behind the backward pass, with nothing beside them.
"""

import argparse
import dataclasses
import datetime
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ladder_jax import files
from ladder_jax.config import Config, ConfigError, Mesh, from_recipe
from ladder_jax.hardware import aot, cost
from ladder_jax.planner import recipe_plans, tables

if TYPE_CHECKING:
    from ladder_jax.planner.plan import Request

# Modules that import JAX are imported inside functions: `aot.prepare` must run before.

# A recipe -> the kind and the number of chips that its docstring names, and the other
# kind that it is planned for.
HARDWARE = {
    "scratch_1b": ("h100", 64, "v5e"),
    "scratch_3b": ("h100", 128, "v5e"),
    "llama31_8b_hybrid": ("h100", 8, "v5p"),
    "llama3_8b": ("h100", 64, "v5p"),
    "codellama_34b": ("h100", 64, "v5p"),
    "llama3_70b": ("v5p", 256, "h100"),
    "bloom_176b": ("h100", 256, "v5p"),
    "llama3_405b": ("v5p", 1024, "h100"),
}
SIZES = (8, 64, 512, 4096)
NODE = 8  # GPUs
SCHEDULES = ("ladder", "standard")
# The shape of a slice, by its chips. Larger machines are several of the largest.
SLICES = {
    "v5e": {8: "2x4", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {
        **{8: "2x2x2", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
        **{1024: "8x8x16", 4096: "16x16x16"},
    },
}
MARKS = "<!-- table: python -m ladder_jax.planner.scaling --table -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """One plan: a row of the file. Times are in milliseconds a step."""

    recipe: str
    target: str  # of one slice; of GPUs all nodes
    slices: int
    schedule: str
    data: int
    fsdp: int
    tensor: int
    batch: int  # sequences of a step, over all slices
    context: int
    parts: int  # into which a step divides its batch
    # The result.
    needed_gb: float = 0.0  # on a device
    fits: str = ""  # "yes" or "no"
    step_ms: float = 0.0  # 0: not compiled, as not even the state fits
    compute_ms: float = 0.0
    exposed_ms: float = 0.0  # with what crosses slices
    slices_ms: float = 0.0  # sums of gradients between slices
    mfu: float = 0.0
    tokens_per_s: float = 0.0
    error: str = ""
    jaxlib: str = ""
    date: str = ""
    code: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What is planned: the fields before the result."""
        return dataclasses.astuple(self)[:10]

    @property
    def chips(self) -> int:
        """How many chips there are."""
        shape = self.target.partition(":")[2]
        return self.slices * math.prod(map(int, shape.split("x")))


class Machine(NamedTuple):
    """Some chips of one kind."""

    target: str  # of one slice; of GPUs all nodes
    slices: int = 1


def machine(kind: str, chips: int) -> Machine:
    """The machine of so many chips: nodes of 8 GPUs, or as few slices as there can be.

    Raises ConfigError where there is none.
    """
    if kind not in SLICES:
        return Machine(f"{kind}:{chips // NODE}x{NODE}")
    shapes = SLICES[kind]
    largest = max(size for size in shapes if chips % size == 0)
    if largest not in (chips, max(shapes)):
        raise ConfigError(f"chips={chips} is not accepted: no slice of {kind} has them")
    return Machine(f"{kind}:{shapes[largest]}", chips // largest)


# ---------------------------------------------------------------- what is planned


def mesh_of(config: Config, chips: int, where: Machine) -> Mesh:
    """A recipe's mesh on a machine of so many chips.

    Its axes tensor and fsdp are the recipe's, where they go into a node or a slice, and
    data takes the rest. If that gives more shards than a step has sequences, tensor is
    doubled.
    """
    slices, batch = where.slices, config.train.global_batch
    tensor = min(config.mesh.tensor, chips)
    if where.target.startswith("h100"):
        tensor = min(tensor, NODE)
    while chips // tensor > batch:
        tensor *= 2
    shards = chips // slices // tensor  # of a batch, in a slice
    fsdp = min(config.mesh.fsdp, shards)
    return Mesh(data=chips // tensor // fsdp, fsdp=fsdp, tensor=tensor)


def parts_of(config: Config, mesh: Mesh) -> int:
    """Into how many parts a step divides its batch: a device computes as many sequences
    at once as on the recipe's own mesh, or fewer."""
    own, train = config.mesh, config.train
    at_once = train.global_batch // train.grad_accum_steps // (own.data * own.fsdp)
    return max(train.global_batch // (at_once * mesh.data * mesh.fsdp), 1)


def row_of(recipe: str, kind: str, chips: int, schedule: str) -> Row:
    """The row of a recipe on so many chips, without its result."""
    config = from_recipe(f"configs/{recipe}.py")
    target, slices = where = machine(kind, chips)
    mesh = mesh_of(config, chips, where)
    if schedule == "ladder" and config.model.residual != "standard":
        schedule = config.model.residual  # hybrid stays hybrid
    return Row(
        *(recipe, target, slices, schedule, mesh.data, mesh.fsdp, mesh.tensor),
        *(config.train.global_batch, config.train.seq_len, parts_of(config, mesh)),
    )


def request_of(row: Row) -> "Request":
    """The request for a row: of one slice, with its share of the batch."""
    from ladder_jax.planner.plan import Request

    config = from_recipe(f"configs/{row.recipe}.py")
    mesh = dataclasses.replace(
        config.mesh, data=row.data // row.slices, fsdp=row.fsdp, tensor=row.tensor
    )
    if row.target.split(":")[0] in SLICES:  # it is for GPUs (docs/overlap.md)
        mesh = dataclasses.replace(mesh, sequence_parallel=False)
    model = dataclasses.replace(config.model, residual=row.schedule)
    return Request(
        row.recipe,
        dataclasses.replace(config, model=model, mesh=mesh),
        aot.parse(row.target),
        "train",
        row.batch // row.slices,
        row.context,
        parts=row.parts,
        fused=True,
    )


def plan_row(row: Row) -> Row:
    """Plans a row's step and adds the result."""
    from ladder_jax.planner import plan, planning

    request = request_of(row)
    chip = request.target.chip
    row = dataclasses.replace(row, date=datetime.date.today().isoformat())
    try:
        with aot.silence():
            least, gradients = plan.state_bytes(request)
            if least > chip.hbm_bytes:
                return dataclasses.replace(row, needed_gb=least / 1e9, fits="no")
            report = planning.plan_of(request).report
    except ConfigError as error:
        return dataclasses.replace(row, error=str(error))
    totals, memory = report["totals"], report["memory"]
    slices_s = cost.between_slices_s(chip, gradients, row.slices)
    step_s = totals["step_us"] / 1e6 + slices_s
    tokens = row.batch * row.context
    needed = memory["weights_bytes"] + memory["temporary_bytes"]
    flops = report["use"]["mfu"] * totals["step_us"]  # in the units of MFU
    return dataclasses.replace(
        row,
        needed_gb=needed / 1e9,
        fits="yes" if memory["fits"] else "no",
        step_ms=1e3 * step_s,
        compute_ms=(totals["compute_us"] + totals["interference_us"]) / 1e3,
        exposed_ms=totals["exposed_us"] / 1e3 + 1e3 * slices_s,
        slices_ms=1e3 * slices_s,
        mfu=flops / (1e6 * step_s),
        tokens_per_s=tokens / step_s,
    )


def wanted(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a command line: a recipe's own hardware first, at its own size."""
    cells = []
    for recipe in args.recipes:
        own, count, other = HARDWARE[recipe]
        for kind in (own, other):
            for size in sorted({*SIZES, count}):
                cells.append((kind != own, size != count, recipe, kind, size))
    for _, _, recipe, kind, size in sorted(cells, key=lambda cell: cell[:2]):
        if kind in (args.kinds or kind) and size in (args.chips or [size]):
            for schedule in args.schedules:
                yield row_of(recipe, kind, size, schedule)


def survey_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Plans the rows that are missing, and yields each after it has been written."""
    rows = {row.key: row for row in read(args.file)}
    jaxlib, code = recipe_plans.jaxlib_version(), recipe_plans.code_version()
    for row in wanted(args):
        existing = rows.get(row.key)
        if existing and (not args.again or existing.code == code):
            continue
        planned = dataclasses.replace(plan_row(row), jaxlib=jaxlib, code=code)
        rows[row.key] = planned
        write(args.file, rows.values())
        yield planned


# ---------------------------------------------------------------- the file, the table


def read(path: str | Path) -> list[Row]:
    """The rows of the file; an empty list if there is none."""
    return tables.read_csv(Path(path), Row)


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes the rows, sorted, to the file."""
    order = list(HARDWARE)
    key = lambda row: (
        *(order.index(row.recipe), row.target.split(":")[0], row.chips),
        *(row.schedule == "standard", row.schedule),
    )
    tables.write_csv(Path(path), Row, sorted(rows, key=key))


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown: ladder, and standard's step beside it."""
    standard = {_place(row): row for row in rows if row.schedule == "standard"}

    def mesh(row: Row) -> str:
        return f"{row.data} x {row.fsdp} x {row.tensor}, {row.parts}"

    def number(name: str, form: str) -> Any:
        return lambda row: format(getattr(row, name), form) if row.step_ms else ""

    def beside(row: Row) -> str:
        other = standard.get(_place(row))
        if not row.step_ms or other is None or not other.step_ms:
            return ""
        return f"{other.step_ms / row.step_ms:.2f}"

    def where(row: Row) -> str:
        slices = f"{row.slices} slices of " if row.slices > 1 else ""
        return f"{row.chips}: {slices}{row.target}"

    columns = [
        tables.Column("recipe", lambda row: row.recipe, left=True),
        tables.Column("chips", where, left=True),
        tables.Column("data x fsdp x tensor, parts", mesh, left=True),
        tables.Column("GB a device", lambda row: f"{row.needed_gb:.1f}"),
        tables.Column("fits", lambda row: row.error or row.fits),
        tables.Column("step, ms", number("step_ms", ",.0f")),
        tables.Column("exposed, ms", number("exposed_ms", ",.0f")),
        tables.Column("MFU", number("mfu", ".1%")),
        tables.Column("tokens/s", number("tokens_per_s", ",.0f")),
        tables.Column("standard's step over it", beside),
    ]
    shown = [row for row in rows if row.schedule != "standard"]
    return tables.markdown_table(columns, shown)


def write_table(page: str | Path, rows: Sequence[Row]) -> None:
    """Writes the table between the marks of a page."""
    text = Path(page).read_text(encoding="utf-8")
    files.write_text(page, with_table(text, rows))


def with_table(text: str, rows: Sequence[Row]) -> str:
    """A page's text with the table of the rows between its marks."""
    start, end = map(re.escape, MARKS)
    new = f"{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}"
    return re.sub(f"{start}.*?{end}", lambda _: new, text, flags=re.S)


def _place(row: Row) -> tuple[object, ...]:
    return row.recipe, row.target, row.slices


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=HARDWARE, default=[*HARDWARE])
    parser.add_argument("--kinds", nargs="+", help="of chips, such as h100 v5p")
    parser.add_argument("--chips", nargs="+", type=int, help="how many")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--again", action="store_true", help="what other code planned")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    parser.add_argument("--file", default="docs/overlap/scaling.csv")
    parser.add_argument("--page", default="docs/scaling.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, by default the process's own."""
    args = parse(arguments)
    aot.prepare()
    for row in [] if args.table else survey_rows(args):
        result = row.error or f"{row.needed_gb:.1f} GB, step {row.step_ms:,.0f} ms"
        print(f"{row.recipe} {row.slices} x {row.target} {row.schedule}: {result}")
        sys.stdout.flush()
    write_table(args.page, read(args.file))


if __name__ == "__main__":
    main()
