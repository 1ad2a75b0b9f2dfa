"""Plans every combination of some values in one process: `ladder-jax plan --sweep`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax import files
from ladder_jax.config import ConfigError
from ladder_jax.planner import tables

# What may be swept, and how a value is read.
FIELDS: dict[str, Any] = dict(
    batch=int, context=int, tensor=int, schedule=str, reduction=str, target=str
)


class Cell(NamedTuple):
    """One combination, and its plan's report or why there is none."""

    values: dict[str, Any]
    report: dict[str, Any] | None
    error: str = ""


def combinations(words: Sequence[str]) -> list[dict[str, Any]]:
    """The combinations of words such as batch=1,4,16, in order.

    Raises ConfigError for a word that is not so.
    """
    swept: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in FIELDS or not equals or name in swept:
            raise ConfigError(
                f"sweep={word!r} is not accepted: it must be one of "
                f"{', '.join(FIELDS)}, each once, with values, such as batch=1,4,16"
            )
        # A schedule's own commas are those of delays:0,1: it is swept alone.
        values = text.split(",") if not text.startswith("delays:") else [text]
        try:
            swept[name] = [FIELDS[name](value) for value in values]
        except ValueError:
            raise ConfigError(
                f"sweep={word!r} is not accepted: its values must be whole numbers"
            ) from None
    return [
        dict(zip(swept, values, strict=True))
        for values in itertools.product(*swept.values())
    ]


def table(cells: Sequence[Cell]) -> str:
    """The cells as text: a line each; * marks those that none beats in both speeds."""
    best = frontier(cells)
    names = list(cells[0].values)

    def value(name: str) -> Any:
        return lambda cell: str(cell.values[name])

    def used(key: str, form: str) -> Any:
        return lambda cell: format(cell.report["use"][key], form) if cell.report else ""

    def total(key: str) -> Any:
        return lambda cell: (
            f"{cell.report['totals'][key]:,.0f}" if cell.report else cell.error
        )

    def fits(cell: Cell) -> str:
        return "" if not cell.report else "yes" if _fits(cell) else "no"

    columns = [
        *(tables.Column(name, value(name)) for name in names),
        tables.Column("step us", total("step_us")),
        tables.Column(
            "exposed us", lambda cell: total("exposed_us")(cell) if cell.report else ""
        ),
        tables.Column("tokens/s", used("tokens_per_s", ",.0f")),
        tables.Column("a device", used("tokens_per_s_device", ",.1f")),
        tables.Column("a request", used("tokens_per_s_request", ",.1f")),
        tables.Column("MFU", used("mfu", ".1%")),
        tables.Column("fits", fits),
        tables.Column("largest batch", used("largest_batch", ",")),
        tables.Column("", lambda cell: "*" if cell in best else ""),
    ]
    if any(cell.report and "price" in cell.report["use"] for cell in cells):
        cost = tables.Column("a million tokens", used("cost_per_million", ",.2f"))
        columns.insert(-1, cost)
    return tables.text_table(columns, cells)


def frontier(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that fit and that no other one which fits beats in tokens/s of a
    request and of a device, from the fastest request on."""
    fitting = [cell for cell in cells if _fits(cell)]
    fitting.sort(key=lambda cell: [-speed for speed in _speeds(cell)])
    best: list[Cell] = []
    for cell in fitting:
        if not best or _speeds(cell)[1] > _speeds(best[-1])[1]:
            best.append(cell)
    return best


def _fits(cell: Cell) -> bool:
    return cell.report is not None and bool(cell.report["memory"]["fits"])


def _speeds(cell: Cell) -> tuple[float, float]:
    """(tokens/s of a request, tokens/s of a device)."""
    assert cell.report is not None
    use = cell.report["use"]
    return use["tokens_per_s_request"], use["tokens_per_s_device"]


def draw(path: str | Path, cells: Sequence[Cell]) -> None:
    """Writes a PNG file: tokens/s of a request against tokens/s of a device. A line
    joins the cells of `frontier`; hollow ones do not fit."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 5))
    ax = picture.subplots()
    for cell in cells:
        if cell.report is None:
            continue
        x, y = _speeds(cell)
        filled = "#4c78a8" if _fits(cell) else "none"
        ax.plot(x, y, "o", color="#4c78a8", markerfacecolor=filled)
        label = " ".join(f"{name} {value}" for name, value in cell.values.items())
        ax.annotate(
            label, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points"
        )
    best = [_speeds(cell) for cell in frontier(cells)]
    ax.plot([x for x, _ in best], [y for _, y in best], color="#e15759", zorder=0)
    ax.set(
        xlabel="tokens/s of a request (modelled)",
        ylabel="tokens/s of a device (modelled)",
        xscale="log",
        yscale="log",
    )
    ax.spines[["top", "right"]].set_visible(False)
    picture.tight_layout()
    with files.replacing(path) as part:
        picture.savefig(part, dpi=130)
