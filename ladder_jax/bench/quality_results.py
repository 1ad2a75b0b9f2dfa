"""The finished runs of the quality study: rows of a CSV file, and a page of tables."""

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ladder_jax import files
from ladder_jax.config import ConfigError
from ladder_jax.planner import tables

CSV, PAGE = "runs.csv", "results.md"
POINTS = 50  # of a curve


@dataclass(frozen=True)
class Run:
    """One trained model: a row of the file."""

    # What was trained. No two rows have the same `key`.
    size: str
    schedule: str
    layers: int
    shards: int  # of the tensor axis; desync and dtp are another model for each number
    seed: int
    tokens: int
    batch: int
    length: int
    learning_rate: float
    dtype: str
    tokenizer: str
    corpus: str  # the digest of its documents
    # The result.
    parameters: int = 0
    steps: int = 0
    epochs: float = 0.0
    train_loss: float = 0.0  # mean of the last tenth of the steps, nats a token
    held_out_loss: float = 0.0  # over all held-out documents, nats a token
    bits_per_byte: float = 0.0
    seconds: float = 0.0
    device: str = ""
    jax: str = ""
    date: str = ""
    curve: str = ""  # training losses: means of the run's POINTS parts, in order

    @property
    def losses(self) -> list[float]:
        """The training losses along the run; empty of a run that has none."""
        return [float(word) for word in self.curve.split()]

    @property
    def key(self) -> tuple[Any, ...]:
        """What was trained: the fields from `size` to `corpus`."""
        names = [field.name for field in dataclasses.fields(self)]
        return dataclasses.astuple(self)[: names.index("corpus") + 1]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What all runs that may be compared have in common."""
        return (self.size, self.shards, *self.key[5:])


def read(path: Path) -> list[Run]:
    """The rows of a file; none if there is no file. Raises ConfigError for others."""
    if not path.exists():
        return []
    types: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Run)}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            Run(**{name: types[name](text) for name, text in row.items()})
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a file of the quality study: {error}"
        ) from None


def curve(losses: Sequence[float]) -> str:
    """The losses of all steps as the means of at most POINTS equal parts."""
    parts = np.array_split(np.asarray(losses), min(POINTS, len(losses)))
    return " ".join(f"{part.mean():.4f}" for part in parts)


def write(path: Path, runs: Iterable[Run]) -> None:
    """Replaces the file at once, so that it is whole whenever the study is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part, part.open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(Run)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, runs))


# ---------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Compared:
    """The runs of one schedule beside those of the standard model, seed by seed."""

    title: str
    runs: list[Run]
    differences: list[float]  # of the held-out loss from standard's of the same seed

    @property
    def loss(self) -> str:
        return spread([run.held_out_loss for run in self.runs])

    @property
    def difference(self) -> str:
        return spread(self.differences, "+.4f") if self.differences else ""


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """The mean, and the standard deviation of several values."""
    mean = format(statistics.fmean(values), form)
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.4f}"


def compare(runs: Sequence[Run]) -> list[Compared]:
    """The runs of one setting by model, in the order of the file."""
    by_model: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        by_model.setdefault((run.schedule, run.layers), []).append(run)
    depths = [run.layers for run in runs if run.schedule == "standard"]
    standard = {run.seed: run for run in runs if run.schedule == "standard"}
    rows = []
    for (schedule, layers), models in by_model.items():
        title = schedule
        if depths and layers != depths[0]:
            title += f", {layers} layers"
        differences = [
            run.held_out_loss - standard[run.seed].held_out_loss
            for run in models
            if run.seed in standard and schedule != "standard"
        ]
        rows.append(Compared(title, models, differences))
    return rows


COLUMNS = [
    tables.Column("schedule", lambda row: row.title, left=True),
    tables.Column("layers", lambda row: str(row.runs[0].layers)),
    tables.Column("parameters", lambda row: f"{row.runs[0].parameters:,}"),
    tables.Column("seeds", lambda row: str(len(row.runs))),
    tables.Column("held-out loss", lambda row: row.loss),
    tables.Column("over standard, same seed", lambda row: row.difference),
    tables.Column(
        "bits per byte",
        lambda row: format(statistics.fmean(r.bits_per_byte for r in row.runs), ".4f"),
    ),
    tables.Column(
        "training loss",
        lambda row: format(statistics.fmean(r.train_loss for r in row.runs), ".4f"),
    ),
]


def settings(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs in groups that may be compared."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    return list(groups.values())


def page(runs: Sequence[Run]) -> str:
    """The Markdown page of all runs."""
    parts = [
        "# Quality of the residual schedules: all runs",
        "Generated from [runs.csv](runs.csv) by `python -m ladder_jax.bench.quality`;"
        "\n[quality.md](../quality.md) says what it shows. Mean ± standard deviation "
        "over\nseeds; losses in nats a token.",
    ]
    for number, group in enumerate(settings(runs), start=1):
        parts += [heading(group), tables.markdown_table(COLUMNS, compare(group))]
        parts.append(f"![Held-out losses]({plot_name(number, group)})")
        if any(run.curve for run in group):
            parts.append(f"![Training losses]({plot_name(number, group, CURVES)})")
    return "\n\n".join(parts) + "\n"


CURVES = "_curves"


def plot_name(number: int, group: Sequence[Run], kind: str = "") -> str:
    """The plot's file of the setting with this number, from 1."""
    return f"{group[0].size}_{number}{kind}.png"


def heading(group: Sequence[Run]) -> str:
    """What the runs of a setting have in common, as a heading and a line of text."""
    first = group[0]
    devices = ", ".join(sorted({run.device for run in group}))
    return (
        f"## {first.size}, {first.tokens:,} tokens\n\n"
        f"{first.steps:,} steps of {first.batch} x {first.length} tokens "
        f"({first.epochs:.2f} epochs), {first.dtype}, tokenizer {first.tokenizer}, "
        f"peak learning rate {first.learning_rate:g}; {first.shards} tensor shards\n"
        f"for desync and dtp; on {devices}."
    )
