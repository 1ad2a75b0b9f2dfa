"""A run's numbers: metrics.jsonl, TensorBoard events, a plot of the loss."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ladder_jax import files
from ladder_jax.config import ConfigError

log = logging.getLogger(__name__)

Row = dict[str, Any]  # {"step": 20, "loss": ...} or {"step": 20, "held_out_loss": ...}


def require_tensorboard() -> type:
    """The writer of TensorBoard events; ConfigError where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard=True needs tensorboardX: "
            "pip install 'ladder_jax[tensorboard]'"
        ) from None
    return SummaryWriter


class Metrics(contextlib.AbstractContextManager["Metrics"]):
    """Writes a run's metrics.jsonl, one row for each report.

    A resumed run removes the rows after its checkpoint, because it repeats these steps.
    If a new run finds rows of a run whose checkpoints were removed, it renames the file
    to metrics.1.jsonl and logs a warning.

    Args:
      folder: the run's folder.
      tensorboard: whether to write the same numbers as TensorBoard events too, in
        tensorboard/.
      resumed_at: the step of the checkpoint that the run resumes from; 0: a new run.
      rollbacks: of the run before that checkpoint.

    Raises ConfigError where the file has lines that are not rows. Raises OSError, here
    and in `write`, where the file cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        tensorboard: bool = False,
        resumed_at: int = 0,
        rollbacks: int = 0,
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._tensorboard = tensorboard
        with self._named_errors():
            if resumed_at:
                self._drop_after(resumed_at, rollbacks)
            else:
                self._move_aside()
        self._open(resumed_at)

    def _open(self, step: int) -> None:
        """Opens the file, and TensorBoard's without its events after `step`."""
        with self._named_errors():
            self._file = self.path.open("a", buffering=1)
        self._board: Any = None
        if self._tensorboard:
            self._board = require_tensorboard()(
                str(self.path.parent / "tensorboard"), purge_step=step + 1
            )

    def go_back(self, step: int, rollbacks: int, **values: float) -> None:
        """Removes the rows after `step`, and appends one about the rollback.

        rollbacks: how many there were, with this one.
        """
        self.__exit__()
        with self._named_errors():
            self._drop_after(step, rollbacks - 1)
        self._open(step)
        self.write(step, rollbacks=rollbacks, **values)

    def _drop_after(self, step: int, rollbacks: int) -> None:
        """Removes the rows after `step`, and those of rollbacks after `rollbacks`.

        A kill leaves the old file or the new one.
        """
        rows = [
            row
            for row in read(self.path)
            if row["step"] <= step and row.get("rollbacks", 0) <= rollbacks
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_text(self.path, text)

    def _move_aside(self) -> None:
        """Renames the file, if it has rows, to the first free metrics.N.jsonl."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        number = 1
        while (new_path := self.path.with_suffix(f".{number}.jsonl")).exists():
            number += 1
        self.path.rename(new_path)
        log.warning(
            "%s is of an earlier run, whose checkpoints are gone: it is now %s",
            self.path,
            new_path.name,
        )

    def write(self, step: int, **values: float) -> None:
        """Appends the row of `step`, which a later kill of the run does not lose."""
        with self._named_errors():
            self._file.write(json.dumps(dict(step=step, **values)) + "\n")
        if self._board:
            for name in values.keys() - {"time"}:  # an event has a time of its own
                self._board.add_scalar(name, values[name], step)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Adds the file's name to the message of an OSError."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written: {error.strerror}"
            ) from error

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `write` has raised it already
            self._file.close()
        if self._board:
            self._board.close()


def read(path: str | Path) -> list[Row]:
    """The rows of a metrics.jsonl, oldest first; no rows if there is no file.

    It skips a last line that is incomplete because the run was killed. Raises
    ConfigError where any other line is not a row.
    """
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ConfigError(
                f"{path}, line {number}, is not a row of metrics: it must be an object "
                'with a whole number "step". Repair or remove the line, or move the '
                "file away"
            )
        rows.append(row)
    return rows


def plot(folder: str | Path, title: str) -> Path | None:
    """Draws loss.png from the run's metrics and returns its path.

    None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    rows = read(Path(folder) / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("loss", "-"), ("held_out_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            label = name.replace("_", " ").replace("held out", "held-out")
            axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title=title)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    path = Path(folder) / "loss.png"
    with files.replacing(path) as part:
        figure.savefig(part, dpi=120)
    return path
