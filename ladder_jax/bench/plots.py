"""Draws results of benchmarks: slots over time, latency curves, Pareto curves."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ladder_jax import files
from ladder_jax.bench.latency import History, Latencies

COLORS = 19  # requests take the colors one after another, and then again
IDLE, NOT_COMPILED = -1, -2


class Point(NamedTuple):
    """One load of one server, for `draw_pareto`."""

    load: str
    user_rate: float  # tokens/s that a user gets
    rate: float  # tokens/s of all users


def draw_occupancy(
    folder: str | Path, title: str, policy: str, history: History
) -> Path:
    """Draws which request holds each slot over time. Returns the PNG's path."""
    plt = _pyplot()
    slots = slot_colors(history)
    figure, ax = plt.subplots(
        figsize=(11, 1.2 + 0.22 * slots.shape[1]), constrained_layout=True
    )
    colors = plt.get_cmap("tab20").with_extremes(under="white", bad="0.85")
    ax.imshow(
        np.where(slots == NOT_COMPILED, np.nan, slots).T,
        aspect="auto",
        interpolation="nearest",
        cmap=colors,
        vmin=0,
        vmax=COLORS,
    )
    ax.set(
        xlabel="iteration",
        ylabel="slot",
        title=f"{title}, {policy}: a color a request; white: idle, grey: not compiled",
    )
    return _save(figure, folder, f"occupancy_{_stem(title)}_{policy}.png")


def slot_colors(history: History) -> np.ndarray:
    """The color of each slot in each iteration [iterations, slots].

    IDLE where the slot had no request, NOT_COMPILED where the decode state had fewer
    slots.
    """
    widest = max(chunk.requests.shape[1] for chunk in history)
    rows = np.concatenate(
        [
            np.pad(
                chunk.requests,
                [(0, 0), (0, widest - chunk.requests.shape[1])],
                constant_values=NOT_COMPILED,
            )
            for chunk in history
        ]
    )
    requests = rows[rows >= 0]
    first = requests.min() if requests.size else 0
    return np.where(rows < 0, rows, (rows - first) % COLORS)


def draw_latencies(
    folder: str | Path, title: str, latencies: Mapping[str, Latencies]
) -> Path:
    """Draws the latencies' distributions, a curve for each policy or server. Returns
    the PNG's path."""
    plt = _pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4), constrained_layout=True, sharey=True
    )
    for policy, of_policy in latencies.items():
        curves = of_policy.ttft, of_policy.e2e, of_policy.tpot
        for ax, values in zip(axes, curves):
            ax.plot(
                np.sort(values) * 1e3,
                (np.arange(len(values)) + 1) / len(values),
                label=policy,
                linewidth=2.5 if policy == "ours" else 1.2,
            )
    labels = "time to first token, ms", "end to end, ms", "time per output token, ms"
    for ax, label in zip(axes, labels):
        ax.set(xlabel=label, xscale="log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    return _save(figure, folder, f"latency_{_stem(title)}.png")


def draw_pareto(
    folder: str | Path, title: str, points: Mapping[str, Sequence[Point]]
) -> Path:
    """Draws what a user gets against what all users get, a curve for each server.

    Args:
      folder: of the picture.
      title: of the picture.
      points: {server: its loads}. Right and up is better.
    Returns the PNG's path.
    """
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for server, loads in points.items():
        loads = sorted(loads, key=lambda point: point.user_rate)
        xs, ys = [p.user_rate for p in loads], [p.rate for p in loads]
        (line,) = ax.plot(xs, ys, marker="o", label=server)
        for point in loads:
            ax.annotate(
                point.load,
                (point.user_rate, point.rate),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=line.get_color(),
            )
    ax.set(
        xlabel="tokens/s of a user (1 / median TPOT)",
        ylabel="tokens/s of all users",
        title=title,
    )
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return _save(figure, folder, f"pareto_{_stem(title)}.png")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _stem(title: str) -> str:
    """A title as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", title.replace("%", "_percent"))


def _save(figure: Any, folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        figure.savefig(part, dpi=110)
    _pyplot().close(figure)
    return path
