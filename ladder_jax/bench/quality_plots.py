"""The plots of the quality study, and all its pages."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ladder_jax import files
from ladder_jax.bench.quality_results import (
    CURVES,
    PAGE,
    Compared,
    Run,
    compare,
    page,
    plot_name,
    settings,
)


def write_pages(folder: Path, runs: Sequence[Run]) -> None:
    """Writes the page, and the plots of every setting."""
    for number, group in enumerate(settings(runs), start=1):
        draw(folder / plot_name(number, group), group)
        if any(run.curve for run in group):
            draw_curves(folder / plot_name(number, group, CURVES), group)
    files.write_text(folder / PAGE, page(runs))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    with files.replacing(path) as part:
        figure.savefig(part, dpi=110)
    _pyplot().close(figure)


def draw(path: Path, group: Sequence[Run]) -> None:
    """Draws a dot for every run and a bar for the mean, a row a schedule."""
    rows = compare(group)
    figure, ax = _pyplot().subplots(
        figsize=(8, 1.2 + 0.4 * len(rows)), constrained_layout=True
    )
    for height, row in enumerate(reversed(rows)):
        losses = [run.held_out_loss for run in row.runs]
        ax.plot(losses, [height] * len(losses), "o", alpha=0.6, color="tab:blue")
        ax.plot([statistics.fmean(losses)], [height], "|", ms=18, color="black")
    ax.set_yticks(range(len(rows)), [row.title for row in reversed(rows)])
    ax.set_xlabel("held-out loss, nats a token: a dot a seed, a bar the mean")
    ax.set_title(f"{group[0].size}, {group[0].tokens:,} tokens")
    ax.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_curves(path: Path, group: Sequence[Run]) -> None:
    """Draws training losses over tokens, and their differences from standard's.

    The runs of one seed train on the same batches in the same order, so a difference at
    one place is of the same text.
    """
    figure, (left, right) = _pyplot().subplots(
        1, 2, figsize=(12, 4.6), constrained_layout=True
    )
    for number, row in enumerate(compare(group)):
        style = dict(color=f"C{number % 10}", ls="-" if number < 10 else "--", lw=1.2)
        curves = [run.losses for run in row.runs if run.curve]
        if not curves:
            continue
        tokens = row.runs[0].tokens * np.arange(1, len(curves[0]) + 1) / len(curves[0])
        left.plot(tokens / 1e6, np.mean(curves, axis=0), label=row.title, **style)
        differences = _over_standard(group, row)
        if len(differences):
            right.plot(tokens / 1e6, np.mean(differences, axis=0), **style)
            if len(differences) > 1:
                low, high = np.min(differences, axis=0), np.max(differences, axis=0)
                right.fill_between(
                    tokens / 1e6, low, high, color=style["color"], alpha=0.12, lw=0
                )
    left.set_ylabel("training loss, nats a token; mean of the seeds")
    right.set_ylabel("over standard, same seed and text; band: all seeds")
    right.axhline(0, color="black", lw=0.8)
    for ax in (left, right):
        ax.set_xlabel("millions of tokens")
        ax.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"{group[0].size}, {group[0].tokens:,} tokens")
    _save(figure, path)


def _over_standard(group: Sequence[Run], row: Compared) -> list[np.ndarray]:
    """The curves of a schedule less those of standard with the same seed."""
    standard = {run.seed: run for run in group if run.schedule == "standard"}
    return [
        np.subtract(run.losses, standard[run.seed].losses)
        for run in row.runs
        if run.schedule != "standard"
        and run.curve
        and run.seed in standard
        and standard[run.seed].curve
    ]
