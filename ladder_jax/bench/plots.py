"""Draws the results of `ladder-jax bench decode`: slots over time, latency curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ladder_jax.bench.latency import History, latencies_of
from ladder_jax.serve.request import Request

COLORS = 19  # requests take the colors one after another, and then again
IDLE, NOT_COMPILED = -1, -2


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
    widest = max(chunk.shape[1] for _, chunk in history)
    rows = np.concatenate(
        [
            np.pad(
                chunk,
                [(0, 0), (0, widest - chunk.shape[1])],
                constant_values=NOT_COMPILED,
            )
            for _, chunk in history
        ]
    )
    requests = rows[rows >= 0]
    first = requests.min() if requests.size else 0
    return np.where(rows < 0, rows, (rows - first) % COLORS)


def draw_latencies(
    folder: str | Path, title: str, requests: Mapping[str, Sequence[Request]]
) -> Path:
    """Draws the latencies' distributions, a curve a policy. Returns the PNG's path."""
    plt = _pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4), constrained_layout=True, sharey=True
    )
    for policy, served in requests.items():
        latencies = latencies_of(served)
        curves = latencies.ttft, latencies.e2e, latencies.tpot
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


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _stem(title: str) -> str:
    return title.replace(" ", "_").replace(",", "")


def _save(figure: Any, folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path
