"""Runs a notebook's code cells in order: python run_notebook.py NOTEBOOK PICTURES.

A cell whose last line is an expression prints its value, as Jupyter does. Every
`plt.show()` writes a PNG into the folder PICTURES. Needs no Jupyter.
"""

import ast
import json
import sys
from pathlib import Path


def code_cells(path):
    """The code cells of a notebook."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(path, pictures):
    """Runs the notebook. Its names end up in a dict, which this returns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = []

    def show():
        for number in plt.get_fignums():
            shown.append(number)
            name = f"{Path(path).stem}_{len(shown)}.png"
            plt.figure(number).savefig(Path(pictures) / name)
        plt.close("all")

    plt.show = show
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(path)):
        tree = ast.parse("".join(cell["source"]))
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, f"code cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(last, f"code cell {number}", "eval"), names)
            if value is not None:
                print(repr(value))
    return names


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2])
