"""The quality study: virtual shards are real ones, and the study can be cut short."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import FAST, random_parameters, small_model
from model_cases import BATCH, assert_same, case_model, reference_of

from ladder_jax.bench import quality, quality_results, virtual_shards
from ladder_jax.bench.quality import Arguments, Variant
from ladder_jax.bench.quality_results import Run
from ladder_jax.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("fast_compiler")

RUN = Run(
    size="tiny",
    schedule="standard",
    layers=6,
    shards=4,
    seed=0,
    tokens=1000,
    batch=4,
    length=16,
    learning_rate=1e-3,
    dtype="float32",
    tokenizer="bytes",
    corpus="c0ffee",
    parameters=10,
    held_out_loss=2.0,
    bits_per_byte=2.9,
)


@pytest.mark.parametrize("name", ["dtp:1", "desync:2"])
def test_virtual_shards_are_the_reference_on_as_many_ranks(name):
    model_config = case_model(name, layers=2, qk_norm=True)
    program = jax.jit(
        lambda p, batch: virtual_shards.loss_and_gradients(
            Config(model=model_config), 4, p, batch
        ),
        compiler_options=FAST,
    )
    assert_same(
        program(random_parameters(model_config), BATCH),
        reference_of(model_config, 4),
        2e-5,
        name,
    )


def trained(study, variant, seed):
    """A run without training: worse for every later schedule, better for a seed."""
    loss = 2.0 + 0.1 * study.variants.index(variant) - 0.01 * seed
    return dataclasses.replace(
        study.row(variant, seed),
        held_out_loss=loss,
        parameters=9,
        device="test",
        curve=quality_results.curve(loss + 1 / np.arange(1, 8)),
    )


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that runs the study with these arguments; the runs that it did."""
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} of the corpus. " * 9)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = []

    def train(self, variant, seed):
        done.append((variant.schedule, variant.layers, seed))
        return trained(self, variant, seed)

    monkeypatch.setattr(quality.Study, "train", train)
    defaults = dict(
        size="tiny",
        tokens=4096,
        source=str(tmp_path / "text"),
        held_out_fraction=0.3,
        out=str(tmp_path / "out"),
    )

    def run(**changes):
        done.clear()
        quality.run(Arguments(**{**defaults, **changes}))
        return list(done)

    run.out = tmp_path / "out"
    return run


def test_a_study_runs_each_seed_of_all_schedules_before_the_next_and_only_once(study):
    first = study(seeds=2, schedules=("standard", "dtp:1", "iso"))
    assert [name for name, _, _ in first] == ["standard", "dtp:1", "ladder"] * 2
    assert [seed for _, _, seed in first] == [0, 0, 0, 1, 1, 1]
    assert first[2][1] == 7, "12122 us over 9935 us of 6 layers"
    assert study(seeds=2, schedules=("standard", "dtp:1", "iso")) == []
    more = study(seeds=3, schedules=("standard", "parallel"))
    assert [(name, seed) for name, _, seed in more] == [
        ("parallel", 0),
        ("parallel", 1),
        ("standard", 2),
        ("parallel", 2),
    ]
    assert len(study(seeds=1, schedules=("standard",), tokens=8192)) == 1
    page = (study.out / "results.md").read_text()
    assert page.count("## tiny") == 2 and "| ladder, 7 layers | 7 |" in page
    assert "| dtp:1 | 6 | 9 | 2 | 2.0950 ± 0.0071 | +0.1000 ± 0.0000 |" in page
    names = {path.name for path in study.out.iterdir()}
    plots = {f"tiny_{n}{kind}.png" for n in (1, 2) for kind in ("", "_curves")}
    assert names == {"runs.csv", "results.md", *plots}
    assert all(f"]({plot})" in page for plot in plots)


def test_a_study_that_is_killed_keeps_its_finished_runs(study, monkeypatch):
    fake = quality.Study.train

    def killed(self, variant, seed):
        if variant.schedule == "ladder":
            raise KeyboardInterrupt
        return fake(self, variant, seed)

    monkeypatch.setattr(quality.Study, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        study(seeds=1)
    assert len(quality_results.read(study.out / "runs.csv")) == 2
    monkeypatch.setattr(quality.Study, "train", fake)
    assert [name for name, _, _ in study(seeds=1)][0] == "ladder"


def test_a_real_run_trains_a_model_of_virtual_shards(study, monkeypatch, tmp_path):
    """A seed gives the same loss again; a run past the budget is dropped."""
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    small = small_model(vocab_size=320, layers=2, heads=4, kv_heads=4)
    size = quality.SIZES["tiny"]._replace(model=small)
    monkeypatch.setitem(quality.SIZES, "tiny", size)
    arguments = Arguments(
        size="tiny",
        tokens=6 * 64,
        batch=2,
        length=32,
        source=str(tmp_path / "text"),
        held_out_fraction=0.3,
        out=str(study.out),
        schedules=("dtp:1",),
    )
    one = quality.Study(arguments, print)
    variant = Variant("dtp:1", 2)
    first, again = one.train(variant, 0), one.train(variant, 0)
    assert first.steps == 6 and first.tokens == 384 and len(first.losses) == 6
    assert first.held_out_loss == again.held_out_loss and np.isfinite(first.train_loss)
    one.arguments = dataclasses.replace(arguments, minutes=1e-9)
    with pytest.raises(quality.OutOfTime):
        one.train(variant, 1)


def test_a_curve_is_the_means_of_equal_parts_of_a_run():
    run = dataclasses.replace(RUN, curve=quality_results.curve(range(1000)))
    assert len(run.losses) == 50
    assert run.losses[0] == 9.5 and run.losses[-1] == 989.5
    assert RUN.losses == [], "a row of before there were curves"


def test_runs_read_back_as_written_and_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "runs.csv"
    quality_results.write(path, [RUN])
    assert quality_results.read(path) == [RUN]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"runs.csv is not a file of the quality st"):
        quality_results.read(path)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(size="huge"), "size='huge' is not accepted: it must be among tiny, m3"),
        (dict(seeds=0), "seeds=0 is not accepted"),
        (dict(minutes=-1.0), "minutes=-1.0 is not accepted"),
        (dict(shards=3), "shards=3 is not accepted: .*a divisor of the size's 4 heads"),
        (dict(schedules=("dtp",)), "schedules='dtp' is not accepted"),
        (dict(plans="nowhere"), "plans='nowhere' has no plans of standard and ladder"),
        (dict(dtype="int8"), "dtype='int8' is not accepted"),
    ],
)
def test_a_wrong_argument_is_one_line(study, changes, says):
    with pytest.raises(ConfigError, match=says) as error:
        study(**changes)
    assert "\n" not in str(error.value)
