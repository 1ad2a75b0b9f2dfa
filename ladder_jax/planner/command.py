"""The command `ladder-jax plan`: from its arguments to what it prints."""

import dataclasses
import json
from typing import Any

from ladder_jax.config import Config, ConfigError, Mesh, require
from ladder_jax.hardware import aot
from ladder_jax.planner import compare, lanes, tables
from ladder_jax.planner.plan import Request, build
from ladder_jax.planner.report import make_report, make_timeline


def run(config: Config, args: Any) -> str:
    """Runs the command. Returns what to print, and writes the files that it names.

    Args:
      config: the recipe's.
      args: a cli.PlanArguments.
    Raises ConfigError for arguments that are not accepted.
    """
    request = make_request(config, args)
    if args.compare:
        return _run_comparison(request, args)
    compiled = build(request)
    if args.hlo:
        with open(args.hlo, "w", encoding="utf-8") as file:
            file.write(compiled.text)
    played = make_timeline(compiled)
    if args.plot:
        lanes.draw(args.plot, [(request.config.model.residual, played)])
    report = make_report(compiled, played)
    return json.dumps(report) if args.json else plan_text(report)


def _run_comparison(request: Request, args: Any) -> str:
    if args.hlo:
        raise ConfigError("--hlo writes one program: leave out --compare")
    planned = compare.plan_variants(request)
    if args.plot:
        lanes.draw(args.plot, [(one.title, one.timeline) for one in planned])
    if args.json:
        return json.dumps([dict(variant=one.title, **one.report) for one in planned])
    return compare.comparison_text(planned)


def make_request(config: Config, args: Any) -> Request:
    """The `Request` of a recipe's config and the command's arguments."""
    longest = config.model.max_length
    context = min(2048, longest) if args.context is None else args.context
    require(
        1 <= context <= longest,
        "context",
        context,
        f"from 1 to model.max_length={longest}",
    )
    require(args.batch >= 1, "batch", args.batch, "1 or more")
    mesh_config = config.mesh
    if args.tensor is not None:
        mesh_config = Mesh(data=-1, tensor=args.tensor)
    model_config = config.model
    if args.schedule is not None:
        model_config = dataclasses.replace(model_config, residual=args.schedule)
    config = dataclasses.replace(
        config,
        model=model_config,
        mesh=dataclasses.replace(mesh_config, reduction=args.reduction),
    )
    target = aot.parse(args.target)
    return Request(args.recipe, config, target, args.workload, args.batch, context)


COLLECTIVE_COLUMNS = [
    tables.Column("collective", lambda row: row["name"][-34:], left=True),
    tables.Column("kind", lambda row: row["kind"], left=True),
    tables.Column("axis", lambda row: row["axis"], left=True),
    tables.Column("bytes", tables.number("bytes", "")),
    tables.Column("x", tables.number("count", "g")),
    tables.Column("async", lambda row: "yes" if row["asynchronous"] else "no"),
    tables.Column("us", tables.number("communication_us", ".1f")),
    tables.Column("window", tables.number("window_compute_us", ".1f")),
    tables.Column("hidden", tables.number("hidden_us", ".1f")),
    tables.Column("exposed", tables.number("exposed_us", ".1f")),
    tables.Column(
        "where",
        lambda row: (
            row["block"] + (f", {row['merged']} merged" if row["merged"] > 1 else "")
        ),
        left=True,
    ),
]


def plan_text(report: dict[str, Any]) -> str:
    """The plan as text: a line a collective, then the totals and the memory.

    Args:
      report: see report.make_report.
    """
    totals = ", ".join(
        f"{name.removesuffix('_us')} {value:,.1f}"
        for name, value in report["totals"].items()
    )
    memory = dict(report["memory"])
    fits = "fits" if memory.pop("fits") else "does not fit"
    sizes = ", ".join(
        f"{name.removesuffix('_bytes')} {value / 1e9:.2f}"
        for name, value in memory.items()
    )
    return "\n".join(
        [
            f"{report['workload']} of {report['layers']} layers, "
            f"{report['schedule']}, {report['reduction']}, batch {report['batch']}, "
            f"context {report['context']}, on {report['target']}",
            tables.text_table(COLLECTIVE_COLUMNS, report["collectives"]),
            f"{totals} (us a step)",
            f"{sizes} (GB a device): {fits}",
        ]
    )
