"""Line charts as SVG text. Colours are the page's CSS, so that both its modes work."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]

WIDTH, HEIGHT = 480, 260  # in the units of the picture, which the page scales
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 38
MOST_POINTS = 600  # of a line; more cannot be told apart
TICKS = 5


class Line(NamedTuple):
    """A line of one run."""

    run: int  # its number, which says the colour
    points: list[Point]  # in the order in which they are joined


class Mark(NamedTuple):
    """A vertical line where something happened."""

    x: float
    kind: str  # a CSS class: rollback or start


class Chart(NamedTuple):
    """A picture of lines over one x axis."""

    title: str
    x_label: str
    lines: list[Line]
    marks: Sequence[Mark] = ()
    log: bool = False  # the y axis; then every y must be greater than 0
    percent: bool = False


def draw(chart: Chart) -> str:
    """The chart as an SVG element; "" where there is nothing to draw."""
    points = [point for line in chart.lines for point in line.points]
    if not points:
        return ""
    xs, ys = zip(*points)
    x_low, x_high = min(0.0, *xs), max(xs)
    y_low, y_high = _range(min(ys), max(ys), chart.log)
    level = math.log10 if chart.log else float

    def place(point: Point) -> tuple[float, float]:
        x = (point[0] - x_low) / ((x_high - x_low) or 1)
        y = (level(point[1]) - level(y_low)) / (level(y_high) - level(y_low))
        across = LEFT + x * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _ticks(y_low, y_high, chart.log):
        _, y = place((x_low, tick))
        text = f"{tick:.3g}%" if chart.percent else number(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y + 4, text, "end"))
    for tick in _ticks(x_low, x_high, False):
        x, _ = place((tick, y_low))
        parts.append(_text(x, HEIGHT - BOTTOM + 16, number(tick), "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 4, chart.x_label, "middle"))
    for mark in chart.marks:
        x, _ = place((mark.x, y_low))
        parts.append(
            f'<path class="{mark.kind}" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
        )
    for line in chart.lines:
        parts.append(_path(line, [place(point) for point in _thin(line.points)]))
    label = html.escape(f"{chart.title} over {chart.x_label}")
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
        f"{body}\n</svg>"
    )


def _path(line: Line, places: Sequence[Point]) -> str:
    """A line, with dots where it has few points."""
    if not places:
        return ""
    color = f"run{line.run % 8}"
    text = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    drawn = f'<path class="line {color}" d="M{text}"/>'
    if len(places) <= 40:
        drawn += "".join(
            f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
            for x, y in places
        )
    return drawn


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _range(low: float, high: float, log: bool) -> tuple[float, float]:
    """The ends of the y axis: a little more than the values."""
    if log:
        return (low / 1.1, high * 1.1)
    margin = (high - low or abs(high) or 1) * 0.05
    return low - margin, high + margin


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from `low` to `high`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = -(-len(powers) // (TICKS + 1))
        digits = (1, 2, 5) if every == 1 and len(powers) <= 4 else (1,)
        ticks = [digit * 10.0**power for power in powers[::every] for digit in digits]
        return [tick for tick in ticks if low <= tick <= high]
    if high <= low:
        return [low]
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """1234567 -> 1.23M, 0.25 -> 0.25."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most about MOST_POINTS points: the lowest and the highest of each stretch."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = -(-2 * len(points) // MOST_POINTS)
    kept = []
    for begin in range(0, len(points), size):
        part = range(begin, min(begin + size, len(points)))
        ends = {min(part, key=lambda i: points[i][1])}
        ends |= {max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept
