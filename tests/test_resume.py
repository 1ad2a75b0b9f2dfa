"""What a resumed run may change (its mesh, its place), and what it may not."""

import json
import os
import shutil
import signal

import pytest
import tiny
from train_runs import at_step, copy

import ladder_jax
from ladder_jax import preparation, training
from ladder_jax.config import ConfigError
from ladder_jax.data import tokenizer

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_on_another_mesh_the_run_goes_on(whole, tiny_folder, tmp_path):
    copy(whole, tmp_path / "run", 12)
    cfg = tiny.make(
        tiny_folder,
        train_out=str(tmp_path / "run"),
        mesh_data=1,
        mesh_fsdp=1,
        mesh_tensor=8,
    )
    training.train(cfg, resume=True)
    for left, right in zip(tiny.rows(tmp_path / "run"), tiny.rows(whole), strict=True):
        assert left == (
            right if right["step"] <= 12 else pytest.approx(right, rel=1e-4)
        )


def test_resume_without_a_run_starts_it(tiny_folder, tmp_path, capfd):
    cfg = tiny.make(tiny_folder, train_out=str(tmp_path / "run"))
    with at_step(0, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        training.train(cfg, resume=True)
    assert "nothing to resume in" in capfd.readouterr().out
    with pytest.raises(
        ConfigError,
        match="already holds a run, at step 1: continue it with --resume, or",
    ):
        training.train(cfg)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            dict(model_ffn_dim=128),
            "model.ffn_dim was 64 in the run to resume and is 128 now: keep it, or",
        ),
        (
            dict(model_residual="standard"),
            "model.residual was 'ladder' in the run to resume and is 'standard' now",
        ),
        (dict(train_global_batch=16), "train.global_batch was 8 in the run"),
        (dict(train_seed=1), "train.seed was 0 in the run"),
        (dict(data_held_out_fraction=0.3), "data.held_out_fraction was 0.2 in the run"),
    ],
)
def test_what_a_resumed_run_may_not_change(whole, tiny_folder, changed, message):
    before = sorted(whole.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        training.train(
            tiny.make(tiny_folder, train_out=str(whole), **changed), resume=True
        )
    assert sorted(whole.rglob("*")) == before


def test_a_checkpoint_of_a_newer_version_names_itself(whole, tiny_folder, tmp_path):
    copy(whole, tmp_path / "run", 3)
    path = tmp_path / "run/checkpoints/3/meta/data.json"
    meta = json.loads(path.read_text())
    meta["ladder_jax"] = "9.1.0"
    meta["config"]["model"]["experts"] = 8
    path.write_text(json.dumps(meta))
    message = (
        f"{tmp_path}/run was written by ladder_jax 9.1.0, and this version cannot read "
        "its configuration: model.experts is not a field"
    )
    with pytest.raises(ConfigError, match=message):
        training.train(
            tiny.make(tiny_folder, train_out=str(tmp_path / "run")), resume=True
        )
    with pytest.raises(ConfigError, match=message):
        ladder_jax.load(tmp_path / "run")


def test_a_corpus_or_tokenizer_with_other_contents_is_not_the_same_run(
    whole, tiny_folder, tmp_path
):
    tiny.write_corpus(tmp_path / "corpus")
    meta = json.loads((whole / "checkpoints/20/meta/data.json").read_text())
    now = {**meta, "corpus": [1, 2]}
    with pytest.raises(
        ConfigError,
        match="data.source=.* has other contents now than in the run to resume: rest",
    ):
        preparation.check_resumed(meta, now)
    other = tokenizer.train(["one two three"] * 9, 270).to_json()
    with pytest.raises(
        ConfigError, match="data.tokenizer='bytes' has other contents now"
    ):
        preparation.check_resumed(meta, {**meta, "tokenizer": other})
    for residual in ("desync:2", "dtp:1"):
        own = json.loads(json.dumps(meta).replace('"ladder"', f'"{residual}"'))
        with pytest.raises(
            ConfigError,
            match=f"mesh.tensor was 2 in the run to resume and is 4 now: a {residual}",
        ):
            preparation.check_resumed(own, {**own, "tensor": 4})
    preparation.check_resumed(meta, {**meta, "tensor": 4})


def test_a_run_goes_on_after_it_and_its_corpus_moved(tiny_folder, whole, tmp_path):
    shutil.copytree(tiny_folder / "corpus", tmp_path / "moved/corpus")
    shutil.copytree(whole, tmp_path / "moved/run")
    # The corpus in other words; then a folder that also holds train.out and the cache.
    for source in ("moved/./corpus/", "moved"):
        moved = tiny.make(tmp_path / "moved", data_source=f"{tmp_path}/{source}")
        assert training.train(moved, resume=True)["step"] == 20
    (tmp_path / "moved/corpus/new.txt").write_text("one more document")
    with pytest.raises(ConfigError, match="data.source=.* has other contents now"):
        training.train(moved, resume=True)


def test_documents_with_as_many_tokens_but_other_contents_are_not_the_same_run(whole):
    meta = json.loads((whole / "checkpoints/20/meta/data.json").read_text())
    changed = {**meta, "documents": "another digest"}
    with pytest.raises(ConfigError, match="data.source=.* has other contents now"):
        preparation.check_resumed(meta, changed)
    del meta["documents"]  # a checkpoint from before there was a digest
    preparation.check_resumed(meta, changed)
    older = json.loads(json.dumps(meta))
    del older["config"]["model"]["qk_norm"]  # from before there was such a field
    preparation.check_resumed(older, meta)
