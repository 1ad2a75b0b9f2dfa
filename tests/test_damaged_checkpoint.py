"""Damaged checkpoints and failing saves: what is good stays, and one line says what is
not.
"""

import json
import logging
import resource
import shutil

import jax
import numpy as np
import pytest
from checkpoint_states import (
    META,
    Model,
    abstract,
    assert_same,
    data,
    harm,
    make_state,
    save_steps,
)

from ladder_jax.checkpoint import load_model, read_meta
from ladder_jax.saving import Checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with checkpoints 1 and 2, with arrays that have data files of their own."""
    return save_steps(tmp_path_factory.mktemp("two"), 1, 2, dim=128)


HARM = [
    *(
        (name, how)
        for how in ("delete", "truncate")
        for name in (
            "_CHECKPOINT_METADATA",
            "meta/data.json",
            "model/_METADATA",
            "model/manifest.ocdbt",
            "model/d/*",
            "model/ocdbt.process_0/d/*",
            "optimizer/ocdbt.process_0/d/*",
        )
    ),
    *(
        (name, "garbage")
        for name in (
            "_CHECKPOINT_METADATA",
            "meta/data.json",
            "model/ocdbt.process_0/d/*",
        )
    ),
]


@pytest.mark.parametrize("name, how", HARM)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_restored(
    two, tmp_path, name, how, caplog, capfd
):
    folder = shutil.copytree(two, tmp_path / "run")
    harm(folder / "2", name, how)
    position, expected_position = data(), data()
    with Checkpoints(folder, 9) as run:
        step, state, _ = run.restore(abstract(make_state(dim=128)), position)
        assert step == 1
        assert_same(state, make_state(1, dim=128))
        next(expected_position)
        np.testing.assert_array_equal(next(position), next(expected_position))
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert "2 is damaged" in message and "\n" not in message
        with pytest.raises(ValueError, match="2 is damaged: ") as error:
            run.restore(abstract(make_state(dim=128)), data(), step=2)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr() == ("", "")


def test_a_save_replaces_a_damaged_checkpoint_of_its_step(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    harm(folder / "2", "*", "truncate")
    harm(folder / "2" / "model", "*", "truncate")
    with Checkpoints(folder, 9) as run:
        run.restore(abstract(make_state(dim=128)))
        run.save(2, make_state(22, dim=128), None, META)
    assert_same(
        load_model(folder, jax.eval_shape(lambda: Model(dim=128))), Model(22, dim=128)
    )


def test_that_all_checkpoints_are_damaged_is_said_and_meta_is_still_read(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    for step in "12":
        harm(folder / step, "model/manifest.ocdbt", "truncate")
    with pytest.raises(
        ValueError, match="1 is damaged: .*; none of 2 checkpoints can be read"
    ):
        load_model(folder, jax.eval_shape(lambda: Model(dim=128)))
    assert read_meta(folder)["config"] == META["config"]


def test_a_path_without_a_checkpoint_is_one_line(two, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file", "/proc"):
        for read in (read_meta, lambda path: load_model(path, jax.eval_shape(Model))):
            with pytest.raises(
                ValueError,
                match="a run's folder, its checkpoints folder or the folder of one",
            ):
                read(path)
    with pytest.raises(ValueError, match=r"no checkpoint of step 3, only \[1, 2\]"):
        read_meta(two, step=3)
    with (
        Checkpoints(tmp_path / "empty", 1) as run,
        pytest.raises(ValueError, match="holds no checkpoint"),
    ):
        run.restore(abstract(make_state()))


def older(folder, step, positions):
    """Gives a checkpoint the layout of older versions: a file of each process."""
    file = folder / str(step) / "meta" / "data.json"
    meta = json.loads(file.read_text())
    del meta["data"]
    meta["parts"] = sorted([*meta["parts"], "data"])
    file.write_text(json.dumps(meta))
    (folder / str(step) / "data").mkdir()
    for i, position in enumerate(positions):
        name = f"process_{i}-of-{len(positions)}.json"
        (folder / str(step) / "data" / name).write_text(json.dumps(position))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_position_of_an_older_checkpoint_is_read(two, tmp_path, processes):
    folder = shutil.copytree(two, tmp_path / "run")
    older(folder, 2, [{"next_index": 5}] * processes)
    position, expected = data(), data()
    for _ in range(5):
        next(expected)
    with Checkpoints(folder, 9) as run:
        assert run.restore(abstract(make_state(dim=128)), position)[0] == 2
        np.testing.assert_array_equal(next(position), next(expected))
        assert load_model(folder, jax.eval_shape(lambda: Model(dim=128))) is not None


@pytest.mark.parametrize("how", ["delete", "truncate", "empty"])
def test_a_damaged_older_position_is_reported(two, tmp_path, how, caplog):
    folder = shutil.copytree(two, tmp_path / "run")
    older(folder, 2, [{"next_index": 5}])
    harm(folder / "2", "data/process*", how)
    with Checkpoints(folder, 9) as run:
        assert run.restore(abstract(make_state(dim=128)), data())[0] == 1
    assert "2 is damaged: data" in caplog.text


def test_positions_that_do_not_fit_are_refused(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    restore = lambda run: run.restore(abstract(make_state(dim=128)), data(), step=2)
    with Checkpoints(folder, 9) as run:
        older(folder, 2, [{"other": 1}])
        with pytest.raises(ValueError, match="the data iterator does not fit"):
            restore(run)
        shutil.rmtree(folder / "2" / "data")
        shutil.copy(two / "2/meta/data.json", folder / "2/meta/data.json")
        older(folder, 2, [{"next_index": 5}, {"next_index": 6}])
        with pytest.raises(ValueError, match="other positions of the data in each"):
            restore(run)
    with Checkpoints(tmp_path / "other", 9) as run:
        run.save(3, make_state(dim=128), None, META)
        with pytest.raises(ValueError, match="3 holds no position of the data"):
            run.restore(abstract(make_state(dim=128)), data())


def test_a_later_format_is_refused(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    file = folder / "2" / "meta" / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        read_meta(folder)


# ---------------------------------------------------------------- saves that fail


@pytest.mark.parametrize(
    "folder", ["/proc/ladder", "{tmp}/file", "{tmp}/file/checkpoints"]
)
def test_a_folder_that_cannot_be_created_is_an_error(tmp_path, folder, capfd):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be written"):
        Checkpoints(folder.format(tmp=tmp_path), 1)
    assert capfd.readouterr() == ("", "")


def test_the_next_call_reports_a_full_disk_and_other_checkpoints_stay_whole(
    tmp_path, capfd
):
    state = {"model": {"w": jax.random.normal(jax.random.key(0), (512, 512))}}
    run = Checkpoints(tmp_path, 9)
    run.save(1, state, data(), META)
    run.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files cannot grow beyond this size, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        run.save(2, state, data(), META)
        with pytest.raises(
            OSError, match=r"/2 could not be written: .*File too large.*"
        ) as error:
            run.save(3, state, data(), META)
        assert "\n" not in str(error.value)
        run.save(3, state, data(), META)
        with pytest.raises(OSError, match="/3 could not be written"):
            run.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.steps() == [1]
    run.save(3, state, data(), META)
    run.close()
    assert capfd.readouterr() == ("", "")
    assert_same(load_model(tmp_path, state["model"], step=1), state["model"])
    with Checkpoints(tmp_path, 9) as run:
        run.restore({"model": state["model"]})
        run.save(4, state, data(), META)
    # The failed saves left no file.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3", "4"]


def test_a_folder_lost_during_the_run(tmp_path, capfd):
    folder = tmp_path / "run"
    run = Checkpoints(folder, 9)
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(OSError, match="/1 could not be written: "):
        run.save(1, make_state(), data(), META)
        run.wait()  # on a busy machine, this call reports it
    run.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name",
    [
        "model/_METADATA",
        "optimizer/_METADATA",
        "meta/data.json",
        "_CHECKPOINT_METADATA",
    ],
)
def test_a_save_that_cannot_be_read_does_not_count(tmp_path, name):
    """The next call raises an error, and the good checkpoint before it stays."""
    run = Checkpoints(tmp_path, 1)
    run.save(1, make_state(1), data(), META)
    run.wait()
    run.save(2, make_state(2), data(), META)
    run._checkpointer.wait()  # written, and not yet read back
    harm(tmp_path / "2", name, "delete")
    with pytest.raises(OSError, match="/2 could not be written: .*") as error:
        run.save(3, make_state(3), data(), META)
    assert "\n" not in str(error.value)
    assert_same(load_model(tmp_path, jax.eval_shape(Model), step=1), Model(1))
    run.save(2, make_state(22), data(), META)  # replaces the damaged one
    run.close()
    assert_same(load_model(tmp_path, jax.eval_shape(Model)), Model(22))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]
