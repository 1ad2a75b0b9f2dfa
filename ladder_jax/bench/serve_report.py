"""Writes results of `ladder-jax bench serve --json` as tables of Markdown.

python -m ladder_jax.bench.serve_report docs/serving_bench/*.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from ladder_jax.bench.load_figures import columns
from ladder_jax.planner.tables import markdown_table


def tables(results: dict[str, Any]) -> str:
    """The table of one run, and below it what its rows were measured on."""
    rates = "; ".join(
        f"{library} " + ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in of.items())
        for library, of in results["machine"]["gflops"].items()
    )
    table = markdown_table(columns(), results["rows"])
    return f"{table}\n\nMatrix products in the same run, GFLOP/s: {rates}."


def main(paths: list[str]) -> None:
    """Prints the tables of all files, each under the file's name."""
    for path in map(Path, paths):
        print(f"**{path.stem}**\n\n{tables(json.loads(path.read_text()))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
