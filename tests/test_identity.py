"""run.json: what a run is, an entry for every start, and nothing secret."""

import json
import os
import subprocess
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from ladder_jax import cli, config, identity, inspection

CONFIG = config.Config(data=config.Data(source="s3://me:geheim@store/corpus"))


def record(out, step=0, mesh=None):
    mesh = mesh or jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    identity.record(out, CONFIG, mesh, step, 8e12)


def test_every_start_is_added_with_all_that_decides_on_the_numbers(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["ladder-jax", "train", "a b.py", "--resume"])
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    record(tmp_path)
    record(tmp_path, step=7)
    text = (tmp_path / "run.json").read_text()
    first, second = identity.read(tmp_path)
    assert (first["step"], second["step"]) == (0, 7)
    assert second["command"] == "ladder-jax train 'a b.py' --resume"
    expected = config.to_dict(CONFIG)
    expected["data"]["source"] = "s3://***@store/corpus"
    assert first["config"] == json.loads(json.dumps(expected))
    assert "geheim" not in text and "0123456789abcdef" not in text
    secrets = [name for name in os.environ if "SECRET" in name or "TOKEN" in name]
    assert not [name for name in secrets if name in text]
    assert first["versions"]["jax"] == jax.__version__
    assert first["mesh"] == dict(a=2, b=4) and first["devices"]["count"] == 8
    assert first["hosts"] == [os.uname().nodename] and first["processes"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"starts": [{"step": 1}]}'])
def test_a_damaged_file_is_left_out_and_does_not_stop_a_run(tmp_path, content, caplog):
    (tmp_path / "run.json").write_text(content)
    assert identity.read(tmp_path) == []
    assert "run.json cannot be read" in caplog.text
    record(tmp_path)
    assert len(identity.read(tmp_path)) == 1


def git(folder, *words):
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", *own, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_code_is_a_commit_and_a_digest_of_what_is_not_committed(
    tmp_path, monkeypatch
):
    package = tmp_path / "checkout" / "ladder_jax"
    package.mkdir(parents=True)
    (package / "identity.py").write_text("1\n")
    monkeypatch.setattr(identity, "__file__", str(package / "identity.py"))
    git(tmp_path, "init", "checkout")
    untracked = identity.code()
    assert untracked["commit"] is None and untracked["changes"] is None
    git(package, "add", ".")
    git(package, "commit", "-m", "a")
    clean = identity.code()
    assert clean["commit"] == git(package, "rev-parse", "HEAD").strip()
    assert clean["changes"] is None and clean["source"] == untracked["source"]
    seen = [clean]
    for content in ("2\n", "3\n"):
        (package / "identity.py").write_text(content)
        seen.append(identity.code())
    assert len({found["changes"] for found in seen}) == 3
    assert len({found["source"] for found in seen}) == 3
    assert len({found["commit"] for found in seen}) == 1
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert identity.code() == untracked | dict(source=seen[-1]["source"])


def devices(count, kind, coords=None, nodes=1):
    return [
        types.SimpleNamespace(
            device_kind=kind,
            platform="tpu" if coords else "gpu",
            process_index=i * nodes // count,
            coords=coords and coords[i],
        )
        for i in range(count)
    ]


SLICE = [(x, y, 0) for y in range(4) for x in range(2)]


@pytest.mark.parametrize(
    "found, chip, target",
    [
        (devices(8, "TPU v5 lite", SLICE), "v5e", "v5e:2x4"),
        (devices(7, "TPU v5 lite", SLICE), "v5e", None),  # not a whole slice
        (devices(8, "TPU v5", SLICE), "v5p", "v5p:2x4x1"),
        (devices(8, "NVIDIA H100 80GB HBM3"), "h100", "h100:1x8"),
        (devices(16, "NVIDIA H100 80GB HBM3", nodes=2), "h100", None),
        (devices(8, "NVIDIA L4"), "l4", None),
        (devices(1, "some other chip"), None, None),
    ],
)
def test_the_planners_name_of_the_devices(found, chip, target):
    assert identity.chips.kind_of(found[0]) == chip
    assert identity.target_of(found, chip) == target


def test_inspect_shows_the_newest_start(tmp_path, capsys):
    tiny.write_run(tmp_path / "run")
    assert inspection.inspect(tmp_path / "run")["starts"] == []
    record(tmp_path / "run")
    record(tmp_path / "run", 10)
    for path in ("run", "run/checkpoints", "run/checkpoints/10"):
        assert cli.run(["inspect", str(tmp_path / path)]) == 0
        text = capsys.readouterr().out
        assert ", 2 starts, the last " in text and "at step 10" in text
        assert f"jax {jax.__version__}" in text and "8 x cpu, mesh a=2 x b=4" in text


def test_the_checkout_that_runs_this_test_is_found():
    found = identity.code()
    root = Path(identity.__file__).parents[1]
    expected = (
        git(root, "rev-parse", "HEAD").strip() if (root / ".git").exists() else None
    )
    assert found["commit"] == expected
