"""Checkpoints: bit-exact round trips onto any mesh, failing saves, damaged files."""

import json
import logging
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import grain
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
        self.value = nnx.Param(
            jnp.arange(dim, dtype=jnp.int32)
        )  # a name that Flax uses itself


class Model(nnx.Module):
    def __init__(self, seed=0, dim=8):
        self.attention = Attention(jax.random.key(seed), dim)
        self.norm = nnx.Param(jnp.linspace(0, 1, 8, dtype=jnp.bfloat16))
        self.blocks = nnx.List([nnx.Param(jnp.full(3, float(seed)))])


def data():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).batch(2).to_iter_dataset())


def make(seed=0, dim=8, optimizer=None):
    model = Model(seed, dim)
    state = (optimizer or optax.adamw(1e-3)).init(
        jax.tree.map(lambda x: x.astype(jnp.float32), model)
    )
    noise = lambda x: (
        x + (jax.random.normal(jax.random.key(seed), x.shape) if x.ndim else seed)
    )
    return {"model": model, "optimizer": jax.tree.map(noise, state)}


def sharding(shape, axes=("data", "tensor")):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, axes)


def abstract(state, mesh=None, spec=lambda x: P()):
    place = lambda x: (
        NamedSharding(mesh, spec(x))
        if mesh
        else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def saved(folder, *steps, keep=9, **kind):
    """A run with a checkpoint at each of `steps`, whose parameters have that seed."""
    with Checkpoints(folder, keep) as run:
        position = data()
        for step in steps:
            next(position)
            run.save(step, make(step, **kind), position, META)
    return folder


def test_round_trip_is_bit_exact_and_goes_on_where_it_was(tmp_path, capfd):
    position, state = data(), make(3)
    for _ in range(3):
        next(position)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as run:
        run.save(3, state, position, META)
        follows = next(position)
        run.wait()
        assert run.steps() == [3]
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as run:
        resumed = data()
        step, restored, meta = run.restore(abstract(state), resumed)
    assert step == 3 and {k: meta[k] for k in META} == META and meta["format"] == 1
    assert_same(restored, state)
    np.testing.assert_array_equal(next(resumed), follows)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 1)])
def test_any_mesh_to_any_mesh(tmp_path, shape):
    state = make(1)
    by_rows = lambda x: P("data") if x.ndim and x.shape[0] % 8 == 0 else P()
    by_columns = lambda x: P(None, "tensor") if x.ndim == 2 else P()
    there = jax.device_put(
        state,
        jax.tree.map(lambda x: x.sharding, abstract(state, sharding((8, 1)), by_rows)),
    )
    with Checkpoints(tmp_path, 1) as run:
        run.save(1, there, data(), META)
        _, here, _ = run.restore(abstract(state, sharding(shape), by_columns))
    assert_same(here, state)
    assert here["model"].attention.wq[...].sharding == NamedSharding(
        sharding(shape), P(None, "tensor")
    )


def test_plain_orbax_reads_the_names(tmp_path):
    saved(tmp_path, 5)
    tree = ocp.load(tmp_path / "5", checkpointable_name="model")
    assert set(tree) == {"attention", "norm", "blocks"} and set(tree["attention"]) == {
        "wq",
        "value",
    }
    assert_same(tree["attention"]["wq"], make(5)["model"].attention.wq[...])
    assert set(ocp.load(tmp_path / "5", checkpointable_name="optimizer")["0"]) == {
        "count",
        "mu",
        "nu",
    }
    assert (
        json.loads((tmp_path / "5" / "meta" / "data.json").read_text())["config"]
        == META["config"]
    )


def test_load_model_reads_only_the_parameters(tmp_path):
    run = saved(tmp_path / "checkpoints", 5, 7).parent
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


def test_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 10, keep=2)
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
        assert np.all(
            np.asarray(load_model(tmp_path, jax.eval_shape(lambda: x), step)["w"])
            == step
        )


def test_a_step_again_and_a_run_that_goes_another_way(tmp_path):
    saved(tmp_path, 2, 4, 6)
    with pytest.raises(
        ValueError, match=r"checkpoints of another run, of steps \[2, 4, 6\]"
    ):
        Checkpoints(tmp_path, 9).save(7, make(0), data(), META)
    with Checkpoints(tmp_path, 9) as run:
        step, state, _ = run.restore(abstract(make()))
        run.save(step, make(99), data(), META)  # the same step: what is there stays
        run.wait()
        assert_same(load_model(tmp_path, jax.eval_shape(Model)), Model(6))
        run.restore(abstract(make()), step=2)
        run.save(3, make(3), data(), META)
        run.wait()
        assert run.steps() == [2, 3]
        run.save(4, make(44), data(), META)
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
    saved(tmp_path, 1, 2, **kind)
    there = {"model": {"dim": 16, "layers": 4}, "optimizer": {}}
    with Checkpoints(tmp_path, 9) as run, pytest.raises(ValueError, match=message):
        run.restore(abstract(make()))
    assert not caplog.records
    with Checkpoints(tmp_path / "b", 9) as run:
        run.save(1, make(), data(), {"config": there})
        with pytest.raises(
            ValueError, match=r"\(model.dim=16 in the checkpoint, 8 here\)"
        ):
            run.restore(
                abstract(make(dim=16)),
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
    return saved(tmp_path_factory.mktemp("two"), 1, 2, dim=128)


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
def test_a_damaged_one_is_reported_and_the_one_before_it_taken(
    two, tmp_path, name, how, caplog, capfd
):
    folder = shutil.copytree(two, tmp_path / "run")
    harm(folder / "2", name, how)
    position, follows = data(), data()
    with Checkpoints(folder, 9) as run:
        step, state, _ = run.restore(abstract(make(dim=128)), position)
        assert step == 1
        assert_same(state, make(1, dim=128))
        next(follows)
        np.testing.assert_array_equal(next(position), next(follows))
        [record] = caplog.records
        assert (
            record.levelno == logging.WARNING and "2 is damaged" in record.getMessage()
        )
        assert "\n" not in record.getMessage()
        with pytest.raises(ValueError, match="2 is damaged: ") as error:
            run.restore(abstract(make(dim=128)), data(), step=2)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr() == ("", "")


def test_a_damaged_one_is_replaced(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    harm(folder / "2", "*", "truncate")
    harm(folder / "2" / "model", "*", "truncate")
    with Checkpoints(folder, 9) as run:
        run.restore(abstract(make(dim=128)))
        run.save(2, make(22, dim=128), None, META)
    assert_same(
        load_model(folder, jax.eval_shape(lambda: Model(dim=128))), Model(22, dim=128)
    )


def test_all_damaged(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    for step in "12":
        harm(folder / step, "model/manifest.ocdbt", "truncate")
    with pytest.raises(
        ValueError, match="1 is damaged: .*; none of 2 checkpoints can be read"
    ):
        load_model(folder, jax.eval_shape(lambda: Model(dim=128)))
    assert read_meta(folder)["config"] == META["config"]


def test_not_a_checkpoint(two, tmp_path):
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
        run.restore(abstract(make()))


def test_positions_of_more_processes_and_of_another_iterator(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    one = folder / "2" / "data" / "process_0-of-1.json"
    one.write_text('{"other": 1}')
    with Checkpoints(folder, 9) as run:
        with pytest.raises(ValueError, match="the data iterator does not fit"):
            run.restore(abstract(make(dim=128)), data())
        one.rename(one.with_name("process_0-of-2.json"))
        with pytest.raises(
            ValueError, match="resume with as many processes as saved them"
        ):
            run.restore(abstract(make(dim=128)), data())


def test_format_of_the_future(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    file = folder / "2" / "meta" / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        read_meta(folder)


@pytest.mark.parametrize(
    "folder", ["/proc/ladder", "{tmp}/file", "{tmp}/file/checkpoints"]
)
def test_a_folder_that_cannot_be_made(tmp_path, folder, capfd):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be written"):
        Checkpoints(folder.format(tmp=tmp_path), 1)
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_told_by_the_next_call_and_harms_no_other(tmp_path, capfd):
    state = {"model": {"w": jax.random.normal(jax.random.key(0), (512, 512))}}
    run = Checkpoints(tmp_path, 9)
    run.save(1, state, data(), META)
    run.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # files cannot grow beyond, as on a full disk
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
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "1",
        "3",
        "4",
    ]  # what failed is cleared away


def test_a_folder_lost_during_the_run(tmp_path, capfd):
    folder = tmp_path / "run"
    run = Checkpoints(folder, 9)
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(OSError, match="/1 could not be written: "):
        run.save(1, make(), data(), META)
        run.wait()  # on a busy machine it may be told here
    run.close()
    assert capfd.readouterr() == ("", "")


def test_random_keys_and_scalars(tmp_path):
    state = {
        "model": {
            "key": jax.random.key(3),
            "step": jnp.int32(7),
            "b": jnp.array([True, False]),
        }
    }
    with Checkpoints(tmp_path, 1) as run:
        run.save(1, state, None, {})
        _, restored, _ = run.restore(abstract(state, sharding((2, 4))))
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
def test_a_folder_of_any_other_name_works(tmp_path, name):
    folder = saved(tmp_path / name / "checkpoints", 1, 2)
    with Checkpoints(folder, 9) as run:
        step, state, _ = run.restore(abstract(make()), data())
    assert step == 2
    assert_same(state, make(2))
    assert_same(load_model(tmp_path / name, jax.eval_shape(Model)), Model(2))


@pytest.mark.parametrize("name", ["a[b]", "a[", "a*", "a?b", "a\\b"])
def test_a_folder_whose_name_is_a_pattern_is_refused_before_anything_is_made(
    tmp_path, name
):
    folder = tmp_path / name / "checkpoints"
    with pytest.raises(ConfigError, match="is not accepted: it must be a path without"):
        Checkpoints(folder, 1)
    with pytest.raises(ConfigError, match="^train.out='"):
        checkpoint.require_plain_name(tmp_path / name, "train.out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_read_from_a_folder_that_was_given_a_patterns_name(tmp_path):
    saved(tmp_path / "plain", 1)
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
    """It is an error at the next call, and the good one before it is not removed."""
    run = Checkpoints(tmp_path, 1)
    run.save(1, make(1), data(), META)
    run.wait()
    run.save(2, make(2), data(), META)
    run._checkpointer.wait()  # written, and not yet read back
    harm(tmp_path / "2", name, "delete")
    with pytest.raises(OSError, match="/2 could not be written: .*") as error:
        run.save(3, make(3), data(), META)
    assert "\n" not in str(error.value)
    assert_same(load_model(tmp_path, jax.eval_shape(Model), step=1), Model(1))
    run.save(2, make(22), data(), META)  # the run goes on, and replaces it
    run.close()
    assert_same(load_model(tmp_path, jax.eval_shape(Model)), Model(22))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]


# ---------------------------------------------------------------- two jobs, one folder


def test_checkpoints_of_another_job_stop_the_run_and_stay(tmp_path):
    with Checkpoints(tmp_path, 1) as run:
        run.save(2, make(2), data(), META)
        run.wait()
        for step in "15":  # what another job wrote
            shutil.copytree(tmp_path / "2", tmp_path / step)
        with pytest.raises(OSError, match=r"steps \[1, 5\], which another job wrote"):
            run.save(3, make(3), data(), META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "5"]


def test_surplus_checkpoints_of_another_job_are_not_removed(tmp_path):
    with Checkpoints(tmp_path, 1) as run:
        run.save(2, make(2), data(), META)
        run.wait()
        shutil.copytree(tmp_path / "2", tmp_path / "another")
        run.save(3, make(3), data(), META)
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
    sys.stdin.readline()            # taken for dead: the job was requeued meanwhile
    run.save(2, state, None, {})
"""


def test_a_job_that_was_taken_for_dead_leaves_its_successors_checkpoints(tmp_path):
    """Two processes: the first hangs, the second resumes, then the first goes on."""
    first = subprocess.Popen(
        [sys.executable, "-c", ZOMBIE, tmp_path],
        text=True,
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"XLA_FLAGS": ""},
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
    # after the fork: their threads would not survive it
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

choose = random.Random(seed)
newest, middle = 0, 0
for n in range(8):
    out, ready = os.pipe()
    if not (child := os.fork()):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # a shell's background jobs ignore it
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
    # in the middle of a save, or some time after one
    while not partial() if n % 2 else latest() <= resumed:
        assert not any(died := os.waitpid(child, os.WNOHANG)), f"died by itself: {died}"
        time.sleep(1e-4)
    time.sleep(0 if n % 2 else choose.uniform(0, 0.25))
    newest = latest()
    middle += bool(partial())
    kill = signal.SIGKILL
    sent = choose.choice([kill, kill, signal.SIGTERM, signal.SIGINT])
    os.kill(child, sent)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(1)
        # Python drops an interrupt that falls into a destructor
        os.kill(child, sent)
    status = os.waitstatus_to_exitcode(ended[1])
    assert status in (-sent, 0), status
print(newest, middle)
"""


def test_killed_at_any_moment(tmp_path):
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-X", "faulthandler", "-c", RUN, folder, "0"]
    ended = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        timeout=400,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert ended.returncode == 0, ended.stderr
    newest, middle = map(int, ended.stdout.split())
    assert newest >= 4 and middle >= 2  # how far it came depends on the machine's speed
    left = folder / "999.orbax-checkpoint-tmp"
    left.mkdir(exist_ok=True)
    shape = jax.eval_shape(lambda: {str(i): jnp.zeros((200, 500)) for i in range(8)})
    model = load_model(tmp_path, shape)
    assert (
        len(
            {
                float(x)
                for leaf in jax.tree.leaves(model)
                for x in (leaf.min(), leaf.max())
            }
        )
        == 1
    )
    assert left.exists()  # a reader clears nothing away
    with Checkpoints(folder, 2) as run:
        run.restore({"model": shape})
        assert len(run.steps()) in (2, 3)  # 3: killed before the third was removed
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
        for _ in range(step + n):                       # each process is elsewhere
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
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path, address, str(n)],
            text=True,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for n in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0 and out.endswith("ok\n"), err
        assert err.count("3 is damaged") == 1
