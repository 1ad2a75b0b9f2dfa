"""Runs the command `ladder-jax plan`, from its arguments to the text it prints."""

import dataclasses
import json
from typing import Any

from ladder_jax.config import Config, ConfigError, Mesh, require
from ladder_jax.hardware import aot
from ladder_jax.planner import compare, lanes, tables
from ladder_jax.planner.plan import Request, build
from ladder_jax.planner.report import make_report, make_timeline


def run(config: Config, args: Any) -> str:
    """Runs the command. Writes the files that `args` names, and returns the text to
    print.

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
    timeline = make_timeline(compiled)
    if args.plot:
        lanes.draw(args.plot, [(request.config.model.residual, timeline)])
    report = make_report(compiled, timeline)
    return json.dumps(report) if args.json else plan_text(report)


def _run_comparison(request: Request, args: Any) -> str:
    """`run` with --compare: plans several residual schedules."""
    if args.hlo:
        raise ConfigError("--hlo writes one program: leave out --compare")
    plans = compare.plan_variants(request)
    if args.plot:
        lanes.draw(args.plot, [(plan.title, plan.timeline) for plan in plans])
    if args.json:
        rows = [dict(variant=plan.title, **plan.report) for plan in plans]
        return json.dumps(rows)
    return compare.comparison_text(plans)


def make_request(config: Config, args: Any) -> Request:
    """The `Request` of a recipe's config and the command's arguments."""
    max_length = config.model.max_length
    context = min(2048, max_length) if args.context is None else args.context
    require(
        1 <= context <= max_length,
        "context",
        context,
        f"from 1 to model.max_length={max_length}",
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


def _where(row: dict[str, Any]) -> str:
    """A collective's block, and how many collectives XLA merged into it."""
    merged = f", {row['merged']} merged" if row["merged"] > 1 else ""
    return row["block"] + merged


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
    tables.Column("where", _where, left=True),
]


def plan_text(report: dict[str, Any]) -> str:
    """The plan as text: one line for each collective, then the totals and the memory.

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
