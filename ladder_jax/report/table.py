"""Runs beside each other as tables of text: their results, and how they differ."""

from collections.abc import Sequence
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from ladder_jax.config import to_dict
from ladder_jax.report.prediction import milliseconds
from ladder_jax.report.runs import Run, events, hours

MISSING = "-"


class Table(NamedTuple):
    """Cells of text, row by row."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def results(runs: Sequence[Run]) -> Table:
    """A row a run. "-": the run has no such number."""
    header = ["run", "loss", "held-out loss", "steps", "tokens", "hours", "tokens/s"]
    header += ["step", "MFU", "skipped", "rollbacks", "starts", "devices", "code"]
    return Table(header, [_result(run) for run in runs])


def _result(run: Run) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return MISSING if value is None else form.format(value)

    seconds, per_step = run.step_seconds, run.tokens_per_step
    elapsed = hours(run)
    kinds = [event.kind for event in events(run)]
    devices = run.devices
    code = run.starts[-1]["code"] if run.starts else {}
    commit = (code.get("commit") or code.get("source") or MISSING)[:10]
    return [
        run.name,
        show(run.last("loss"), "{:.4f}"),
        show(run.last("held_out_loss"), "{:.4f}"),
        f"{run.steps:,}",
        show(per_step and run.steps * per_step, "{:,}"),
        show(elapsed[-1] if elapsed else None, "{:.2f}"),
        show(run.median("tokens_per_s"), "{:,.0f}"),
        milliseconds(seconds) if seconds else MISSING,
        show(run.median("mfu"), "{:.1%}"),
        show(run.last("skipped_steps"), "{:.0f}"),
        str(kinds.count("rollback")),
        str(kinds.count("start") or MISSING),
        f"{devices['count']} x {devices['kind']}" if devices else MISSING,
        commit + ("+" if code.get("changes") else ""),
    ]


def differences(runs: Sequence[Run]) -> Table | None:
    """The fields of the configuration whose values differ; None where none does."""
    known = [run for run in runs if run.config is not None]
    flat = [flatten_dict(to_dict(run.config), sep=".") for run in known if run.config]
    fields = [
        name
        for name in (flat[0] if flat else [])
        if name != "train.out" and len({repr(values[name]) for values in flat}) > 1
    ]
    if not fields:
        return None
    rows = [[name, *(str(values[name]) for values in flat)] for name in fields]
    return Table(["field", *(run.name for run in known)], rows)
