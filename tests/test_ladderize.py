"""`ladder-jax convert ladderize`: the layers chosen, the measurement, the files."""

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from helpers import FAST, make_mesh, random_parameters, small_model
from jax import lax
from model_cases import assert_same, packed_batch

from ladder_jax import checkpoint, cli, loading, model, objective, schedule, sharding
from ladder_jax.config import ConfigError
from ladder_jax.convert import damage, ladderize

pytestmark = pytest.mark.usefixtures("fast_compiler")

BATCH = packed_batch()


# ---------------------------------------------------------------- one program


def loss_of(model_config, mesh, **options):
    """(parameters, batch, extras) -> (mean loss, gradients)."""
    specs = sharding.parameter_specs(model.abstract(model_config))

    def local(parameters, batch, extras):
        weight = lax.psum(batch["weights"].sum(), sharding.BATCH_AXES)
        loss, gradients = jax.value_and_grad(
            lambda m: model.loss(m, model_config, batch, **options, **extras) / weight
        )(parameters)
        total = lax.psum(loss, sharding.BATCH_AXES)
        return total, sharding.sum_gradients(gradients, specs)

    batch_specs = dict.fromkeys(BATCH, sharding.TOKENS)
    inputs = (specs, batch_specs, sharding.REPLICATED)
    mapped = sharding.shard_map(local, mesh, inputs, (sharding.REPLICATED, specs))
    return jax.jit(mapped, compiler_options=FAST)


@pytest.mark.parametrize(
    "notation, layers, mesh, options",
    [
        ("standard", [], (1, 1, 2), {}),
        ("hybrid:1", [1], (2, 2, 2), dict(remat="full")),
        ("hybrid:0,2-3", [0, 2, 3], (1, 1, 2), dict(chunk=5)),
        ("ladder", [0, 1, 2, 3], (1, 2, 1), dict(unroll=True)),
    ],
)
def test_a_freshness_for_every_block_makes_every_hybrid(
    notation, layers, mesh, options
):
    """Loss and gradients of the ladder program are those of the hybrid's own."""
    mesh = make_mesh(*mesh)
    parameters = random_parameters(small_model(layers=4))
    own = loss_of(small_model(notation, layers=4), mesh)(parameters, BATCH, {})
    extras = dict(freshness=damage.freshness_of(4, layers))
    ladder = loss_of(small_model("ladder", layers=4), mesh, **options)
    assert_same(ladder(parameters, BATCH, extras), own, 1e-5, notation)


def test_a_freshness_for_every_block_of_a_list_of_layers():
    """Layers in a list, as in decoding, take the same freshness."""
    mesh, ladder = make_mesh(), small_model("ladder", layers=3)
    parameters = random_parameters(ladder)
    freshness = np.float32([0.3, 1, 0, 0.5, 0.9, 0.2])

    def local(parameters, freshness):
        arrays = (BATCH[name] for name in ("tokens", "positions", "segments"))
        x, _ = model.hidden(parameters, ladder, *arrays, freshness=freshness)
        return x

    results = []
    for unstacked in (False, True):
        function = lambda p, f, u=unstacked: local(model.unstack(p) if u else p, f)
        spec = sharding.REPLICATED
        mapped = sharding.shard_map(function, mesh, (spec, spec), spec)
        results.append(jax.jit(mapped, compiler_options=FAST)(parameters, freshness))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def test_damage_is_what_separate_models_lose():
    mesh = make_mesh(1, 2, 2)
    ladder = small_model("ladder", layers=4)
    parameters = random_parameters(ladder, mesh)
    batches = [{name: np.asarray(BATCH[name]) for name in objective.BATCH_FIELDS}] * 2
    loss = damage.hybrid_loss(parameters, ladder, mesh, batches, chunk=5)
    standard, damages = damage.measure(loss, 4)
    own = loss_of(small_model(layers=4), mesh)(parameters, BATCH, {})[0]
    assert standard == pytest.approx(float(own), rel=1e-5)
    for layer, value in enumerate(damages):
        hybrid = small_model(f"hybrid:{layer}", layers=4)
        own = loss_of(hybrid, mesh)(parameters, BATCH, {})[0]
        assert standard + value == pytest.approx(float(own), rel=1e-5)


def test_the_cheapest_layers():
    damages = [0.3, 0.1, -0.2, 0.1]
    assert damage.cheapest(damages, 2) == [1, 2], "of equals the first"
    calls = []

    def loss(layers):
        """Layers 0 and 3 are cheap alone, and dear together."""
        calls.append(layers)
        return sum([0.1, 0.3, 0.4, 0.2][i] for i in layers) + 5 * ({0, 3} <= {*layers})

    assert damage.cheapest_together(loss, 4, 2, print) == [0, 1]
    assert len(calls) == 4 + 3
    text = damage.table(2.5, damages, [2])
    assert "2.5000" in text and "2* -0.2000" in text and "1  +0.1000" in text


# ---------------------------------------------------------------- notation


@pytest.mark.parametrize(
    "layers, notation",
    [
        ([0, 1, 2, 3, 4, 5], "ladder"),
        ([5], "hybrid:last1"),
        ([3, 4, 5], "hybrid:last3"),
        ([0], "hybrid:0"),
        ([0, 1, 3, 5], "hybrid:0-1,3,5"),
        ([1, 2, 3], "hybrid:1-3"),
    ],
)
def test_the_notation_of_chosen_layers(layers, notation):
    assert ladderize.notation_of(reversed(layers), 6) == notation
    blocks = schedule.parse(notation, 6).layers
    assert [i for i, pair in enumerate(blocks) if pair[0].delay] == layers


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder, a corpus, and a run of a parallel model."""
    path = tmp_path_factory.mktemp("ladderize")
    tiny.write_corpus(path / "corpus")
    for name, residual in (("run", "standard"), ("parallel", "parallel")):
        shape = tiny.make(path, model_residual=residual)
        optimizer = dict(count=np.zeros(3))
        tiny.save(
            path / name / "checkpoints",
            shape,
            steps=(3, 7),
            others=dict(optimizer=optimizer),
            tensor=2,
            corpus=[1, 2],
        )
    return path


def convert(*words):
    return cli.run(["convert", "ladderize", *map(str, words)])


@pytest.mark.parametrize(
    "options, notation",
    [
        (["--layers", "last:1"], "hybrid:last1"),
        (["--layers", "0"], "hybrid:0"),
        (["--layers", "all"], "ladder"),
        (["--layers", "0-1"], "ladder"),
        (["--residual", "delays:0,1,2,1"], "delays:0,1,2,1"),
    ],
)
def test_only_the_schedule_changes(folder, tmp_path, options, notation):
    assert convert(folder / "run", tmp_path / "new", *options) == 0
    before, after = (loading.load(path) for path in (folder / "run", tmp_path / "new"))
    assert after.config.model.residual == notation
    for old, new in zip(jax.tree.leaves(before.model), jax.tree.leaves(after.model)):
        np.testing.assert_array_equal(old, new)
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    step = tmp_path / "new" / "checkpoints" / "0"
    assert not (step / "optimizer").exists()
    meta = checkpoint.read_meta(tmp_path / "new")
    assert "corpus" not in meta and meta["converted_from"]["residual"] == "standard"
    assert checkpoint.read_meta(folder / "run")["parts"] == ["model", "optimizer"]


def test_files_are_links_and_the_original_may_go(folder, tmp_path):
    assert convert(folder / "run", tmp_path / "a", "--layers", "last:1") == 0
    files = [p for p in (tmp_path / "a").rglob("*") if p.is_file()]
    linked = [p for p in files if p.stat().st_nlink > 1]
    assert len(linked) > len(files) / 2
    assert convert(tmp_path / "a", tmp_path / "b", "--layers", "all") == 0
    for path in sorted((tmp_path / "a").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert loading.load(tmp_path / "b").config.model.residual == "ladder"


def test_copies_where_there_are_no_links(folder, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_link)
    assert convert(folder / "run", tmp_path / "a", "--layers", "last:1") == 0
    assert loading.load(tmp_path / "a").config.model.residual == "hybrid:last1"


@pytest.mark.parametrize("greedy", [[], ["--greedy"]])
def test_auto_measures_and_says_on_what(folder, tmp_path, capfd, greedy):
    options = ["--layers", "auto:1", "--data", folder / "corpus", "--tokens", 600]
    options += ["--length", 64, "--token-cache", tmp_path / "cache", *greedy]
    options += ["--held-out-fraction", 0.2]
    assert convert(folder / "run", tmp_path / "new", *options) == 0
    out = capfd.readouterr().out
    assert "held-out tokens of data" in out and "together add" in out
    chosen = loading.load(tmp_path / "new").config.model.residual
    (marked,) = re.findall(r"\b(\d+)\*", out)
    assert chosen == ladderize.notation_of([int(marked)], 2)


MISTAKES = [
    ([], "give one of --layers and --residual"),
    (["--layers", "last:3"], "K from 1 to 2"),
    (["--layers", "last:0"], "K from 1 to 2"),
    (["--layers", "auto:x"], "K from 1 to 2"),
    (["--layers", "5"], "layers='5' is not accepted"),
    (["--layers", "1-0"], "layers='1-0' is not accepted"),
    (["--layers", "first"], "layers='first' is not accepted"),
    (["--layers", "all", "--residual", "ladder"], "give one of"),
    (["--residual", "parallel"], "residual='parallel' is not accepted"),
    (["--residual", "desync:2"], "residual='desync:2' is not accepted"),
    (["--residual", "delays:1"], "residual='delays:1' is not accepted"),
    (["--layers", "auto:1", "--tokens", "0"], "tokens=0"),
    (["--layers", "auto:1", "--length", "4096"], "length=4096"),
    (["--layers", "auto:1", "--data", "/nowhere"], "data.source='/nowhere'"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    folder, tmp_path, capfd, options, message
):
    assert convert(folder / "run", tmp_path / "new", *options) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_sources_and_folders_that_do_not_fit(folder, tmp_path, capfd):
    assert convert(folder / "parallel", tmp_path / "new", "--layers", "all") == 2
    assert "one norm a layer" in capfd.readouterr().err
    assert convert(tmp_path / "none", tmp_path / "new", "--layers", "all") == 2
    assert "does not exist" in capfd.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert convert(folder / "run", tmp_path / "full", "--layers", "all") == 2
    assert "exists already" in capfd.readouterr().err
    inside = folder / "run" / "checkpoints" / "3" / "new"
    options = ["--layers", "all", "--step", "3"]
    assert convert(folder / "run", inside, *options) == 2
    assert "it is inside of the checkpoint" in capfd.readouterr().err
    assert not inside.exists()


@pytest.mark.parametrize("change", ["no parameters", "a tokenizer of no kind"])
def test_a_damaged_checkpoint_is_not_made_another(folder, tmp_path, capfd, change):
    shutil.copytree(folder / "run", tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "3"
    if change == "no parameters":
        shutil.rmtree(step / "model")
    else:
        meta = step / "meta" / "data.json"
        values = json.loads(meta.read_text()) | dict(tokenizer="x")
        meta.write_text(json.dumps(values))
    options = ["--layers", "all", "--step", "3"]
    assert convert(tmp_path / "run", tmp_path / "new", *options) == 1
    assert capfd.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_step_that_is_named(folder, tmp_path):
    options = ["--layers", "all", "--step", "3"]
    assert convert(folder / "run", tmp_path / "new", *options) == 0
    meta = json.loads((tmp_path / "new/checkpoints/0/meta/data.json").read_text())
    assert meta["converted_from"]["checkpoint"].endswith("/3")
    with pytest.raises(ConfigError, match="step 4"):
        checkpoint.find(folder / "run", 4)
