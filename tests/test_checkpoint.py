"""Checkpoints: bit-exact round trips onto any mesh and from any folder; misfits."""

import json
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import (
    META,
    Model,
    abstract,
    assert_same,
    data,
    make_state,
    save_steps,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from ladder_jax import checkpoint
from ladder_jax.checkpoint import load_model, read_meta
from ladder_jax.config import ConfigError
from ladder_jax.saving import Checkpoints


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
