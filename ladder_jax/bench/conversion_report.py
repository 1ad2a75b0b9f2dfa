"""The rows of the conversion study: the CSV file, the tables, the plot."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladder_jax import files
from ladder_jax.config import ConfigError

Row = dict[str, Any]
KEY = ("layers", "method", "seed", "rate", "total")  # what tells runs apart
NAMES = {
    "none": "parent",
    "sft": "next token",
    "distill": "distillation",
    "anneal": "distillation, annealed",
    "gated": "distillation, annealed with the gate",
}
# The ends of the names of columns: accuracy on a task, and its standard error.
ACCURACY = "_accuracy"
ERROR = ACCURACY + "_stderr"


def say(text: str) -> None:
    print(text, flush=True)


def accuracies(row: Mapping[str, Any]) -> dict[str, float]:
    """{task: accuracy} of a row; empty where it was not measured."""
    return {
        name.removesuffix(ACCURACY): float(value)
        for name, value in row.items()
        if name.endswith(ACCURACY) and value not in ("", None)
    }


class Rows:
    """The rows of a CSV file, of which each change is complete on disk or not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, run: Row) -> list[Row]:
        """The rows of a run."""
        wanted = [str(run[name]) for name in KEY]
        return [row for row in self.rows if [str(row[n]) for n in KEY] == wanted]

    def complete(self, run: Row) -> bool:
        """Whether the run has its last row."""
        return any(int(row["tokens"]) == run["total"] for row in self.of(run))

    def add(self, row: Row) -> None:
        """Appends a row, in place of one of the same run after as many tokens."""
        same = [r for r in self.of(row) if float(r["tokens"]) == row["tokens"]]
        self.rows = [r for r in self.rows if r not in same] + [row]
        self._write()

    def remove(self, run: Row) -> None:
        """Removes the rows of a run that starts again."""
        old = self.of(run)
        if old:
            self.rows = [row for row in self.rows if row not in old]
            self._write()

    def _write(self) -> None:
        with files.replacing(self.path) as part, part.open("w", newline="") as file:
            if self.rows:
                # Rows of an earlier command may lack columns.
                names = dict.fromkeys(name for row in self.rows for name in row)
                writer = csv.DictWriter(file, list(names))
                writer.writeheader()
                writer.writerows(self.rows)


def line(row: Row, number: int, count: int, seconds: float) -> str:
    """A row as a line of output."""
    tasks = "".join(f", {name} {x:.3f}" for name, x in accuracies(row).items())
    return (
        f"[{seconds:5.0f}s] run {number}/{count} {row['layers']:8} {row['method']:7} "
        f"seed {row['seed']} rate {row['rate']:g} {row['tokens']:>10,} tokens: "
        f"bits per byte {row['documentation_bits_per_byte']:.4f} and "
        f"{row['notices_bits_per_byte']:.4f}, divergence "
        f"{row['documentation_divergence']:.4f}, {row['tokens_per_s']:,.0f} tok/s"
        f"{tasks}"
    )


# ---------------------------------------------------------------- other files


def require_same(out: Path, settings: Row) -> None:
    """Raises ConfigError where the rows in `out` were measured with other settings.

    The first command writes them to settings.json.
    """
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        _write_json(path, settings)
        return
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise ConfigError(
                f"{name}={value!r} is not accepted: the rows in {out} were measured "
                f"with {before[name]!r}; keep that, or choose another --out"
            )


def _write_json(path: Path, value: Any) -> None:
    files.write_text(path, json.dumps(value))


def read_damages(out: Path) -> list[float] | None:
    path = out / "damages.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_damages(out: Path, damages: list[float]) -> None:
    _write_json(out / "damages.json", damages)


# ---------------------------------------------------------------- table and plot


Group = tuple[str, str]  # a learning rate and a number of tokens: runs to compare


def group_of(row: Row) -> Group:
    return str(row["rate"]), str(row["total"])


def results(rows: list[Row], name: str, group: Group) -> dict[tuple[str, str], Any]:
    """By (layers, method), and then by tokens: the values `name` of all seeds."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if group_of(row) == group:
            kind = found.setdefault((row["layers"], row["method"]), {})
            kind.setdefault(int(row["tokens"]), []).append(float(row[name]))
    return found


def title(layers: str, method: str) -> str:
    if layers == "none":
        return "the parent, next token (control)"
    return f"{layers}, {NAMES[method]}"


def table(rows: list[Row]) -> str:
    """Markdown: bits per byte by run and budget, one table a text; mean of the seeds.

    With several seeds, the half of their range follows.
    """
    parts = []
    for group in dict.fromkeys(map(group_of, rows)):
        rate, total = group
        for kind in ("documentation", "notices"):
            found = results(rows, f"{kind}_bits_per_byte", group)
            budgets = sorted({tokens for values in found.values() for tokens in values})
            parts.append(
                f"Held-out {kind}, bits per byte; learning rate {rate}, runs of "
                f"{int(total) / 1e6:.1f}M tokens:\n"
            )
            head = " | ".join(f"{tokens / 1e6:.2f}M" for tokens in budgets)
            parts.append(f"| ladder layers, training | {head} |")
            parts.append("|---" * (len(budgets) + 1) + "|")
            for kind_of_run, values in found.items():
                cells = " | ".join(_cell(values.get(tokens)) for tokens in budgets)
                parts.append(f"| {title(*kind_of_run)} | {cells} |")
            parts.append("")
    return "\n".join(parts)


def task_table(rows: list[Row]) -> str:
    """Markdown: accuracy by model and task, ± one standard error over the examples.

    Of several seeds, the mean of both. Empty where no task was measured.
    """
    measured = [row for row in rows if accuracies(row)]
    names = list(dict.fromkeys(name for row in measured for name in accuracies(row)))
    models: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        models.setdefault((_model(row), row["tokens"]), []).append(row)
    if not models:
        return ""
    lines = ["Accuracy on tasks, ± one standard error over the examples:\n"]
    lines.append(f"| model | tokens of training | {' | '.join(names)} |")
    lines.append("|---" * (len(names) + 2) + "|")
    for (model, tokens), same in models.items():
        cells = " | ".join(_accuracy(same, name) for name in names)
        lines.append(f"| {model} | {int(tokens) / 1e6:.2f}M | {cells} |")
    return "\n".join(lines) + "\n"


def _model(row: Row) -> str:
    """What was measured: the methods do not matter before the first step."""
    layers = row["layers"]
    if int(row["tokens"]):
        return f"{title(layers, row['method'])}; rate {row['rate']}"
    return "the parent" if layers == "none" else f"{layers}, untrained"


def _accuracy(rows: list[Row], name: str) -> str:
    found = [row for row in rows if name in accuracies(row)]
    if not found:
        return ""
    mean = sum(accuracies(row)[name] for row in found) / len(found)
    errors = [float(row.get(name + ERROR) or "nan") for row in found]
    error = sum(errors) / len(errors)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.4f}"
    spread = (max(values) - min(values)) / 2
    return mean if len(values) == 1 else f"{mean} ± {spread:.4f}"


def plot(rows: list[Row], path: Path) -> None:
    """Bits per byte over tokens: a panel for each text and each choice of layers.

    It writes nothing where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    group = group_of(rows[0])
    chosen = [x for x in dict.fromkeys(row["layers"] for row in rows) if x != "none"]
    kinds = ("documentation", "notices")
    size = (3.4 * max(len(chosen), 1), 5.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(2, max(len(chosen), 1), sharex=True, squeeze=False)
    colors = {"sft": "tab:orange", "distill": "tab:blue", "anneal": "tab:green"}
    colors["gated"] = "tab:red"
    for axes_row, kind in zip(grid, kinds):
        found = results(rows, f"{kind}_bits_per_byte", group)
        control = found.get(("none", "sft"), {})
        for axes, layers in zip(axes_row, chosen):
            for method, color in colors.items():
                _curve(axes, found.get((layers, method), {}), color, NAMES[method])
            _curve(axes, control, "black", "parent, next token", "--")
            axes.set_title(f"{layers}, {kind}", fontsize=9)
            axes.set_xscale("symlog", linthresh=5e4)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:.1f}")
            axes.yaxis.set_minor_formatter("{x:.1f}")
            axes.tick_params(labelsize=7, which="both")
            axes.grid(alpha=0.3, which="both")
        axes_row[0].set_ylabel("held-out bits per byte")
    budgets = sorted({int(row["tokens"]) for row in rows if group_of(row) == group})
    for axes in grid[-1]:
        labels = [f"{tokens / 1e6:.1f}" for tokens in budgets]
        axes.set_xticks(budgets, labels)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("millions of tokens of training")
    if chosen:
        grid[0][0].legend(fontsize=7)
    with files.replacing(path) as part:
        figure.savefig(part, dpi=110)


def _curve(
    axes: Any, values: dict[int, list[float]], color: str, label: str, style: str = "-"
) -> None:
    tokens = sorted(values)
    if tokens:
        means = [sum(values[t]) / len(values[t]) for t in tokens]
        axes.plot(tokens, means, f"o{style}", color=color, label=label, markersize=3)


def write(out: Path) -> None:
    """Writes table.md and plot.png from rows.csv."""
    rows = Rows(out / "rows.csv").rows
    if rows:
        parts = [table(rows), task_table(rows)]
        files.write_text(out / "table.md", "\n".join(filter(None, parts)))
        plot(rows, out / "plot.png")
