"""Shows how far a start is: stages, programs compiled, seconds left."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ladder_jax.progress import duration

LINE_SECONDS = 10.0  # between two lines, where stderr is no terminal


@dataclass(frozen=True)
class Stage:
    """How far one stage of a start is."""

    name: str  # such as "first runs"
    done: int = 0
    total: int = 0  # 0: it has no parts
    seconds_left: float | None = None  # of this stage; None: unknown

    def __str__(self) -> str:
        text = f"{self.name}: {self.done} of {self.total}" if self.total else self.name
        left = self.seconds_left
        return text if left is None else f"{text}, {duration(left)} left"


Report = Callable[[Stage | str], object]  # gets stages, and lines about what was found


def silent(_: Stage | str) -> None:
    """A report that nobody reads."""


class Done:
    """Counts the finished parts of a stage; any thread may call it."""

    def __init__(self, stages: "Stages", name: str, total: int) -> None:
        self._stages, self._name, self._total = stages, name, total
        self._lock = threading.Lock()
        self._count, self._start = 0, time.perf_counter()
        self._report()

    def __call__(self, _: object = None) -> None:
        """One more part is finished."""
        with self._lock:
            self._count += 1
            self._report()

    def each(self, parts: list[Any]) -> Iterator[Any]:
        """Yields parts, and counts each as finished when the next one is asked for."""
        self._total = len(parts)
        for part in parts:
            yield part
            self()

    def _report(self) -> None:
        left = None
        if self._count:
            seconds = time.perf_counter() - self._start
            left = seconds / self._count * (self._total - self._count)
        self._stages.report(Stage(self._name, self._count, self._total, left))


class Stages:
    """The stages of one start. seconds: what each took, by name."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        """Reports a line about what was found."""
        self.report(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Done]:
        """Reports a stage that the block is. It gets a function for each part."""
        start = time.perf_counter()
        yield Done(self, name, total)
        self.seconds[name] = time.perf_counter() - start

    def all_seconds(self) -> dict[str, float]:
        """The seconds of the stages, and of all together, "total"."""
        return self.seconds | {"total": time.perf_counter() - self._start}


class ProgressBar:
    """A report on stderr: a bar where it is a terminal, else a line now and then.

    Errors of the output do not end the start.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._name, self._next_line = "", 0.0
        self._lock = threading.Lock()

    def __call__(self, what: Stage | str) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError, AttributeError):
            if isinstance(what, str):
                tqdm.write(what, file=sys.stderr)
            elif sys.stderr.isatty():
                self._show_bar(what)
            else:
                self._show_line(what)

    def close(self) -> None:
        """Removes the bar."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.close()
            self._bar = None

    def _show_bar(self, stage: Stage) -> None:
        if stage.name != self._name:
            if self._bar is not None:
                self._bar.close()
            options = dict(total=stage.total or None, desc=stage.name, leave=False)
            self._bar, self._name = tqdm(unit="program", **options), stage.name
        self._bar.total = stage.total or None
        self._bar.update(stage.done - self._bar.n)
        self._bar.refresh()

    def _show_line(self, stage: Stage) -> None:
        now = time.monotonic()
        if stage.name == self._name and now < self._next_line:
            return
        self._name, self._next_line = stage.name, now + LINE_SECONDS
        print(stage, file=sys.stderr, flush=True)
