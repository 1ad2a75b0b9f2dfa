"""Plans decode steps with every reduction that may be the fastest: `plan --tune`.

It adds what it found to the table that "auto" reads (residual/tuned.py), a row as soon
as it is planned, and leaves out the rows that the same jaxlib has planned before.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from ladder_jax import schedule
from ladder_jax.config import ConfigError
from ladder_jax.hardware import aot
from ladder_jax.planner import recipe_plans, tables, workers
from ladder_jax.planner.plan import Request
from ladder_jax.residual import tuned
from ladder_jax.residual.tuned import Trial
from ladder_jax.say import Say, say

# What is tuned without --sweep.
SHAPES = ("batch=1,4,8,16,32,64", "context=512")
# The candidates. On GPUs every exchange is a kernel that takes nearly as long as an
# all-reduce; v5e's compiler does not finish one-shot.
TPU = ("psum", "recursive-doubling")
GPU = ("psum", "one-shot")
LIMIT = 900.0  # seconds of a program


class Task(NamedTuple):
    """A program to plan, and its row without what was found."""

    trial: Trial
    request: Request


def run(requests: Sequence[Request], path: Path, say: Say = say) -> list[Trial]:
    """Plans the trials of decode steps that the table does not have, and adds them.

    Args:
      requests: of decode; their reduction is not used.
      path: the table.
      say: gets a line for each trial as it ends.
    Returns all trials of these steps, those that the table had, too.
    Raises ConfigError if the table cannot be read or written, before it plans.
    """
    wanted = [task for request in requests for task in tasks(request)]
    rows = {row.key: row for row in tuned.read(path)}
    write(rows.values(), path)
    missing = [task for task in wanted if not _is_in(rows, task.trial)]
    # All steps with psum first, so that a job which is cut off has whole rows.
    missing.sort(key=lambda task: (*TPU, *GPU).index(task.trial.reduction))
    for task, found, ended in workers.results(plan_trial, missing, 1, LIMIT):
        row = found or task.trial
        say(f"{_name(row)}: {ended or _step(row)}")
        rows[row.key] = row
        write(rows.values(), path)
    return [rows[task.trial.key] for task in wanted]


def _is_in(rows: dict[tuple[object, ...], Trial], trial: Trial) -> bool:
    row = rows.get(trial.key)
    return row is not None and row.jaxlib == trial.jaxlib


def tasks(request: Request) -> Iterator[Task]:
    """The candidates of a decode step, in each layout of the cache.

    Raises ConfigError where "auto" reads no table.
    """
    model_config, target = request.config.model, request.target
    if request.workload != "decode" or model_config.dtype != "bfloat16":
        raise ConfigError("--tune is of decode steps of models in bfloat16")
    if not schedule.parse(model_config.residual, model_config.layers).overlaps:
        raise ConfigError(
            f"--tune is of schedules with delays, not of {model_config.residual!r}"
        )
    tensor = request.config.mesh.tensor
    batch = max(request.batch * tensor // len(target.devices()), 1)
    # model.hidden computes a lone row twice there.
    rows = 2 if batch == 1 and target.chip.doubles_row else batch
    layouts = ["rows", "pages"]
    if request.kv_layout != "auto":
        layouts = [request.kv_layout]
    candidates = TPU if target.chip.is_tpu else GPU
    for reduction, layout in itertools.product(candidates, layouts):
        trial = Trial(
            chip=target.kind,
            tensor=tensor,
            schedule=model_config.residual,
            dim=model_config.dim,
            ffn_dim=model_config.ffn_dim,
            layout=layout,
            batch=batch,
            context=request.context,
            rows=rows,
            reduction=reduction,
            step_us=0.0,
            exposed_us=0.0,
            jaxlib=recipe_plans.jaxlib_version(),
        )
        yield Task(trial, request)


def plan_trial(task: Task) -> Trial:
    """A task's row with its step. Runs in a process of its own."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    aot.prepare()
    from ladder_jax.planner import plan, report

    trial, request = task
    mesh = dataclasses.replace(
        request.config.mesh, reduction=cast(Any, trial.reduction)
    )
    config = dataclasses.replace(request.config, mesh=mesh)
    request = request._replace(config=config, kv_layout=trial.layout)
    try:
        with aot.silence():
            compiled = plan.build(request)
    except ConfigError:
        return trial
    totals = report.make_report(compiled, report.make_timeline(compiled))["totals"]
    times = {name: round(totals[name], 3) for name in ("step_us", "exposed_us")}
    return dataclasses.replace(trial, **times)


def write(rows: Iterable[Trial], path: Path) -> None:
    """Writes a table, sorted. Raises ConfigError where it cannot be written."""
    try:
        tables.write_csv(path, Trial, sorted(rows, key=dataclasses.astuple))
    except OSError as error:
        raise ConfigError(
            f"the table of reductions {path} cannot be written: {error.strerror}"
        ) from None


# ---------------------------------------------------------------- as text


def text(trials: Sequence[Trial]) -> str:
    """The trials as text: a line for each step, a column for each reduction; * marks
    what "auto" takes."""
    steps: dict[tuple[object, ...], dict[str, Trial]] = {}
    messages: dict[tuple[object, ...], list[Trial]] = {}
    for one in trials:
        steps.setdefault((*one.model, *one.step), {})[one.reduction] = one
        messages.setdefault((*one.model, one.rows), []).append(one)
    chosen = {message: tuned.fastest(group) for message, group in messages.items()}

    def column(reduction: str) -> tables.Column:
        def cell(by_reduction: dict[str, Trial]) -> str:
            one = by_reduction.get(reduction)
            if one is None:
                return ""
            mark = "*" if chosen[(*one.model, one.rows)] == reduction else ""
            return mark + _step(one)

        return tables.Column(reduction, cell)

    def first(name: str) -> tables.Column:
        value = lambda step: str(getattr(next(iter(step.values())), name))
        return tables.Column(name, value, left=name in ("chip", "layout"))

    names = dict.fromkeys(one.reduction for one in trials)
    keys = ("chip", "tensor", "layout", "batch", "context")
    columns = [*map(first, keys), *map(column, names)]
    title = "modelled microseconds a decode step (exposed); * is what auto takes"
    return f"{title}\n{tables.text_table(columns, steps.values())}"


def _step(trial: Trial) -> str:
    if not trial.step_us:
        return "no plan"
    return f"{trial.step_us:,.0f} ({trial.exposed_us:,.0f})"


def _name(trial: Trial) -> str:
    shape = f"{trial.layout} of {trial.batch}x{trial.context}"
    return f"{trial.chip}, tensor {trial.tensor}, {shape}, {trial.reduction}"
