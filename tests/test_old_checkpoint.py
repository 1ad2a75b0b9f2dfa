"""A run that ladder_jax 0.1.0 saved, before fields of the configuration were renamed,
still loads and continues.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

import ladder_jax
from ladder_jax import config, training
from ladder_jax.checkpoint import read_meta

RUN = Path(__file__).parent / "data" / "run_0.1.0.tar.gz"
# Numbers that ladder_jax 0.1.0 computed from its own checkpoint of step 4, and in the
# two steps after it.
LOGITS = [
    -0.28788578510284424,
    -0.2710646688938141,
    -0.050620242953300476,
    -0.18654084205627441,
]
LOSSES = {5: 5.508561134338379, 6: 5.425120830535889}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder that the old command ran in: its corpus, and what it saved."""
    with tarfile.open(RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "corpus").mkdir()
    for i in range(10, 50):
        text = f"Document {i} says that ladders have {i} rungs, "
        text += "and that every rung holds.\n"
        (tmp_path / "corpus" / f"{i}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_an_old_checkpoint_gives_the_same_logits(run):
    logits, _ = ladder_jax.load(run).logits("Document 12 says")
    np.testing.assert_allclose(logits[-1, :4], LOGITS, rtol=1e-4)


def test_an_old_run_goes_on(run, monkeypatch):
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: device)  # its mesh is of one device
    saved = config.from_dict(read_meta(run)["config"])
    assert (saved.train.grad_accum_steps, saved.train.remat, saved.model.qkv_bias) == (
        2,
        "dots",
        True,
    )
    assert (saved.optimizer.lr_schedule, saved.optimizer.final_lr_fraction) == (
        "wsd",
        0.2,
    )
    values = config.to_dict(saved)
    values["train"]["steps"] = 6
    training.train(config.from_dict(values), resume=True)
    rows = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {
        row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] > 4
    }
    assert losses == pytest.approx(LOSSES, rel=1e-4)
