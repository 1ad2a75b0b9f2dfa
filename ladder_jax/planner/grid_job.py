"""Plans the cells of the grid in several processes: `survey grid`."""

import argparse
import dataclasses
import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ladder_jax.config import ConfigError, Mesh
from ladder_jax.hardware import aot
from ladder_jax.planner import grid, recipe_plans, tables, workers
from ladder_jax.planner.grid import Row

if TYPE_CHECKING:
    from ladder_jax.planner.plan import Request

# Modules that import JAX are imported inside functions: `aot.prepare` must run before.

LIMIT = 900.0  # seconds of a cell


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Plans the cells that are missing, and yields each row after it is in the file.

    args: of survey.parse.
    """
    path = Path(args.folder) / grid.CSV
    aot.prepare()
    for row, planned, ended in workers.results(
        plan_row, missing(args), args.jobs, LIMIT
    ):
        planned = planned or dataclasses.replace(row, verdict="no plan", reason=ended)
        today = datetime.date.today().isoformat()
        planned = dataclasses.replace(planned, date=today)
        tables.append_csv(path, planned)
        yield planned


def missing(args: argparse.Namespace) -> Iterator[Row]:
    """The rows that the arguments ask for and that this code has not planned, until the
    time is over."""
    end = time.monotonic() + 60 * args.minutes
    code, jaxlib = recipe_plans.code_version(), recipe_plans.jaxlib_version()
    done = {row.key for row in grid.read(args.folder) if row.code == code}
    for cell in grid.cells():
        row = Row(
            **cell._asdict(),
            schedule="hybrid:last16" if "hybrid" in cell.recipe else "ladder",
            mesh_reduction=args.reduction,
            jaxlib=jaxlib,
            code=code,
        )
        if time.monotonic() > end:
            return
        if _asked(args, cell) and (args.again or row.key not in done):
            yield row


def _asked(args: argparse.Namespace, cell: grid.Cell) -> bool:
    """Whether a cell passes the filters of the command line."""
    if args.corners and cell not in grid.CORNERS:
        return False
    return all(
        wanted is None or value in wanted
        for value, wanted in (
            (cell.recipe, args.recipes),
            (cell.target, args.targets),
            (cell.workload, args.workloads),
            (cell.tensor, args.tensor),
            (f"{cell.batch}x{cell.context}", args.shapes),
        )
    )


def plan_row(row: Row) -> Row:
    """The row with its plan and its verdict. Runs in a process of its own."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    aot.prepare()
    from ladder_jax.planner import plan, report

    request = request_of(row)
    try:
        with aot.silence():
            needed = plan.argument_bytes(request)
            room = request.target.chip.hbm_bytes
            if needed > room and row.cell not in grid.CORNERS:
                reason = f"{needed / 1e9:.0f} GB a device, of {room / 1e9:.0f}"
                return dataclasses.replace(row, verdict="no room", reason=reason)
            compiled = plan.build(request)
    except ConfigError as error:
        return dataclasses.replace(row, verdict="no plan", reason=str(error))
    made = report.make_report(compiled, report.make_timeline(compiled))
    return grid.judge(recipe_plans.with_result(row, made), made)


def request_of(row: Row) -> "Request":
    """The request of a row's cell."""
    cell = row.cell
    mesh = Mesh(cell.data, cell.fsdp, cell.tensor, reduction=row.mesh_reduction)  # type: ignore[arg-type]
    shape = f"{cell.batch}x{cell.context}"
    return recipe_plans.make_request(
        cell.recipe, cell.target, cell.workload, shape, row.schedule, mesh
    )
