"""Checkpoints: bit-exact round trips onto any mesh, failing saves, damaged files."""

import json
import logging
import random
import resource
import shutil
import subprocess
import sys

import grain
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from ladder_jax import checkpoint, config
from ladder_jax.checkpoint import Checkpoints, load_model, read_meta
from ladder_jax.config import ConfigError
from ladder_jax.run_folder import Lease

META = {
    "config": json.loads(json.dumps(config.to_dict(config.Config()))),
    "tokenizer": '{"version": "1.0"}',
}


class Attention(nnx.Module):
    def __init__(self, key, dim):
        self.wq = nnx.Param(jax.random.normal(key, (dim, 16)))
        # Flax uses this name itself.
        self.value = nnx.Param(jnp.arange(dim, dtype=jnp.int32))


class Model(nnx.Module):
    def __init__(self, seed=0, dim=8):
        self.attention = Attention(jax.random.key(seed), dim)
        self.norm = nnx.Param(jnp.linspace(0, 1, 8, dtype=jnp.bfloat16))
        self.blocks = nnx.List([nnx.Param(jnp.full(3, float(seed)))])


def data():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).batch(2).to_iter_dataset())


def make_state(seed=0, dim=8, optimizer=None):
    """A model and its optimizer's state, with values that depend on `seed`."""
    model = Model(seed, dim)
    state = (optimizer or optax.adamw(1e-3)).init(
        jax.tree.map(lambda x: x.astype(jnp.float32), model)
    )
    noise = lambda x: (
        x + (jax.random.normal(jax.random.key(seed), x.shape) if x.ndim else seed)
    )
    return {"model": model, "optimizer": jax.tree.map(noise, state)}


def abstract(state, mesh=None, spec=lambda x: P()):
    """Shapes, dtypes and shardings: on `mesh` by `spec`, or on the first device."""
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def describe(x):
        place = NamedSharding(mesh, spec(x)) if mesh else one_device
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(describe, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(folder, *steps, keep=9, **kind):
    """A run with a checkpoint at each of `steps`, whose parameters have that seed."""
    with Checkpoints(folder, keep) as run:
        position = data()
        for step in steps:
            next(position)
            run.save(step, make_state(step, **kind), position, META)
    return folder


def test_a_round_trip_is_bit_exact_and_data_continue_at_their_position(tmp_path, capfd):
    position, state = data(), make_state(3)
    for _ in range(3):
        next(position)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as run:
        run.save(3, state, position, META)
        next_batch = next(position)
        run.wait()
        assert run.steps() == [3]
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as run:
        resumed = data()
        step, restored, meta = run.restore(abstract(state), resumed)
    assert step == 3 and {k: meta[k] for k in META} == META and meta["format"] == 1
    assert_same(restored, state)
    np.testing.assert_array_equal(next(resumed), next_batch)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("data_shards, tensor", [(8, 1), (2, 4), (1, 1)])
def test_any_mesh_to_any_mesh(tmp_path, data_shards, tensor):
    state = make_state(1)
    by_rows = lambda x: P("data") if x.ndim and x.shape[0] % 8 == 0 else P()
    by_columns = lambda x: P(None, "tensor") if x.ndim == 2 else P()
    here, there = helpers.make_mesh(8), helpers.make_mesh(data_shards, 1, tensor)
    shardings = jax.tree.map(lambda x: x.sharding, abstract(state, here, by_rows))
    with Checkpoints(tmp_path, 1) as run:
        run.save(1, jax.device_put(state, shardings), data(), META)
        _, restored, _ = run.restore(abstract(state, there, by_columns))
    assert_same(restored, state)
    wq = restored["model"].attention.wq[...]
    assert wq.sharding == NamedSharding(there, P(None, "tensor"))


def test_plain_orbax_reads_the_names(tmp_path):
    save_steps(tmp_path, 5)
    tree = ocp.load(tmp_path / "5", checkpointable_name="model")
    assert set(tree) == {"attention", "norm", "blocks"}
    assert set(tree["attention"]) == {"wq", "value"}
    assert_same(tree["attention"]["wq"], make_state(5)["model"].attention.wq[...])
    optimizer = ocp.load(tmp_path / "5", checkpointable_name="optimizer")
    assert set(optimizer["0"]) == {"count", "mu", "nu"}
    meta = json.loads((tmp_path / "5" / "meta" / "data.json").read_text())
    assert meta["config"] == META["config"]


def test_load_model_reads_only_the_parameters(tmp_path):
    run = save_steps(tmp_path / "checkpoints", 5, 7).parent
    shutil.rmtree(run / "checkpoints" / "7" / "optimizer")
    shutil.rmtree(run / "checkpoints" / "7" / "data")
    shape_only = jax.eval_shape(Model)
    for path in (run, str(run / "checkpoints"), run / "checkpoints" / "7"):
        assert_same(load_model(path, shape_only), Model(7))
        assert read_meta(path)["tokenizer"] == META["tokenizer"]
    assert_same(load_model(run, shape_only, step=5), Model(5))
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype
        ),
        shape_only,
    )
    wq = load_model(run, half).attention.wq[...]
    assert_same(wq, Model(7).attention.wq[...].astype(jnp.bfloat16))


def test_the_newest_checkpoints_stay(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 10, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "3"]


def test_saving_while_the_arrays_are_donated(tmp_path):
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path, 9) as run:
        x = {"w": jnp.zeros(1 << 20)}
        for step in range(1, 6):
            x["w"] = update(x["w"])
            run.save(step, {"model": x}, None, {})
            x["w"] = update(x["w"]) - 1
    for step in range(1, 6):
        restored = load_model(tmp_path, jax.eval_shape(lambda: x), step)
        assert np.all(np.asarray(restored["w"]) == step)


def test_a_step_saved_again_stays_and_a_run_from_an_older_step_replaces_later_ones(
    tmp_path,
):
    save_steps(tmp_path, 2, 4, 6)
    with pytest.raises(
        ValueError, match=r"checkpoints of another run, of steps \[2, 4, 6\]"
    ):
        Checkpoints(tmp_path, 9).save(7, make_state(0), data(), META)
    with Checkpoints(tmp_path, 9) as run:
        step, state, _ = run.restore(abstract(make_state()))
        run.save(step, make_state(99), data(), META)  # this step is saved already
        run.wait()
        assert_same(load_model(tmp_path, jax.eval_shape(Model)), Model(6))
        run.restore(abstract(make_state()), step=2)
        run.save(3, make_state(3), data(), META)
        run.wait()
        assert run.steps() == [2, 3]
        run.save(4, make_state(44), data(), META)
    assert_same(load_model(tmp_path, jax.eval_shape(Model)), Model(44))


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            {"dim": 16},
            r"model/attention/value has shape \(16,\) in the checkpoint, \(8,\) here",
        ),
        (
            {"optimizer": optax.sgd(1e-3, momentum=0.9)},
            r"optimizer/0/count is not in the checkpoint",
        ),
    ],
)
def test_another_model_is_not_called_damaged(tmp_path, caplog, kind, message):
    save_steps(tmp_path, 1, 2, **kind)
    there = {"model": {"dim": 16, "layers": 4}, "optimizer": {}}
    with Checkpoints(tmp_path, 9) as run, pytest.raises(ValueError, match=message):
        run.restore(abstract(make_state()))
    assert not caplog.records
    with Checkpoints(tmp_path / "b", 9) as run:
        run.save(1, make_state(), data(), {"config": there})
        with pytest.raises(
            ValueError, match=r"\(model.dim=16 in the checkpoint, 8 here\)"
        ):
            run.restore(
                abstract(make_state(dim=16)),
                config={"model": {"dim": 8, "layers": 4}, "optimizer": {}},
            )


def test_dtype_missing_and_unexpected_parameters_are_named(tmp_path):
    with Checkpoints(tmp_path, 9) as run:
        run.save(1, {"model": {"a": jnp.ones(2), "n": jnp.int32(7)}}, None, {})
        one, number = (
            jax.ShapeDtypeStruct((2,), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        for tree, message in [
            ({"a": one}, "model/n is in the checkpoint, but not here"),
            ({"a": one, "n": number, "b": one}, "model/b is not in the checkpoint"),
            (
                {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "n": number},
                "model/a is float32 in the checkpoint, bfloat16 here",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                run.restore({"model": tree})
        with pytest.raises(ValueError, match="holds no optimizer, only model"):
            run.restore({"model": {"a": one, "n": number}, "optimizer": {}})


def harm(folder, name, how):
    for path in [p for p in folder.glob(name) if p.is_file()]:
        content = path.read_bytes()
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(
                {
                    "truncate": content[: len(content) // 2],
                    "empty": b"",
                    "garbage": random.Random(0).randbytes(len(content)),
                }[how]
            )


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
            "data/process*",
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
    ("data/process*", "empty"),
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


def test_positions_of_more_processes_and_of_another_iterator(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    one = folder / "2" / "data" / "process_0-of-1.json"
    one.write_text('{"other": 1}')
    with Checkpoints(folder, 9) as run:
        with pytest.raises(ValueError, match="the data iterator does not fit"):
            run.restore(abstract(make_state(dim=128)), data())
        one.rename(one.with_name("process_0-of-2.json"))
        with pytest.raises(
            ValueError, match="resume with as many processes as saved them"
        ):
            run.restore(abstract(make_state(dim=128)), data())


def test_a_later_format_is_refused(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    file = folder / "2" / "meta" / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        read_meta(folder)


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


def test_random_keys_and_scalars_are_restored(tmp_path):
    state = {
        "model": {
            "key": jax.random.key(3),
            "step": jnp.int32(7),
            "b": jnp.array([True, False]),
        }
    }
    with Checkpoints(tmp_path, 1) as run:
        run.save(1, state, None, {})
        _, restored, _ = run.restore(
            abstract(state, helpers.make_mesh(data=2, tensor=4))
        )
    assert_same(
        jax.random.key_data(restored["model"].pop("key")),
        jax.random.key_data(state["model"].pop("key")),
    )
    assert_same(restored["model"], state["model"])


# ---------------------------------------------------------------- names of folders


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "a#b",
        "50%",
        "a%20b",
        "ü 日本",
        "a\nb",
        "{a}",
        "a]",
        "'a' \"b\"",
        "~a",
        "$a;",
    ],
)
def test_a_folder_whose_name_is_no_pattern_works(tmp_path, name):
    folder = save_steps(tmp_path / name / "checkpoints", 1, 2)
    with Checkpoints(folder, 9) as run:
        step, state, _ = run.restore(abstract(make_state()), data())
    assert step == 2
    assert_same(state, make_state(2))
    assert_same(load_model(tmp_path / name, jax.eval_shape(Model)), Model(2))


@pytest.mark.parametrize("name", ["a[b]", "a[", "a*", "a?b", "a\\b"])
def test_a_folder_whose_name_is_a_pattern_is_refused_before_anything_is_written(
    tmp_path, name
):
    folder = tmp_path / name / "checkpoints"
    with pytest.raises(ConfigError, match="is not accepted: it must be a path without"):
        Checkpoints(folder, 1)
    with pytest.raises(ConfigError, match="^train.out='"):
        checkpoint.require_plain_name(tmp_path / name, "train.out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_read_from_a_folder_that_is_renamed_to_a_pattern(tmp_path):
    save_steps(tmp_path / "plain", 1)
    (tmp_path / "plain").rename(tmp_path / "a[b]*")
    assert_same(load_model(tmp_path / "a[b]*", jax.eval_shape(Model)), Model(1))
    (tmp_path / "a[b]*").rename(tmp_path / "a\\b")
    with pytest.raises(ValueError, match="Orbax takes no path with"):
        load_model(tmp_path / "a\\b", jax.eval_shape(Model))


# ---------------------------------------------------------------- saves are read back


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


# ---------------------------------------------------------------- two jobs, one folder


def test_checkpoints_of_another_job_stop_the_run_and_stay(tmp_path):
    with Checkpoints(tmp_path, 1) as run:
        run.save(2, make_state(2), data(), META)
        run.wait()
        for step in "15":  # as if another job had written them
            shutil.copytree(tmp_path / "2", tmp_path / step)
        with pytest.raises(OSError, match=r"steps \[1, 5\], which another job wrote"):
            run.save(3, make_state(3), data(), META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "5"]


def test_surplus_checkpoints_of_another_job_are_not_removed(tmp_path):
    with Checkpoints(tmp_path, 1) as run:
        run.save(2, make_state(2), data(), META)
        run.wait()
        shutil.copytree(tmp_path / "2", tmp_path / "another")
        run.save(3, make_state(3), data(), META)
        (tmp_path / "another").rename(tmp_path / "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


ZOMBIE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from ladder_jax.checkpoint import Checkpoints
from ladder_jax.run_folder import Lease

state = {"model": {"w": jnp.zeros(4)}}
folder = sys.argv[1] + "/checkpoints"
with Lease(sys.argv[1]) as lease, Checkpoints(folder, 2, lease) as run:
    run.save(1, state, None, {})
    run.wait()
    print("saved", flush=True)
    # Meanwhile another job takes this one for dead, and takes its place.
    sys.stdin.readline()
    run.save(2, state, None, {})
"""


def test_a_job_that_was_taken_for_dead_leaves_its_successors_checkpoints(tmp_path):
    """The first of two jobs hangs, the second resumes, then the first wakes up."""
    first = subprocess.Popen(
        [sys.executable, "-c", ZOMBIE, tmp_path],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=helpers.code_environment(),
    )
    assert first.stdout.readline() == "saved\n"
    (tmp_path / "lease.json").unlink()  # as after STALE_S seconds without a heartbeat
    state = {"model": {"w": jnp.ones(4)}}
    with (
        Lease(tmp_path) as lease,
        Checkpoints(tmp_path / "checkpoints", 2, lease) as run,
    ):
        assert run.restore(abstract(state))[0] == 1
        for step in (2, 3, 4):
            run.save(step, state, None, {})
        run.wait()
        _, err = first.communicate("go on\n", timeout=100)
        assert first.returncode == 1
        assert "took this job for dead: this job stops without another write" in err
        run.save(5, state, None, {})
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == [4, 5]
    for step in (4, 5):
        assert_same(load_model(tmp_path, state["model"], step), state["model"])


RUN = """
import os, random, signal, sys, time

folder, seed = sys.argv[1], int(sys.argv[2])

def train(ready):
    # Imported after the fork: the threads that they start would not survive it.
    import grain, jax, jax.numpy as jnp, numpy as np
    from ladder_jax.checkpoint import Checkpoints
    jax.config.update("jax_platforms", "cpu")
    position = iter(grain.MapDataset.range(1 << 20).to_iter_dataset())
    zeros = lambda: {"model": {str(i): jnp.zeros((200, 500)) for i in range(8)}}
    step, shape = 0, jax.eval_shape(zeros)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape), shape)
    add_one = lambda state: jax.tree.map(lambda x: x + 1, state)
    update = jax.jit(add_one, donate_argnums=0)
    with Checkpoints(folder, keep=2) as run:
        if run.steps():
            step, state, meta = run.restore(shape, position)
            arrays = map(np.asarray, jax.tree.leaves(state))
            assert all(np.all(x == step) for x in arrays), "arrays of several steps"
            next_index = position.get_state()["next_index"]
            assert meta["step"] == step == next_index, "parts of several steps"
            assert step == run.steps()[-1], "the newest was not good"
        os.write(ready, step.to_bytes(4, "little"))
        while True:
            state, step = update(state), step + 1
            next(position)
            run.save(step, state, position, {"step": step})

rng = random.Random(seed)
newest, unfinished_saves = 0, 0
for n in range(8):
    out, ready = os.pipe()
    if not (child := os.fork()):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The background jobs of a shell ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            train(ready)
        except KeyboardInterrupt:
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(ready)
    resumed = int.from_bytes(os.read(out, 4), "little")
    assert resumed >= newest, "a checkpoint was lost"
    partial = lambda: [f for f in os.listdir(folder) if "tmp" in f]
    latest = lambda: max((int(f) for f in os.listdir(folder) if f.isdigit()), default=0)
    # Every second kill comes in the middle of a save, the others some time after one.
    while not partial() if n % 2 else latest() <= resumed:
        assert not any(died := os.waitpid(child, os.WNOHANG)), f"died by itself: {died}"
        time.sleep(1e-4)
    time.sleep(0 if n % 2 else rng.uniform(0, 0.25))
    newest = latest()
    unfinished_saves += bool(partial())
    kill = signal.SIGKILL
    number = rng.choice([kill, kill, signal.SIGTERM, signal.SIGINT])
    os.kill(child, number)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(1)
        # Python drops an interrupt that comes while a destructor runs.
        os.kill(child, number)
    status = os.waitstatus_to_exitcode(ended[1])
    assert status in (-number, 0), status
print(newest, unfinished_saves)
"""


def test_killed_at_any_moment(tmp_path):
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-X", "faulthandler", "-c", RUN, folder, "0"]
    ended = subprocess.run(
        command,
        timeout=400,
        capture_output=True,
        text=True,
        env=helpers.code_environment(),
    )
    assert ended.returncode == 0, ended.stderr
    newest, unfinished_saves = map(int, ended.stdout.split())
    # How many there are depends on the machine's speed.
    assert newest >= 4 and unfinished_saves >= 2
    unfinished = folder / "999.orbax-checkpoint-tmp"
    unfinished.mkdir(exist_ok=True)
    shape = jax.eval_shape(lambda: {str(i): jnp.zeros((200, 500)) for i in range(8)})
    leaves = jax.tree.leaves(load_model(tmp_path, shape))
    values = {float(x) for leaf in leaves for x in (leaf.min(), leaf.max())}
    assert len(values) == 1, "arrays of several steps"
    assert unfinished.exists(), "a reader removed a folder"
    with Checkpoints(folder, 2) as run:
        run.restore({"model": shape})
        assert len(run.steps()) in (2, 3)  # 3: killed before the oldest was removed
    assert sorted(int(f.name) for f in folder.iterdir()) == run.steps()


PROCESS = """
import sys
import grain, jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from ladder_jax.checkpoint import Checkpoints

folder, address, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, n)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
full = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
by_rows, by_columns = (NamedSharding(mesh, P(*axes)) for axes in (["x"], [None, "x"]))
w = jax.make_array_from_callback(full.shape, by_rows, lambda index: full[index])
columns = jax.ShapeDtypeStruct(full.shape, full.dtype, sharding=by_columns)
data = lambda: iter(grain.MapDataset.range(100)[n::2].to_iter_dataset())
with Checkpoints(folder, 2) as run:
    position = data()
    for step in range(1, 4):
        for _ in range(step + n):   # the processes are at different positions
            next(position)
        run.save(step, {"model": {"w": w}}, position, {})
    run.wait()
    if n == 0:
        open(f"{folder}/3/meta/data.json", "w").write("garbage")
    multihost_utils.sync_global_devices("damaged")
    resumed = data()
    step, state, _ = run.restore({"model": {"w": columns}}, resumed)
    assert step == 2 and run.steps() == [2, 3]
    for part in state["model"]["w"].addressable_shards:
        assert np.array_equal(part.data, full[part.index])
    assert next(resumed) == n + 2 * (3 + 2 * n)
    run.save(3, state, resumed, {})
print("ok")
"""


@pytest.mark.slow
def test_two_processes_save_together_and_take_the_same_good_checkpoint(tmp_path):
    address = helpers.free_address()
    command = [sys.executable, "-c", PROCESS, tmp_path, address]
    ended = helpers.run_together(
        [[*command, number] for number in range(2)], helpers.code_environment(2)
    )
    for out, err, status in ended:
        assert status == 0 and out.endswith("ok\n"), err
        assert err.count("3 is damaged") == 1
