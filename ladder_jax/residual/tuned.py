"""The table of decode steps, planned with each reduction, that "auto" reads.

A row is a step that XLA's compiler of a chip has compiled with one reduction, and the
time that the planner models for its schedule. No row is measured on a chip.
`ladder-jax plan RECIPE --target T --tune` adds rows (planner/tune.py).
"""

import csv
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError, Model
from ladder_jax.residual.reductions import REDUCTIONS, Like

PATH = Path(__file__).with_name("tuned.csv")

# Bytes from which on XLA:TPU runs its own all-reduce beside compute, on all chips.
ASYNCHRONOUS = 64 << 10

Choices = Mapping[int, str]  # rows of a message -> the name of its reduction


@dataclass(frozen=True)
class Trial:
    """A decode step with one reduction. Times are modelled, in microseconds."""

    # The model on its machine: these say what a block computes.
    chip: str  # a name in chips.CHIPS
    tensor: int
    schedule: str
    dim: int
    ffn_dim: int
    layout: str  # of the cache: "rows" or "pages"
    # The program.
    batch: int  # requests of a tensor-parallel group
    context: int  # tokens of the cache, of each request
    rows: int  # of a message [rows, 1, dim], bfloat16; a lone request may have two
    reduction: str
    # What was found.
    step_us: float  # 0: XLA does not compile it
    exposed_us: float
    jaxlib: str

    @property
    def key(self) -> tuple[object, ...]:
        """What no two rows of the table share."""
        return (*self.model, *self.step, self.reduction)

    @property
    def model(self) -> tuple[object, ...]:
        return dataclasses.astuple(self)[:6]

    @property
    def step(self) -> tuple[int, int]:
        return self.batch, self.context


def choices_for(
    chip: str | None, tensor: int, model_config: Model, layout: str
) -> Choices:
    """The tuned reductions of a model's decode steps; empty where none were tuned.

    layout: of the cache, "rows" or "pages".
    Raises ConfigError if the table is damaged.
    """
    if model_config.dtype != "bfloat16":
        return {}
    shape = model_config.residual, model_config.dim, model_config.ffn_dim
    model = (chip, tensor, *shape, layout)
    return _choices(PATH).get(model, {})


def choice_of(choices: Choices, message: Like, dim: int) -> str | None:
    """The choice for a message [B, 1, dim] of a decode step; None: the table has none.

    Between two numbers of rows in the table it is the choice of both. Where they differ
    it is psum, if XLA runs that beside compute. Beyond the table there is none: what is
    right for some rows may be far slower than psum for twice as many.
    """
    if message.ndim != 3 or message.shape[1:] != (1, dim):
        return None
    rows = message.shape[0]
    fewer = max((each for each in choices if each <= rows), default=None)
    more = min((each for each in choices if each >= rows), default=None)
    if fewer is None or more is None:
        return None
    if choices[fewer] == choices[more]:
        return choices[fewer]
    is_asynchronous = message.size * message.dtype.itemsize >= ASYNCHRONOUS
    return "psum" if is_asynchronous else None


def fastest(trials: Sequence[Trial]) -> str | None:
    """The reduction for the messages of these trials; None where psum was not compared.

    Of the reductions that are slower than psum in no step, the one whose steps are
    shortest (by the geometric mean). The choice does not follow the context: an engine
    makes it once for all its programs.
    """
    psum = {one.step: one.step_us for one in trials if one.reduction == "psum"}
    ratios: dict[str, list[float]] = {}
    for one in trials:
        if psum.get(one.step):
            ratio = one.step_us / psum[one.step] if one.step_us else math.inf
            ratios.setdefault(one.reduction, []).append(ratio)
    if len(ratios) < 2:  # nothing, or a job was cut off after psum
        return None
    safe = {
        name: statistics.geometric_mean(values)
        for name, values in ratios.items()
        if max(values) <= 1
    }
    return min(safe, key=lambda name: safe[name])


@functools.cache
def _choices(path: Path) -> dict[tuple[object, ...], Choices]:
    """The table's choices, by Trial.model."""
    trials: dict[tuple[object, ...], dict[int, list[Trial]]] = {}
    for one in read(path):
        trials.setdefault(one.model, {}).setdefault(one.rows, []).append(one)
    return {
        model: {
            rows: name
            for rows, group in by_rows.items()
            if (name := fastest(group)) is not None
        }
        for model, by_rows in trials.items()
    }


# ---------------------------------------------------------------- the file


def read(path: Path) -> list[Trial]:
    """The rows of the table; none where there is no file.

    Raises ConfigError, in one line, if the file is damaged or is another table.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(_parse(csv.DictReader(file)))
    except (OSError, ValueError, csv.Error) as error:
        problem = str(error).partition("\n")[0]
        raise ConfigError(
            f"the table of reductions {path} cannot be used ({problem}): install "
            "ladder_jax again, or remove the file and write it by ladder-jax plan "
            "--tune"
        ) from None


def _parse(lines: "csv.DictReader[str]") -> Iterator[Trial]:
    kinds: dict[str, Any] = {
        field.name: field.type for field in dataclasses.fields(Trial)
    }
    if lines.fieldnames != list(kinds):
        raise ValueError(f"its columns are not {','.join(kinds)}")
    keys = set()
    for line in lines:
        place = f"line {lines.line_num}"
        if None in line or None in line.values():
            raise ValueError(f"{place} has not {len(kinds)} values")
        try:
            row = Trial(**{name: kinds[name](text) for name, text in line.items()})
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if row.reduction not in REDUCTIONS:
            raise ValueError(
                f"{place}: reduction={row.reduction!r} is none of "
                + ", ".join(REDUCTIONS)
            )
        if row.rows < 1 or not 0 <= row.step_us < math.inf:
            raise ValueError(f"{place}: rows is below 1, or step_us is no time")
        if row.key in keys:
            raise ValueError(f"{place} has the same program as another")
        keys.add(row.key)
        yield row
