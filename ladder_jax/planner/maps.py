"""The grid as pictures and a page: what is hidden in each cell, and what is not."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax import files
from ladder_jax.planner import grid, tables
from ladder_jax.planner.grid import Row

# Of a cell that is not planned; without memory for it; that XLA refuses.
BLANK, NO_ROOM, NO_PLAN = "#f4f4f4", "#d0d0d0", "#7b5ea7"
# A picture needs so many rows.
LEAST = 20
WORKLOADS = ("decode", "prefill", "train")


class Picture(NamedTuple):
    """A PNG file: a recipe's cells of one workload."""

    recipe: str
    workload: str
    rows: list[Row]

    @property
    def name(self) -> str:
        return f"grid_{self.recipe}_{self.workload}.png"


def pictures(rows: Sequence[Row]) -> list[Picture]:
    """The pictures that some rows give."""
    return [
        Picture(recipe, workload, chosen)
        for recipe, workload in itertools.product(grid.RECIPES, WORKLOADS)
        if len(chosen := _newest(rows, recipe, workload)) >= LEAST
    ]


def _newest(rows: Sequence[Row], recipe: str, workload: str) -> list[Row]:
    """A recipe's rows of "auto", of each cell the one of the newest jaxlib."""
    version = lambda row: [int(part) for part in row.jaxlib.split(".")]
    wanted = [
        row
        for row in rows
        if (row.recipe, row.workload, row.mesh_reduction) == (recipe, workload, "auto")
    ]
    return list({row.cell: row for row in sorted(wanted, key=version)}.values())


# ---------------------------------------------------------------- pictures


def draw(folder: str | Path, rows: Sequence[Row]) -> None:
    """Writes the pictures of some rows."""
    for picture in pictures(rows):
        with files.replacing(Path(folder) / picture.name) as part:
            figure(picture).savefig(part, dpi=100)


def figure(picture: Picture) -> Any:
    """A matplotlib Figure: a heat map for each target and mesh.

    Green: all of what can be hidden is hidden. From yellow to red: half and nothing. A
    frame is around cells below the bar of docs/overlap.md.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    axes = grid.AXES[picture.workload]
    height = 0.9 + 2.0 * len(axes) * (0.7 if picture.workload == "train" else 1.0)
    shown = Figure(figsize=(14, height), layout="constrained")
    panels = shown.subplots(len(axes), len(grid.TARGETS), squeeze=False)
    by_cell = {row.cell: row for row in picture.rows}
    for panel, (mesh, target) in zip(
        panels.flat, itertools.product(axes, grid.TARGETS), strict=True
    ):
        _draw_panel(panel, by_cell, picture, target, mesh, colormaps["RdYlGn"])
    for panel, mesh in zip(panels[:, 0], axes):
        panel.set_ylabel(f"{_mesh_text(mesh)}\nrows", fontsize=8)
    for panel, target in zip(panels[0], grid.TARGETS):
        panel.set_title(target, fontsize=9)
    label = "context" if picture.workload == "decode" else "tokens of a row"
    for panel in panels[-1]:
        panel.set_xlabel(label, fontsize=8)
    shown.suptitle(
        f"{picture.recipe}, {picture.workload}: percent of the hideable that is hidden "
        "(grey: no memory for it; violet: no plan; white: not planned)",
        fontsize=10,
    )
    return shown


def _mesh_text(mesh: tuple[int, int, int]) -> str:
    """The axes of a mesh that divide something, such as "tensor 4, fsdp 2"."""
    data, fsdp, tensor = mesh
    parts = [f"tensor {tensor}"]
    parts += [f"fsdp {fsdp}"] if fsdp > 1 else []
    parts += [f"data {data}"] if data > 1 else []
    return ", ".join(parts)


def _draw_panel(
    panel: Any,
    by_cell: dict[grid.Cell, Row],
    picture: Picture,
    target: str,
    mesh: tuple[int, int, int],
    colors: Any,
) -> None:
    """Draws the heat map of one target and mesh."""
    from matplotlib.patches import Rectangle

    batches, contexts = grid.sides(picture.workload)
    for (y, rows), (x, context) in itertools.product(
        enumerate(batches), enumerate(contexts)
    ):
        batch = rows * mesh[0] * mesh[1]
        head = picture.recipe, target, picture.workload, batch, context
        row = by_cell.get(grid.Cell(*head, *mesh))
        if row is None:
            color = BLANK
        elif row.verdict in ("no room", "no plan"):
            color = NO_ROOM if row.verdict == "no room" else NO_PLAN
        else:
            color = colors(row.share)
        panel.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white"))
        if row is not None and row.verdict == "exposed":
            frame = Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, fill=False, lw=1.2)
            panel.add_patch(frame)
            percent = f"{100 * row.share:.0f}"
            panel.text(x + 0.5, y + 0.5, percent, ha="center", va="center", fontsize=6)
    panel.set(xlim=(0, len(contexts)), ylim=(0, len(batches)))
    panel.set_xticks([x + 0.5 for x in range(len(contexts))], contexts)
    panel.set_yticks([y + 0.5 for y in range(len(batches))], batches)
    panel.tick_params(labelsize=6, length=0)
    panel.tick_params(axis="x", rotation=90)


# ---------------------------------------------------------------- the page


def page(rows: Sequence[Row]) -> str:
    """The text of docs/overlap/grid.md."""
    auto = [row for row in rows if row.mesh_reduction == "auto"]
    counts = tables.markdown_table(_count_columns(), _groups(auto))
    exposed = [row for row in auto if row.verdict == "exposed"]
    refused = [row for row in auto if row.verdict == "no plan"]
    shown = [f"![{one.recipe}, {one.workload}]({one.name})" for one in pictures(rows)]
    return "\n".join(
        [
            "# The grid",
            "",
            f"{len(auto)} cells of [grid.py](../../ladder_jax/planner/grid.py) are "
            f"planned, of {len(grid.cells())} for each jaxlib. Generated from "
            f"[{grid.CSV}]({grid.CSV}). To plan more of them, the rest of a job that "
            "was cut off first:",
            "",
            "```sh",
            "python -m ladder_jax.planner.survey grid --jobs 2 --minutes 60",
            "python -m ladder_jax.planner.survey tables",
            "```",
            "",
            counts,
            "",
            *itertools.chain.from_iterable((line, "") for line in shown),
            "## Cells that do not hide what can be hidden",
            "",
            tables.markdown_table(EXPOSED, exposed),
            "",
            "## Cells without a plan",
            "",
            tables.markdown_table(REFUSED, refused),
            "",
        ]
    )


class _Group(NamedTuple):
    """The rows of one recipe, workload, target and jaxlib."""

    name: str
    rows: list[Row]

    def count(self, verdict: str) -> int:
        return Counter(row.verdict for row in self.rows)[verdict]

    @property
    def least(self) -> str:
        """The smallest share of all planned rows."""
        shares = [
            row.share for row in self.rows if row.verdict in ("hidden", "exposed")
        ]
        return f"{min(shares):.0%}" if shares else "-"


def _groups(rows: Sequence[Row]) -> list[_Group]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name = f"{row.recipe}, {row.workload}, {row.target}, jaxlib {row.jaxlib}"
        groups.setdefault(name, []).append(row)
    return [_Group(name, of) for name, of in groups.items()]


def _count_columns() -> list[tables.Column]:
    def count(verdict: str) -> tables.Column:
        return tables.Column(verdict, lambda group: str(group.count(verdict) or ""))

    return [
        tables.Column("", lambda group: group.name, left=True),
        *map(count, grid.VERDICTS),
        tables.Column("least share", lambda group: group.least),
    ]


def line(row: Row) -> str:
    """A row as text."""
    head = f"{row.recipe} {row.target} {row.workload} {shape(row)}"
    if row.verdict in ("no room", "no plan"):
        return f"{head}: {row.verdict}: {row.reason}"
    return (
        f"{head}, {row.reduction}: {row.share:.1%} {row.verdict}, step "
        f"{row.step_us:,.0f} us {row.reason}"
    ).strip()


def shape(row: Row) -> str:
    """Rows of all devices, context and mesh, such as "16x2048, tensor 8"."""
    mesh = _mesh_text((row.data, row.fsdp, row.tensor))
    return f"{row.batch}x{row.context}, {mesh}"


WHERE = [
    tables.Column("", lambda row: f"{row.recipe}, {row.workload}, {row.target}", True),
    tables.Column("batch x context", shape, left=True),
]
WHY = [
    tables.Column("why", lambda row: row.reason, left=True),
    tables.Column("jaxlib", lambda row: row.jaxlib),
]
EXPOSED = [
    *WHERE,
    tables.Column("reduction", lambda row: row.reduction, left=True),
    tables.Column("hidden", lambda row: f"{row.share:.0%}"),
    tables.Column(
        "exposed of the step", lambda row: f"{row.exposed_us / row.step_us:.1%}"
    ),
    *WHY,
]
REFUSED = [*WHERE, *WHY]
