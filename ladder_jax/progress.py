"""Reports a training run's progress: lines, a progress bar, speed and MFU.

An error in the output does not end the run: a line that cannot be written is dropped.
"""

import contextlib
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from ladder_jax.metrics import Metrics


class Output(contextlib.AbstractContextManager):
    """Lines on stdout and a progress bar on stderr, from the `leader` process alone.

    A closed pipe, a closed terminal or a full disk does not end the run: its numbers
    are in metrics.jsonl too.
    """

    def __init__(self, leader: bool) -> None:
        self.leader = leader
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Writes one line above the progress bar, and flushes it."""
        if self.leader and sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def show_steps(self, first: int, total: int) -> None:
        """Shows a progress bar where stderr is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            if self.leader and sys.stderr is not None and sys.stderr.isatty():
                self._bar = tqdm(total=total, initial=first, unit="step")

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.update()

    def go_back(self, step: int) -> None:
        """Moves the progress bar back to `step`."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.n = step
                self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()


class Measured(NamedTuple):
    """The results of a step, which the device may not have computed yet, and the time
    when it has."""

    step: int
    results: dict[str, jax.Array]
    ready_at: Future | None = None  # of float, seconds of time.perf_counter


class Pace(contextlib.AbstractContextManager):
    """Measures seconds a step, from the times at which the device completes steps.

    The host reads the results of a step late, while the next one runs. So a thread
    waits for each step that is reported, and takes the time. Evaluation and saving do
    not count: call `restart` after them.
    """

    def __init__(self, step: int) -> None:
        self._waiter = ThreadPoolExecutor(1, "pace")
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts to measure from now, with `step` steps complete."""
        self._step, self._time = step, time.perf_counter()

    def measure(self, step: int, results: dict[str, jax.Array]) -> Measured:
        """Starts to wait for the `results` of `step`; `lap` takes what this returns."""
        return Measured(step, results, self._waiter.submit(_time_of, results))

    def lap(self, measured: Measured) -> float | None:
        """Seconds a step since the last `lap` or `restart`. None if no step ended."""
        assert measured.ready_at is not None, "lap takes what Pace.measure returned"
        ready_at = measured.ready_at.result()
        steps, seconds = measured.step - self._step, ready_at - self._time
        self._step, self._time = measured.step, ready_at
        return seconds / steps if steps and seconds > 0 else None

    def __exit__(self, *_: object) -> None:
        self._waiter.shutdown()


def _time_of(results: dict[str, jax.Array]) -> float:
    """Waits for `results`, and returns the time then.

    An error in computing them is not raised here, but where the host reads them.
    """
    with contextlib.suppress(Exception):
        jax.block_until_ready(results)
    return time.perf_counter()


class Speed(NamedTuple):
    """Turns seconds a step into tokens a second, MFU and the time to the run's end."""

    tokens: int  # in a step
    steps: int  # in the run
    flops: float  # model FLOPs of a token
    peak: float | None  # FLOP/s of all devices; None: unknown

    def rates(self, seconds: float) -> dict[str, float]:
        """tokens_per_s and, where the peak is known, mfu, at `seconds` a step."""
        tokens_per_s = self.tokens / seconds
        values = {"tokens_per_s": tokens_per_s}
        if self.peak:
            values["mfu"] = tokens_per_s * self.flops / self.peak
        return values

    def seconds_left(self, step: int, seconds: float) -> float:
        """Seconds until the run's end after `step`, at `seconds` a step."""
        return seconds * (self.steps - step)


class Reports:
    """Writes each report of a run as a line of output and as a row of metrics.

    Args:
      metrics: the file of rows; None in all processes but one.
    """

    def __init__(
        self, output: Output, metrics: Metrics | None, pace: Pace, speed: Speed
    ) -> None:
        self.output, self.metrics = output, metrics
        self.pace, self.speed = pace, speed
        self.save_s: float | None = None  # seconds of the last save, for the next row

    def step(self, measured: Measured, values: dict[str, float]) -> None:
        """Reports a training step's `values`, and the speed since the last report."""
        seconds_left = None
        if seconds := self.pace.lap(measured):
            values |= self.speed.rates(seconds)
            seconds_left = self.speed.seconds_left(measured.step, seconds)
        if self.save_s is not None:
            values["save_s"], self.save_s = self.save_s, None
        self._row(measured.step, step_line(values, seconds_left), values)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Reports the `values` of an evaluation after `step`."""
        self._row(step, evaluation_line(values), values)

    def go_back(
        self, step: int, abandoned: int, count: int, most: int, reason: Exception
    ) -> None:
        """Reports that the run went back to `step`, for the `count`-th time of `most`.

        abandoned: the steps that do not count any more, and whose batches are not read
        again.
        """
        self.save_s = None
        self.pace.restart(step)
        self.output.go_back(step)
        self.output.say(
            f"{reason}: back to the checkpoint of step {step}, and on with other data "
            f"(rollback {count} of {most}; steps lost: {abandoned})"
        )
        if self.metrics is not None:
            self.metrics.go_back(
                step, rollbacks=count, time=time.time(), abandoned_steps=abandoned
            )

    def _row(self, step: int, text: str, values: dict[str, float]) -> None:
        self.output.say(f"step {step}/{self.speed.steps}  {text}")
        if self.metrics is not None:
            self.metrics.write(step, time=time.time(), **values)


def step_line(values: dict[str, float], seconds_left: float | None) -> str:
    """The text of a training step's row of metrics."""
    shown = {
        "loss": "loss {:.4f}",
        "divergence": "divergence {:.4f}",
        "cross_entropy": "cross entropy {:.4f}",
        "gradient_norm": "grad norm {:.3f}",
        "learning_rate": "lr {:.2e}",
    }
    parts = [
        text.format(values[name]) for name, text in shown.items() if name in values
    ]
    if values.get("skipped_steps"):
        parts.append(f"{values['skipped_steps']:.0f} skipped")
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:,.0f} tok/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    if "save_s" in values:
        parts.append(f"(last save {values['save_s']:.1f}s)")
    return "  ".join(parts)


def evaluation_line(values: dict[str, float]) -> str:
    """The text of an evaluation's row of metrics."""
    return (
        f"held-out loss {values['held_out_loss']:.4f}, "
        f"{values['held_out_bits_per_byte']:.3f} bits per byte"
        f"  (evaluated in {values['evaluation_s']:.1f}s)"
    )


def duration(seconds: float) -> str:
    """75 -> 1m15s, 7500 -> 2h05m, 360000 -> 4d04h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24:,}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
