"""What a report knows of a run: its rows of metrics, its starts, its configuration."""

import datetime
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax import checkpoint, identity, metrics
from ladder_jax.config import Config, ConfigError, from_dict

Row = dict[str, float]


class Event(NamedTuple):
    """Something that happened to a run, other than a step."""

    step: int
    kind: str  # "start", "rollback" or "skipped"
    text: str


class Run(NamedTuple):
    """A run. Rows are in the order in which they were written."""

    name: str
    rows: list[Row]
    starts: list[identity.Start]  # none for a run of an older version
    config: Config | None  # None: neither run.json nor a checkpoint has one

    def values(self, name: str) -> list[tuple[Row, float]]:
        """(row, value) of each row that has this value."""
        return [(row, row[name]) for row in self.rows if name in row]

    def last(self, name: str) -> float | None:
        found = self.values(name)
        return found[-1][1] if found else None

    def median(self, name: str) -> float | None:
        found = [value for _, value in self.values(name)]
        return statistics.median(found) if found else None

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def tokens_per_step(self) -> int | None:
        if self.config is None:
            return None
        return self.config.train.global_batch * self.config.train.seq_len

    @property
    def step_seconds(self) -> float | None:
        """The median of the measured steps."""
        rate, tokens = self.median("tokens_per_s"), self.tokens_per_step
        return tokens / rate if rate and tokens else None

    @property
    def devices(self) -> dict[str, Any]:
        """See identity.describe; {} where they are not known."""
        return self.starts[-1]["devices"] if self.starts else {}


def load(path: str, name: str) -> Run:
    """The run in the folder `path`, called `name`.

    Raises ConfigError, one line, where the folder holds no rows of a run.
    """
    folder = Path(path).expanduser()
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(
            f"{path} has no metrics.jsonl: give the folder of a run, its train.out"
        )
    rows = metrics.read(file)
    for row in rows:
        for field, value in row.items():
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if not is_number or isinstance(value, bool):
                raise ConfigError(
                    f"{file}, step {row['step']}: {field}={value!r} is not a number"
                )
    if not any("loss" in row for row in rows):
        raise ConfigError(f"{file} has no row with a loss yet: nothing to report")
    starts = identity.read(folder)
    first = max((i for i, s in enumerate(starts) if s["step"] == 0), default=0)
    starts = starts[first:]
    return Run(name, rows, starts, _config(folder, starts))


def _config(folder: Path, starts: Sequence[identity.Start]) -> Config | None:
    """The configuration of the newest start, or of the newest checkpoint."""
    try:
        if starts:
            return from_dict(starts[-1]["config"])
        return from_dict(checkpoint.read_meta(folder)["config"])
    except (ValueError, TypeError, KeyError):
        return None


def names(paths: Sequence[str]) -> list[str]:
    """The shortest names of these folders that differ."""
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(set(parts)):
            return short
    return list(paths)


def hours(run: Run) -> list[float] | None:
    """The hours that the run has run at each of its rows; None: rows have no time.

    The time between the last row before a restart and the restart does not count.
    """
    if any("time" not in row for row in run.rows):
        return None
    starts = [_seconds(start["time"]) for start in run.starts]
    before = starts[0] if starts else run.rows[0]["time"]
    total, found = 0.0, []
    for row in run.rows:
        began = [start for start in starts if before < start <= row["time"]]
        total += max(row["time"] - max(began, default=before), 0.0)
        before = row["time"]
        found.append(total / 3600)
    return found


def _seconds(time: str) -> float:
    return datetime.datetime.fromisoformat(time).timestamp()


def events(run: Run) -> Iterator[Event]:
    """Starts, rollbacks and skipped steps, in the order of the rows."""
    for start in run.starts:
        yield Event(start["step"], "start", f"started at {start['time']}")
    skipped = 0.0
    for row in run.rows:
        if "rollbacks" in row:
            text = (
                f"went back to this step, rollback {row['rollbacks']:.0f}; steps "
                f"lost: {row.get('abandoned_steps', 0):.0f}"
            )
            yield Event(int(row["step"]), "rollback", text)
        new = row.get("skipped_steps", skipped)
        if new > skipped:
            text = f"bad steps left out since the last report: {new - skipped:.0f}"
            yield Event(int(row["step"]), "skipped", text)
        skipped = new
