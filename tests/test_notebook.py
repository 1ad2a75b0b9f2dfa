"""The notebook: all its cells run, in order, on a checkpoint of a training run."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import pytest

from ladder_jax import model
from ladder_jax.checkpoint import Checkpoints
from ladder_jax.config import Config, Model, to_dict
from ladder_jax.data import tokenizer

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "checkpoint.ipynb"


def leave_run(folder):
    """A run's folder: checkpoints of two steps, and metrics."""
    config = Config(
        Model(
            dim=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            ffn_dim=64,
            max_length=256,
            dtype="float32",
        )
    )
    meta = dict(
        config=to_dict(config), tensor=1, tokenizer=tokenizer.ByteTokenizer().to_json()
    )
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        for step in (2, 10):
            parameters = model.init(config.model, jax.random.key(step))
            checkpoints.save(step, dict(model=parameters), None, meta)
    rows = [
        dict(step=2, loss=5.5),
        dict(step=2, held_out_loss=5.4),
        dict(step=10, loss=5.1, mfu=0.1),
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


def test_all_cells_run_in_order(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    leave_run(tmp_path)
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
