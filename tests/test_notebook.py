"""The notebook: all its cells run, in order, on a checkpoint of a training run."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import tiny

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "checkpoint.ipynb"


def test_all_cells_run_in_order(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    tiny.write_run(tmp_path)
    monkeypatch.setenv("LADDER_JAX_RUN", str(tmp_path))
    cells = [
        cell
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    for cell in cells:
        assert not cell["outputs"] and not cell["execution_count"], "clear all outputs"
    names, output = {}, io.StringIO()
    with contextlib.redirect_stdout(output):
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"code cell {number}", "exec"), names)
    for pattern in (
        r"layers\.attention\.wq +\(2, 32, 4, 8\) +2,048  float32",
        r"layer   1:  attention \(delay 1\)",
        r"ladder +\d\.\d\d bits a token   \(as trained\)",
        r"standard +\d\.\d\d bits a token\n",
        r"10 \['meta', 'model'",
    ):
        assert re.search(pattern, output.getvalue()), pattern
    assert {
        line.get_label(): len(line.get_xdata()) for line in names["axes"].get_lines()
    } == {"loss": 2, "held_out_loss": 1}
