"""Draws timelines: what a device computes above what it sends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax import files
from ladder_jax.planner.scopes import place_of
from ladder_jax.planner.timeline import Timeline

BLOCKS = {"attention": "#4c78a8", "mlp": "#72b7b2", "attention+mlp": "#5f97ad"}
HIDDEN, EXPOSED, OTHER = "#59a14f", "#e15759", "#bab0ac"
# Each lane's bottom edge and height.
COMPUTE_LANE, SEND_LANE = (1.05, 0.8), (0.15, 0.8)
US = 1e6  # microseconds in a second


class Bar(NamedTuple):
    """A colored stretch of a lane. Times are seconds from the lane's start."""

    start: float
    end: float
    color: str


class Lanes(NamedTuple):
    """The two lanes of a timeline."""

    seconds: float  # their length
    compute: list[Bar]
    # A bar for every whole transfer, and bars for exposed time, drawn over the former.
    send: list[Bar]


def draw(path: str | Path, timelines: Sequence[tuple[str, Timeline]]) -> None:
    """Writes `figure(timelines)` to the PNG file `path`."""
    with files.replacing(path) as part:
        figure(timelines).savefig(part, dpi=130)


def figure(timelines: Sequence[tuple[str, Timeline]]) -> Any:
    """A matplotlib Figure: for every timeline, compute above communication.

    It shows two layers from the middle of the stack, and is as wide as the slowest
    timeline. Green: the device works while it sends (or would wait for prefetched
    weights in any case). Red: it waits for the transfer.

    Args:
      timelines: (title, timeline) of each pair of lanes.
    """
    from matplotlib.figure import Figure

    titled = [(title, lanes_of(timeline)) for title, timeline in timelines]
    longest = max(lanes.seconds for _, lanes in titled)
    picture = Figure(figsize=(12, 0.5 + 1.1 * len(titled)))
    axes = picture.subplots(len(titled), 1, sharex=True, squeeze=False)
    for ax, (title, lanes) in zip(axes[:, 0], titled):
        _draw_bars(ax, lanes.compute, COMPUTE_LANE)
        _draw_bars(ax, lanes.send, SEND_LANE)
        ax.set(
            ylim=(0, 2),
            xlim=(0, longest * US),
            yticks=[0.55, 1.45],
            yticklabels=["communicates", "computes"],
        )
        ax.set_title(f"{title}: {lanes.seconds * US:,.0f} us", loc="left", fontsize=10)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False, labelsize=8)
    axes[-1, 0].set_xlabel("microseconds, two layers from the middle of the stack")
    _draw_legend(picture)
    picture.tight_layout(rect=(0, 0, 1, 1 - 0.25 / picture.get_size_inches()[1]))
    return picture


def _draw_bars(ax: Any, bars: list[Bar], lane: tuple[float, float]) -> None:
    for bar in bars:
        stretch = (bar.start * US, (bar.end - bar.start) * US)
        ax.broken_barh([stretch], lane, color=bar.color)


def _draw_legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    names = {
        "attention": BLOCKS["attention"],
        "MLP": BLOCKS["mlp"],
        "sent while the device works": HIDDEN,
        "the device waits": EXPOSED,
    }
    handles = [Patch(color=color, label=name) for name, color in names.items()]
    figure.legend(
        handles=handles, ncols=4, fontsize=8, loc="upper right", frameon=False
    )


def lanes_of(timeline: Timeline) -> Lanes:
    """The lanes of two layers from the middle of a timeline's stack."""
    start, end = _middle(timeline)

    def bars(stretches: list[tuple[float, float, str]]) -> list[Bar]:
        """The parts of (start, end, color) stretches that lie in the two layers."""
        parts = [
            Bar(max(first, start) - start, min(last, end) - start, color)
            for first, last, color in stretches
        ]
        return [bar for bar in parts if bar.end > bar.start]

    compute = [
        (span.start, span.end, BLOCKS.get(place_of(span.scope).block, OTHER))
        for span in timeline.spans
    ]
    send = []
    for collective in timeline.collectives:
        send.append((collective.start, collective.end, HIDDEN))
        for wait_start, wait_end in timeline.waits:
            exposed_start = max(wait_start, collective.start)
            exposed_end = min(wait_end, collective.end)
            send.append((exposed_start, exposed_end, EXPOSED))
    return Lanes(end - start, bars(compute), bars(send))


def _middle(timeline: Timeline) -> tuple[float, float]:
    """(start, end) of two layers from the middle of the stack, or of the whole stack
    where it has three layers or fewer.

    XLA mixes the instructions of neighbouring layers. Here a layer starts with the
    longest instruction of its attention.
    """
    spans = [(span, place_of(span.scope)) for span in timeline.spans]
    layers = list(dict.fromkeys(place.layer for _, place in spans if place.layer))
    if len(layers) <= 3:
        inside = [span for span, place in spans if place.layer]
        return inside[0].start, max(span.end for span in inside)

    def start_of(layer: str) -> float:
        attention = [
            span
            for span, place in spans
            if place.layer == layer
            and place.block.startswith("attention")
            and span.name != "prefetch"
        ]
        return max(attention, key=lambda span: span.end - span.start).start

    middle = (len(layers) - 1) // 2
    return start_of(layers[middle]), start_of(layers[middle + 2])
