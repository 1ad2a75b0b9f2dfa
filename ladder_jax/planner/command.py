"""Runs the command `ladder-jax plan`, from its arguments to the text it prints."""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax import files
from ladder_jax.config import Config, ConfigError
from ladder_jax.hardware import networks
from ladder_jax.planner import (
    calibration,
    compare,
    lanes,
    planning,
    sweep,
    trace,
    tune,
    use,
)
from ladder_jax.planner.plan import Request
from ladder_jax.residual import tuned


class Outcome(NamedTuple):
    """What the command found."""

    text: str  # to print
    fits: bool  # whether a device has the memory; of several plans, for one of them


def run(config: Config, args: Any) -> Outcome:
    """Runs the command, and writes the files that `args` names.

    Args:
      config: the recipe's.
      args: an arguments.PlanArguments.
    Raises ConfigError for arguments that are not accepted, before anything is compiled.
    """
    _check(args)
    if args.tune:
        return _run_tuning(config, args)
    if args.sweep:
        return _run_sweep(config, args)
    request, measured = make_request(config, args), ""
    if args.calibration:
        found = calibration.read(args.calibration)
        measured = calibration.comparison(request.target, found)
        target = calibration.apply(request.target, found, args.calibration)
        request = request._replace(target=target)
    if args.compare:
        return _run_comparison(request, args)
    plan = _plan(request, args)
    if args.price is not None:
        add_price(plan.report, args.price)
    title = request.config.model.residual
    _write(args, [(title, plan.timeline)], plan.program)
    if args.json:
        return Outcome(json.dumps(plan.report), plan.fits)
    return Outcome("\n".join(filter(None, [str(plan), measured])), plan.fits)


def _plan(request: Request, args: Any) -> planning.Plan:
    """One plan: of a step, with drafts, or over mixed lengths."""
    if args.drafts:
        return planning.drafted_plan(request, args.drafts, args.accepted)
    if args.lengths:
        return planning.mixed_plan(request, args.lengths)
    return planning.plan_of(request)


def _check(args: Any) -> None:
    """Raises ConfigError for options that exclude each other, and for files that could
    not be written after minutes of compiling."""
    if args.accepted is not None and not args.drafts:
        raise ConfigError("--accepted is of a pass with drafts: give --drafts, too")
    if args.drafts and (args.compare or args.lengths):
        raise ConfigError("--drafts plans one step: leave out --compare and --lengths")
    if args.compare and args.hlo:
        raise ConfigError("--hlo writes one program: leave out --compare")
    if args.compare and args.lengths:
        raise ConfigError("--lengths compares rows and pages: leave out --compare")
    if args.lengths and args.context is not None:
        raise ConfigError("--lengths says the context: leave out --context")
    others = ["compare", "lengths", "drafts", "hlo", "trace", "calibration"]
    for option, what, without in (
        ("sweep", "plans steps", others),
        ("tune", "writes a table", [*others, "plot", "json", "price", "tokens"]),
    ):
        for name in without:
            if getattr(args, option) and getattr(args, name):
                raise ConfigError(f"--{option} {what}: leave out --{name}")
    if args.price is not None and not 0 < args.price < float("inf"):
        raise ConfigError(f"price={args.price!r} is not accepted: it must be above 0")
    for name in ("plot", "hlo", "trace"):
        path = getattr(args, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(
                f"{name}={path!r} is not accepted: its folder does not exist"
            )
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'ladder_jax[plot]'")


def _write(args: Any, timelines: list[Any], program: str = "") -> None:
    """Writes the files that the arguments name."""
    if args.hlo:
        files.write_text(args.hlo, program)
    if args.plot:
        lanes.draw(args.plot, timelines)
    if args.trace:
        trace.write(args.trace, timelines)


def _run_comparison(request: Request, args: Any) -> Outcome:
    """`run` with --compare: plans several residual schedules."""
    plans = compare.plan_variants(request)
    for plan in plans:
        if args.price is not None:
            add_price(plan.report, args.price)
    _write(args, [(plan.title, plan.timeline) for plan in plans])
    fits = bool(plans[0].report["memory"]["fits"])
    if args.json:
        rows = [dict(variant=plan.title, **plan.report) for plan in plans]
        return Outcome(json.dumps(rows), fits)
    return Outcome(compare.comparison_text(plans), fits)


def _run_sweep(config: Config, args: Any) -> Outcome:
    """`run` with --sweep. A combination that cannot be compiled has a line that says
    why."""
    listed = sweep.combinations(args.sweep)
    requests = [make_request(config, args, **values) for values in listed]
    planning.check_fit(requests)
    cells = []
    for values, request in zip(listed, requests, strict=True):
        try:
            report = planning.plan_of(request).report
        except ConfigError as error:
            cells.append(sweep.Cell(values, None, str(error)))
            continue
        if args.price is not None:
            add_price(report, args.price)
        cells.append(sweep.Cell(values, report))
    if args.plot:
        sweep.draw(args.plot, cells)
    fits = bool(sweep.frontier(cells))
    if args.json:
        rows = [
            dict(values=cell.values, error=cell.error, plan=cell.report)
            for cell in cells
        ]
        return Outcome(json.dumps(rows), fits)
    return Outcome(sweep.table(cells), fits)


def _run_tuning(config: Config, args: Any) -> Outcome:
    """`run` with --tune."""
    listed = sweep.combinations(args.sweep or tune.SHAPES)
    requests = [make_request(config, args, **values) for values in listed]
    if any(request.config.mesh.reduction != "auto" for request in requests):
        raise ConfigError("--tune plans every reduction: leave out the reduction")
    planning.check_fit(requests)
    trials = tune.run(requests, tuned.PATH)
    return Outcome(f"{tune.text(trials)}\nwritten to {tuned.PATH}", True)


def add_price(report: dict[str, Any], price: float) -> None:
    """Adds what a million tokens cost to the report's entry "use"."""
    cost = use.cost_of_million(report["use"], price)
    report["use"] |= dict(price=price, cost_per_million=cost)


def make_request(config: Config, args: Any, **swept: Any) -> Request:
    """The `Request` of a recipe's config and the command's arguments.

    swept: values in place of those of `args`.
    """
    options = dict(
        target=args.target,
        batch=args.batch,
        context=args.context,
        schedule=args.schedule,
        reduction=args.reduction,
        tensor=args.tensor,
    )
    options |= swept
    request = planning.make_request(
        config,
        options["target"],
        args.workload,
        options["batch"],
        recipe=args.recipe,
        context=options["context"],
        residual=options["schedule"],
        reduction=options["reduction"],
        tensor=options["tensor"],
        kv_layout=args.kv_layout,
        tokens=args.tokens,
    )
    return request._replace(target=networks.with_network(request.target, args.network))
