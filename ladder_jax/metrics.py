"""What a run leaves to look at: metrics.jsonl, TensorBoard events, a line a report, a plot of the loss."""
import json
import os
from pathlib import Path

from ladder_jax.config import ConfigError


class Metrics:
    """Writes a run's metrics; `step` rows after `resumed_at` of an earlier, interrupted run are dropped."""

    def __init__(self, folder, tensorboard=False, resumed_at=0):
        self.path = Path(folder) / "metrics.jsonl"
        rows = [row for row in read(self.path) if row["step"] <= resumed_at]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, self.path)        # a kill leaves the old file or the new one
        self._file = self.path.open("a")
        self._board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ConfigError("train.tensorboard=True needs tensorboardX: pip install 'ladder_jax[tensorboard]'"
                                  ) from None
            self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step, **values):
        """One row: `values` at `step`. On disk at once, so that a killed run keeps it."""
        self._file.write(json.dumps(dict(step=step, **values)) + "\n")
        self._file.flush()
        for name, value in values.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def close(self):
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
            axes.plot(*zip(*points), style, label=name.replace("_", " ").replace("held out", "held-out"), markersize=4)
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(folder) / "loss.png"
    figure.savefig(path, dpi=120)
    return path
