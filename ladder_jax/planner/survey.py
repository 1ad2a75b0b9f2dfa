"""Plans many programs: adds rows to docs/overlap/plans.csv and writes the tables there.

    python -m ladder_jax.planner.survey decode
    python -m ladder_jax.planner.survey prefill --recipes llama3_8b --targets v5p:2x2x2
    python -m ladder_jax.planner.survey compare
    python -m ladder_jax.planner.survey grid --jobs 2 --minutes 60
    python -m ladder_jax.planner.survey tables

`decode`, `prefill` and `train` plan a row for every recipe, target, shape and schedule;
`compare` plans residual schedules side by side; `grid` plans the cells of grid.py in
several processes, those that failed first, for `--minutes`; `tables` plans nothing, and
only writes the tables and heat maps of the existing rows. The program writes each row
as soon as it is planned. It leaves out a row that the same code has planned with the
same jaxlib, unless `--again` is given.
"""

import argparse
import dataclasses
import datetime
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ladder_jax import files
from ladder_jax.config import ConfigError, Mesh
from ladder_jax.hardware import aot
from ladder_jax.planner import calibrate, grid, grid_job, maps, recipe_plans, records
from ladder_jax.planner.records import Record

if TYPE_CHECKING:
    from ladder_jax.planner.plan import Request

# Modules that import JAX are imported inside functions: `aot.prepare` must run before.

SHAPES = {
    "decode": ("1x2048", "16x2048", "64x2048"),
    "prefill": ("1x1024", "4x2048"),
    "train": ("1x2048",),
}
TENSOR = 8
# What `compare` plans: recipe, target, batch, reduction.
COMPARED = [
    ("llama3_70b", "h100:1x8", 1, "psum"),
    ("llama3_70b", "h100:1x8", 16, "psum"),
    ("llama3_70b", "h100:1x8", 64, "psum"),
    ("llama3_70b", "v5p:2x2x2", 16, "auto"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, by default the process's own."""
    args = parse(arguments)
    aot.prepare()
    if args.command == "tables":
        write_tables(args.folder)
        return
    if args.command == "grid":
        for row in grid_job.run(args):
            print(maps.line(row), flush=True)
        return
    for record in survey(args):
        print(
            f"{record.recipe} {record.target} {record.workload} "
            f"{record.batch}x{record.context} {record.schedule} {record.reduction}: "
            f"{record.error or f'step {record.step_us:,.0f} us'}"
        )
        sys.stdout.flush()


def write_tables(folder: str | Path) -> None:
    """Writes the tables of a folder's CSV files, the grid's heat maps, and the
    calibration's table."""
    records.write(folder, records.read(folder))
    files.write_text(Path(folder) / "published.md", calibrate.page())
    rows = grid.read(folder)
    grid.write(folder, rows)
    files.write_text(Path(folder) / "grid.md", maps.page(rows))
    maps.draw(folder, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*SHAPES, "compare", "grid", "tables"])
    parser.add_argument("--recipes", nargs="+", help="default: 8B and 70B; grid: all")
    parser.add_argument("--targets", nargs="+", help="default: 4 slices; grid: all")
    parser.add_argument("--shapes", nargs="+", help="batch x context, such as 4x2048")
    parser.add_argument("--schedules", nargs="+", default=["ladder"])
    parser.add_argument("--reduction", default="auto")
    parser.add_argument(
        "--again", action="store_true", help="plan the existing rows again too"
    )
    parser.add_argument("--folder", default="docs/overlap")
    group = parser.add_argument_group("grid alone")
    group.add_argument("--workloads", nargs="+", choices=list(SHAPES))
    group.add_argument("--tensor", nargs="+", type=int, choices=[2, 4, 8])
    group.add_argument("--corners", action="store_true", help="those that once failed")
    group.add_argument("--jobs", type=int, default=1, help="processes")
    group.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args(arguments)
    if args.command != "grid":
        args.recipes = args.recipes or ["llama3_8b", "llama3_70b"]
        args.targets = args.targets or records.SLICES
    return args


def survey(args: argparse.Namespace) -> Iterator[Record]:
    """Plans the rows that are missing, and yields each after it has been written."""
    rows = {record.key: record for record in records.read(args.folder)}
    jaxlib, code = recipe_plans.jaxlib_version(), recipe_plans.code_version()
    for request, all_reduce in requests(args):
        record = dataclasses.replace(
            request_record(request, all_reduce), jaxlib=jaxlib, code=code
        )
        existing = rows.get(record.key)
        up_to_date = existing and (existing.jaxlib, existing.code) == (jaxlib, code)
        if up_to_date and not args.again:
            continue
        rows[record.key] = record = plan_record(record, request, all_reduce)
        records.write(args.folder, rows.values())
        yield record


def requests(args: argparse.Namespace) -> Iterator[tuple["Request", float | None]]:
    """The requests of a command line, and the `all_reduce` of cost.Network for each."""
    if args.command == "compare":
        from ladder_jax.planner import compare

        for recipe, target, batch, reduction in COMPARED:
            mesh = Mesh(data=-1, tensor=TENSOR, reduction=reduction)  # type: ignore[arg-type]
            request = recipe_plans.make_request(
                recipe, target, "decode", f"{batch}x2048", "standard", mesh
            )
            for variant in compare.variants(request):
                yield variant.request, variant.all_reduce
        return
    shapes = args.shapes or SHAPES[args.command]
    mesh = Mesh(data=-1, tensor=TENSOR, reduction=args.reduction)
    for recipe, target, shape, schedule in itertools.product(
        args.recipes, args.targets, shapes, args.schedules
    ):
        request = recipe_plans.make_request(
            recipe, target, args.command, shape, schedule, mesh
        )
        yield request, None


def request_record(request: "Request", all_reduce: float | None) -> Record:
    """The row of a request, without its result."""
    mesh_config = request.config.mesh
    return Record(
        recipe=request.recipe,
        target=request.target.name,
        workload=request.workload,
        batch=request.batch,
        context=request.context,
        tensor=mesh_config.tensor,
        schedule=request.config.model.residual,
        mesh_reduction=mesh_config.reduction,
        all_reduce_us=round((all_reduce or 0.0) * 1e6, 3),
    )


def plan_record(record: Record, request: "Request", all_reduce: float | None) -> Record:
    """Plans a request and adds the result to its row."""
    from ladder_jax.planner import plan, report

    today = datetime.date.today().isoformat()
    try:
        with aot.silence():
            compiled = plan.build(request)
    except ConfigError as error:
        return dataclasses.replace(record, error=str(error), date=today)
    planned = report.make_report(compiled, report.make_timeline(compiled, all_reduce))
    return dataclasses.replace(recipe_plans.with_result(record, planned), date=today)


if __name__ == "__main__":
    main()
