"""Plans many programs: adds rows to docs/overlap/plans.csv and writes the tables there.

    python -m ladder_jax.planner.survey decode
    python -m ladder_jax.planner.survey prefill --recipes llama3_8b --targets v5p:2x2x2
    python -m ladder_jax.planner.survey compare
    python -m ladder_jax.planner.survey tables

`decode`, `prefill` and `train` plan a row for every recipe, target, shape and schedule;
`compare` plans residual schedules side by side; `tables` plans nothing, and only writes
the tables of the existing rows. The program writes each row as soon as it is planned.
It leaves out a row that the same code has planned with the same jaxlib, unless
`--again` is given.
"""

import argparse
import ast
import dataclasses
import datetime
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladder_jax import files
from ladder_jax.config import ConfigError, Mesh, from_recipe
from ladder_jax.hardware import aot
from ladder_jax.planner import calibrate, records
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
PACKAGE = Path(__file__).resolve().parent.parent
# What `compare` plans: recipe, target, batch, reduction.
COMPARED = [
    ("llama3_70b", "h100:1x8", 1, "psum"),
    ("llama3_70b", "h100:1x8", 16, "psum"),
    ("llama3_70b", "h100:1x8", 64, "psum"),
    ("llama3_70b", "v5p:2x2x2", 16, "auto"),
]
# The files of ladder_jax that determine a plan: see `code_version`.
HASHED_FILES = (
    *("attention.py", "config.py", "kv_cache.py", "matmul.py", "model.py"),
    *("objective.py", "optimizer.py", "schedule.py", "sharding.py"),
    *("train_programs.py", "training.py"),
    *("hardware/*.py", "residual/*.py"),
    *(
        f"planner/{name}.py"
        for name in ("fused", "hlo", "operations", "plan", "report")
    ),
    *(f"planner/{name}.py" for name in ("scopes", "stack", "timeline")),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, by default the process's own."""
    args = parse(arguments)
    aot.prepare()
    if args.command == "tables":
        write_tables(args.folder)
        return
    for record in survey(args):
        print(
            f"{record.recipe} {record.target} {record.workload} "
            f"{record.batch}x{record.context} {record.schedule} {record.reduction}: "
            f"{record.error or f'step {record.step_us:,.0f} us'}"
        )
        sys.stdout.flush()


def write_tables(folder: str | Path) -> None:
    """Writes the tables of a folder's CSV file, and the calibration's table."""
    records.write(folder, records.read(folder))
    files.write_text(Path(folder) / "published.md", calibrate.page())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*SHAPES, "compare", "tables"])
    parser.add_argument("--recipes", nargs="+", default=["llama3_8b", "llama3_70b"])
    parser.add_argument("--targets", nargs="+", default=records.SLICES)
    parser.add_argument("--shapes", nargs="+", help="batch x context, such as 4x2048")
    parser.add_argument("--schedules", nargs="+", default=["ladder"])
    parser.add_argument("--reduction", default="auto")
    parser.add_argument(
        "--again", action="store_true", help="plan the existing rows again too"
    )
    parser.add_argument("--folder", default="docs/overlap")
    return parser.parse_args(arguments)


def survey(args: argparse.Namespace) -> Iterator[Record]:
    """Plans the rows that are missing, and yields each after it has been written."""
    rows = {record.key: record for record in records.read(args.folder)}
    jaxlib, code = jaxlib_version(), code_version()
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
            request = make_request(
                recipe, target, "decode", f"{batch}x2048", "standard", reduction
            )
            for variant in compare.variants(request):
                yield variant.request, variant.all_reduce
        return
    shapes = args.shapes or SHAPES[args.command]
    for recipe, target, shape, schedule in itertools.product(
        args.recipes, args.targets, shapes, args.schedules
    ):
        request = make_request(
            recipe, target, args.command, shape, schedule, args.reduction
        )
        yield request, None


def make_request(
    recipe: str, target: str, workload: str, shape: str, schedule: str, reduction: Any
) -> "Request":
    """The request for a recipe's model, with tensor parallelism over eight devices.

    Args:
      recipe: the name of its file in configs/, such as "llama3_8b".
      target: see aot.parse.
      workload: "decode", "prefill" or "train".
      shape: batch x context, such as "4x2048".
      schedule: the residual schedule.
      reduction: mesh.reduction.
    """
    from ladder_jax.planner.plan import Request

    config = from_recipe(f"configs/{recipe}.py")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, residual=schedule),
        mesh=Mesh(data=-1, tensor=TENSOR, reduction=reduction),
    )
    batch, _, context = shape.partition("x")
    if not (batch.isdigit() and context.isdigit()):
        raise ConfigError(
            f"shapes={shape!r} is not accepted: it must be batch x context, "
            "such as 4x2048"
        )
    return Request(
        recipe, config, aot.parse(target), workload, int(batch), int(context)
    )


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
    totals = planned["totals"] | dict(sent_us=planned["totals"]["communication_us"])
    return dataclasses.replace(
        record,
        reduction=planned["reduction"],
        date=today,
        **{name: round(totals[name], 3) for name in records.TIMES},
    )


def code_version(package: Path = PACKAGE) -> str:
    """A hash of the code that determines a plan, without comments and docstrings."""
    digest = hashlib.sha256()
    for pattern in HASHED_FILES:
        for path in sorted(package.glob(pattern)):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            digest.update(ast.dump(_without_docstrings(tree)).encode())
    return digest.hexdigest()[:8]


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return tree


def jaxlib_version() -> str:
    """The version of jaxlib, whose compilers plan."""
    import jaxlib

    return jaxlib.__version__


if __name__ == "__main__":
    main()
