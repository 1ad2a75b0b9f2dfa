"""The conversion study: how far a little training brings a converted model back.

    python -m ladder_jax.bench.conversion PARENT

It makes some layers of a pretrained parent ladder, and trains: on the text alone (sft),
toward the parent (distill), and toward the parent with an annealed delay (anneal; with
the gate on the held-out loss: gated). The control is the parent itself, trained on the
same batches. Held-out loss is measured on text of the same kind and of another kind, at
several budgets of tokens; with --tasks also accuracy, at the start and at the end.

One run gives all budgets: the learning rate is constant after its warm-up. All runs are
one compiled program a loss, the ladder model with a freshness for every block
(residual/annealing.py); so the layers, the delay and the rate are data.

It writes rows.csv row by row, and table.md and plot.png at the end. The same command
goes on where it was stopped.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ladder_jax import checkpoint, saving, train_programs, training
from ladder_jax.anneal import Anneal
from ladder_jax.arguments import parse
from ladder_jax.bench import conversion_report as reports
from ladder_jax.bench.conversion_plan import Arguments, Run, runs
from ladder_jax.bench.conversion_report import say
from ladder_jax.bench.conversion_study import MEASURED, Study
from ladder_jax.config import Distill
from ladder_jax.convert import damage
from ladder_jax.convert.ladderize import notation_of
from ladder_jax.data.batches import train_iterator

# ---------------------------------------------------------------- a run


def train_run(
    study: Study, run: Run, out: Path, stop_at: float
) -> Iterator[dict[str, Any]]:
    """Trains, and yields a row at every budget, until the time `stop_at`."""
    arguments = study.arguments
    tokens_per_step = arguments.batch * arguments.length
    budgets = sorted({*arguments.budgets, *arguments.long_budgets})
    stops = [round(budget / tokens_per_step) for budget in budgets]
    stops = [stop for stop in stops if stop * tokens_per_step <= run.total]
    chosen = study.ladder_layers(run.layers, out)
    stale = damage.freshness_of(study.parent.layers, chosen)
    residual = notation_of(chosen, study.parent.layers) if chosen else "standard"
    step_program = study.steps["sft" if run.method == "sft" else "distill"]
    batches = train_iterator(
        study.corpora[MEASURED[0]],
        batch=arguments.batch,
        length=arguments.length,
        seed=run.seed,
    )
    step, state = 0, study.first_state(run.rate)
    saver = Saver(study, run, out) if arguments.save else None
    saved: dict[str, Any] | None = None
    if saver and (restored := saver.restore(batches)):
        step, state, saved = restored
    delay = Delay(study, run, stale, stops[-1], saved)
    began, trained, loss = time.perf_counter(), 0, math.nan
    for stop in stops:
        if stop < step:
            continue
        while step < stop:
            delay.before_step(step, state)
            inputs: dict[str, Any] = dict(freshness=delay.freshness(step))
            if run.method != "sft":
                inputs["parent"] = study.weights
            batch = training.to_devices(study.mesh, next(batches))
            state, results = step_program(state, batch, inputs)
            step, trained = step + 1, trained + 1
            delay.after_step()
            if trained == 1:  # XLA compiled
                jax.block_until_ready(state)
                began = time.perf_counter()
            if step % 20 == 0:
                loss = float(results["loss"])
                if not math.isfinite(loss):
                    say(f"{run}: loss {loss} in step {step}: the run ends")
                    return
                if time.perf_counter() > stop_at:
                    return
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        rate = (trained - 1) * tokens_per_step / seconds if trained > 1 else math.nan
        values: dict[str, float] = study.measure(state.model, stale)
        if step in (0, stops[-1]):
            values |= study.tasks.scores(state.model, residual, trained=step > 0)
        yield dict(
            **run._asdict(),
            tokens=step * tokens_per_step,
            residual=residual,
            freshness=delay.share(step),
            train_loss=loss,
            tokens_per_s=rate,
            **values,
        )
        if saver and 0 < step < stops[-1]:
            saver.save(step, state, batches, delay.state())
        began = time.perf_counter() - seconds
    if saver:
        saver.remove()


class Delay:
    """How fresh a stream blocks read in each step of a run; see anneal.py.

    Args:
      study, run: what is trained.
      stale: the freshness of every block at the end.
      steps: of the run.
      state: `state()` of the run to resume; None: a new run.
    """

    def __init__(
        self,
        study: Study,
        run: Run,
        stale: np.ndarray,
        steps: int,
        state: dict[str, Any] | None,
    ) -> None:
        self.study, self.stale = study, stale
        arguments = study.arguments
        count = round(arguments.anneal * steps)
        self._gated = run.method == "gated"
        self._anneal: Anneal | None = None
        if count and run.method in ("anneal", "gated"):
            tolerance = arguments.tolerance if self._gated else None
            options = Distill(anneal_steps=count, anneal_tolerance=tolerance)
            self._anneal = Anneal(options, steps, state)

    def share(self, step: int) -> float:
        """The share of the fresh stream in step `step`: 0 is the whole delay."""
        return 0.0 if self._anneal is None else float(self._anneal.freshness(step))

    def freshness(self, step: int) -> np.ndarray:
        """The freshness of every block in step `step`."""
        return 1 - np.float32(1 - self.share(step)) * (1 - self.stale)

    def before_step(self, step: int, state: train_programs.State) -> None:
        """Measures the blended model where the gate is due."""
        anneal = self._anneal
        due = self._gated and step % self.study.arguments.gate_every == 0
        if due and anneal is not None and not anneal.ended:
            anneal.see(self.study.blended_loss(state.model, self.freshness(step)))

    def after_step(self) -> None:
        if self._anneal is not None:
            self._anneal.after_step()

    def state(self) -> dict[str, Any]:
        """JSON that a resumed run needs."""
        return {} if self._anneal is None else self._anneal.state()


class Saver:
    """The state of the run in progress, in the folder state/."""

    def __init__(self, study: Study, run: Run, out: Path) -> None:
        self.study, self.meta = study, dict(run=[*map(str, run)])
        self.folder = out / "state" / "-".join(map(str, run)).replace(":", "")

    def save(
        self,
        step: int,
        state: train_programs.State,
        batches: Any,
        delay: dict[str, Any],
    ) -> None:
        # Another run's state, or an earlier one of this run, is of no use any more.
        with saving.Checkpoints(self.folder, 1) as checkpoints:
            if checkpoints.steps():
                checkpoints.restore(self._abstract())
            meta = self.meta | dict(delay=delay)
            checkpoints.save(step, state.saved(), batches, meta)

    def _abstract(self) -> dict[str, Any]:
        study = self.study
        return train_programs.abstract_state(
            study.config, study.mesh, study.optimizer
        ).saved()

    def restore(
        self, batches: Any
    ) -> tuple[int, train_programs.State, dict[str, Any] | None] | None:
        """(step, state, the delay's state); None: nothing saved. Moves `batches`."""
        if not checkpoint.saved_steps(self.folder):
            return None
        with saving.Checkpoints(self.folder, 1) as checkpoints:
            step, arrays, meta = checkpoints.restore(self._abstract(), batches)
        say(f"goes on from step {step} in {self.folder}")
        return step, train_programs.State(**arrays), meta.get("delay")

    def remove(self) -> None:
        import shutil

        shutil.rmtree(self.folder, ignore_errors=True)


def run(arguments: Arguments) -> None:
    """Makes the runs that rows.csv does not hold yet, then the table and the plot."""
    began = time.perf_counter()
    minutes = arguments.minutes
    stop_at = math.inf if minutes is None else began + 60 * minutes
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    reports.require_same(out, arguments.settings())
    study = Study(arguments, out)
    rows = reports.Rows(out / "rows.csv")
    study.tasks.remember(rows.rows)
    seconds_per_token = 0.0
    for number, each in enumerate(plan := runs(arguments), start=1):
        if rows.complete(each._asdict()):
            continue
        now = time.perf_counter()
        estimate = seconds_per_token * each.total
        if now + estimate > stop_at:
            say(f"{each} would end after --minutes {minutes}: left out")
            continue
        if not arguments.save:
            rows.remove(each._asdict())
        for row in train_run(study, each, out, stop_at):
            rows.add(row)
            say(reports.line(row, number, len(plan), time.perf_counter() - began))
        if number > 2:  # the first two may have compiled
            seconds = time.perf_counter() - now
            seconds_per_token = max(seconds_per_token, seconds / each.total)
    reports.write(out)
    say(f"done: {out}/table.md, {out}/plot.png, {out}/rows.csv")


if __name__ == "__main__":
    run(parse(Arguments, sys.argv[1:], "python -m ladder_jax.bench.conversion"))
