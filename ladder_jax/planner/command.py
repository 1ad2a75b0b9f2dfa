"""Runs the command `ladder-jax plan`, from its arguments to the text it prints."""

import json
from typing import Any

from ladder_jax import files
from ladder_jax.config import Config, ConfigError
from ladder_jax.planner import compare, lanes, planning
from ladder_jax.planner.plan import Request


def run(config: Config, args: Any) -> str:
    """Runs the command. Writes the files that `args` names, and returns the text to
    print.

    Args:
      config: the recipe's.
      args: a cli.PlanArguments.
    Raises ConfigError for arguments that are not accepted.
    """
    request = make_request(config, args)
    if args.accepted is not None and not args.drafts:
        raise ConfigError("--accepted is of a pass with drafts: give --drafts, too")
    if args.drafts and (args.compare or args.lengths):
        raise ConfigError("--drafts plans one step: leave out --compare and --lengths")
    if args.compare:
        return _run_comparison(request, args)
    if args.drafts:
        plan = planning.drafted_plan(request, args.drafts, args.accepted)
    elif args.lengths:
        if args.context is not None:
            raise ConfigError("--lengths says the context: leave out --context")
        plan = planning.mixed_plan(request, args.lengths)
    else:
        plan = planning.plan_of(request)
    if args.hlo:
        files.write_text(args.hlo, plan.program)
    if args.plot:
        lanes.draw(args.plot, [(request.config.model.residual, plan.timeline)])
    return json.dumps(plan.report) if args.json else str(plan)


def _run_comparison(request: Request, args: Any) -> str:
    """`run` with --compare: plans several residual schedules."""
    if args.hlo:
        raise ConfigError("--hlo writes one program: leave out --compare")
    if args.lengths:
        raise ConfigError("--lengths compares rows and pages: leave out --compare")
    plans = compare.plan_variants(request)
    if args.plot:
        lanes.draw(args.plot, [(plan.title, plan.timeline) for plan in plans])
    if args.json:
        rows = [dict(variant=plan.title, **plan.report) for plan in plans]
        return json.dumps(rows)
    return compare.comparison_text(plans)


def make_request(config: Config, args: Any) -> Request:
    """The `Request` of a recipe's config and the command's arguments."""
    return planning.make_request(
        config,
        args.target,
        args.workload,
        args.batch,
        recipe=args.recipe,
        context=args.context,
        residual=args.schedule,
        reduction=args.reduction,
        tensor=args.tensor,
        kv_layout=args.kv_layout,
        tokens=args.tokens,
    )
