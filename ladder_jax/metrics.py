"""What a run leaves to look at: metrics.jsonl, TensorBoard events, a plot of the loss."""

import contextlib
import json
import os
from pathlib import Path

from ladder_jax.config import ConfigError


def require_tensorboard():
    """The writer of TensorBoard events. Raises ConfigError where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard=True needs tensorboardX: pip install 'ladder_jax[tensorboard]'"
        ) from None
    return SummaryWriter


class Metrics(contextlib.AbstractContextManager):
    """A run's metrics.jsonl, a row a report: {"step": 20, "loss": ...} or {"step": 20, "held_out_loss": ...}.

    Rows after step `resumed_at`, of a run that was interrupted, are dropped: they come again. With `tensorboard`, the
    same numbers go to events in tensorboard/. Raises OSError, here and in `write`, when there is no room.
    """

    def __init__(self, folder, tensorboard=False, resumed_at=0):
        self.path = Path(folder) / "metrics.jsonl"
        temporary = self.path.with_suffix(".tmp")
        with self._naming():
            rows = [row for row in read(self.path) if row["step"] <= resumed_at]
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(
                temporary, self.path
            )  # a kill leaves the old file or the new one
            self._file = self.path.open("a", buffering=1)
        self._board = (
            require_tensorboard()(
                str(Path(folder) / "tensorboard"), purge_step=resumed_at + 1
            )
            if tensorboard
            else None
        )

    def write(self, step, **values):
        """One row: `values` at `step`. Out of this process at once, so that a killed run keeps it."""
        with self._naming():
            self._file.write(json.dumps(dict(step=step, **values)) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _naming(self):
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written: {error.strerror}"
            ) from error

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # of what `write` has told
            self._file.close()
        if self._board:
            self._board.close()


def read(path):
    """The rows of a metrics.jsonl, oldest first; a last line cut by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot(folder, title):
    """Draws loss.png from the run's metrics and returns its path, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read(Path(folder) / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("loss", "-"), ("held_out_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(
                *zip(*points),
                style,
                label=name.replace("_", " ").replace("held out", "held-out"),
                markersize=4,
            )
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    path = Path(folder) / "loss.png"
    figure.savefig(path, dpi=120)
    return path
