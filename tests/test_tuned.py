"""The table of reductions: how it is made, and that "auto" reads and obeys it."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_tpu
from helpers import slice_of
from jax.sharding import PartitionSpec as P

from ladder_jax.config import ConfigError, Decode, Mesh, Model, from_recipe
from ladder_jax.hardware import chips
from ladder_jax.planner import command, planning, tune, workers
from ladder_jax.planner.arguments import PlanArguments
from ladder_jax.residual import choose, reductions, tuned
from ladder_jax.residual.tuned import Trial
from ladder_jax.serve import design
from ladder_jax.sharding import make_mesh

MODEL = Model(
    vocab_size=1024,
    dim=256,
    heads=8,
    kv_heads=8,
    head_dim=32,
    ffn_dim=512,
    residual="ladder",
)
PSUM = Trial(
    *("v5p", 8, "ladder", 256, 512, "rows"),
    *(16, 512, 16, "psum", 100.0, 9.0, "0.10.2"),
)
DIRECT = dataclasses.replace(PSUM, reduction="direct", step_us=90.0)


def message(rows, tokens=1, width=256, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((rows, tokens, width), dtype)


def of_rows(trial, rows, **changes):
    return dataclasses.replace(trial, batch=rows, rows=rows, **changes)


# ---------------------------------------------------------------- the shipped table

SHIPPED = tuned.read(tuned.PATH)
SLICES = {"v5e": (2, 4, 1), "v6e": (2, 4, 1), "v5p": (2, 2, 2), "tpu7x": (2, 2, 2)}


MESSAGES = sorted({(*one.model, one.rows) for one in SHIPPED})


def test_the_package_has_its_table():
    assert len(MESSAGES) >= 25


@pytest.mark.parametrize("key", MESSAGES, ids=lambda key: "-".join(map(str, key)))
def test_auto_takes_the_least_of_what_is_nowhere_slower_than_psum(key, monkeypatch):
    """Every message of the shipped table, from the file to the reduction in use."""
    chip, tensor, schedule, dim, ffn_dim, layout, rows = key
    network = slice_of(chip, *SLICES[chip])
    monkeypatch.setattr(choose, "network_of", lambda devices: network)
    monkeypatch.setattr(chips, "kind_of", lambda device: chip)
    model = dataclasses.replace(MODEL, dim=dim, ffn_dim=ffn_dim, residual=schedule)
    mesh = make_mesh(Mesh(data=1, tensor=tensor), jax.devices()[:tensor])
    auto = choose.auto_reduction.__wrapped__(model, mesh, layout)
    taken = auto.name_for(message(rows, width=dim))

    steps = {}
    for one in SHIPPED:
        if (*one.model, one.rows) == key:
            steps.setdefault(one.reduction, {})[one.step] = one.step_us
    psum = steps["psum"]
    assert len(steps) > 1 and all(each.keys() == psum.keys() for each in steps.values())
    assert all(0 < steps[taken][at] <= psum[at] for at in psum)
    safe = [
        each for each in steps.values() if all(0 < each[at] <= psum[at] for at in psum)
    ]
    total = lambda each: math.fsum(math.log(each[at]) for at in psum)
    assert total(steps[taken]) <= min(map(total, safe)) + 1e-9


@pytest.mark.slow
@needs_tpu
def test_a_shipped_row_is_what_the_compiler_does_today():
    """8B on v6e at 32 x 512, where the formula is wrong: psum and the formula's."""
    config = from_recipe("configs/llama3_8b.py")
    request = planning.make_request(
        config, "v6e:2x4", batch=32, context=512, tensor=8, kv_layout="rows"
    )
    shipped = {one.key: one for one in SHIPPED}
    planned = {}
    for task in tune.tasks(request):
        row = planned[task.trial.reduction] = tune.plan_trial(task)
        assert row.step_us == pytest.approx(shipped[row.key].step_us, rel=0.01)
    assert planned["psum"].step_us < 0.95 * planned["recursive-doubling"].step_us
    auto = planning.plan_of(request).report
    assert auto["reduction"] == "psum"
    assert auto["totals"]["step_us"] == pytest.approx(planned["psum"].step_us)


# ---------------------------------------------------------------- auto reads it


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that writes a table, and gives "auto" on emulated TPU v5p."""
    monkeypatch.setattr(tuned, "PATH", tmp_path / "tuned.csv")
    monkeypatch.setattr(choose, "network_of", lambda devices: slice_of("v5p", 2, 2, 2))
    monkeypatch.setattr(chips, "kind_of", lambda device: "v5p")

    def auto(*trials, layout="rows", **model):
        if trials:
            tune.write(trials, tuned.PATH)
        tuned._choices.cache_clear()
        mesh = make_mesh(Mesh(data=1, tensor=8), jax.devices()[:8])
        model_config = dataclasses.replace(MODEL, **model)
        return choose.auto_reduction.__wrapped__(model_config, mesh, layout)

    yield auto
    tuned._choices.cache_clear()


def test_auto_takes_what_was_tuned_and_the_formula_elsewhere(machine):
    formula = machine()
    auto = machine(PSUM, DIRECT)
    assert auto.name_for(message(16)) == "direct" != formula.name_for(message(16))
    for other in (
        message(15),
        message(17),
        message(1, tokens=16),
        message(16, width=8),
    ):
        assert auto.name_for(other) == formula.name_for(other) != "direct"


def test_between_two_of_the_table_it_is_what_both_take_or_psum(machine):
    formula, trials = machine(), [PSUM, DIRECT]
    for rows, step in ((24, 99.0), (256, 101.0)):
        trials += [of_rows(PSUM, rows), of_rows(DIRECT, rows, step_us=step)]
    auto = machine(*trials)
    assert {auto.name_for(message(rows)) for rows in (16, 17, 23, 24)} == {"direct"}
    # From 64 KiB on, 128 rows here, XLA:TPU runs psum asynchronously.
    assert {auto.name_for(message(rows)) for rows in (128, 255, 256)} == {"psum"}
    for other in (message(15), message(25), message(127), message(257)):
        assert auto.name_for(other) == formula.name_for(other) != "direct"


def test_rows_and_pages_have_choices_of_their_own(machine):
    paged = [dataclasses.replace(one, layout="pages") for one in (PSUM, DIRECT)]
    paged[1] = dataclasses.replace(paged[1], step_us=101.0)
    trials = [PSUM, DIRECT, *paged]
    assert machine(*trials).name_for(message(16)) == "direct"
    assert machine(*trials, layout="pages").name_for(message(16)) == "psum"


@pytest.mark.parametrize(
    "model",
    [dict(ffn_dim=1024), dict(dtype="float32"), dict(residual="hybrid:last2")],
)
def test_the_table_is_of_models_of_its_size_dtype_and_schedule(machine, model):
    dtype = model.get("dtype", "bfloat16")
    auto = machine(PSUM, DIRECT, **model)
    assert auto.name_for(message(16, dtype=dtype)) != "direct"


@pytest.mark.parametrize(
    "direct, expected",
    [
        ({512: 90.0, 2048: 100.0}, "direct"),  # as fast as psum in one step
        ({512: 50.0, 2048: 100.1}, "psum"),  # slower in one step
        ({512: 50.0, 2048: 0.0}, "psum"),  # XLA does not compile one step
        ({512: 90.0}, "direct"),  # the job was cut off: what it has is compared
        ({}, None),
        ({512: 98.0, 2048: 98.0}, "recursive-doubling"),  # 95 and 100: less on average
    ],
)
def test_a_choice_is_nowhere_slower_than_psum(direct, expected):
    trials = [dataclasses.replace(PSUM, context=context) for context in (512, 2048)]
    trials += [
        dataclasses.replace(DIRECT, context=context, step_us=step)
        for context, step in direct.items()
    ]
    if expected == "recursive-doubling":
        trials += [
            dataclasses.replace(PSUM, context=context, reduction=expected, step_us=step)
            for context, step in ((512, 95.0), (2048, 100.0))
        ]
    assert tuned.fastest(trials) == expected
    assert tuned.fastest([one for one in trials if one.reduction != "psum"]) is None


def test_the_program_sends_what_the_table_says(machine):
    """Direct exchange is 2 rounds of 7 messages; the formula's doubling is 3."""
    mesh = make_mesh(Mesh(data=1, tensor=8), jax.devices()[:8])
    x = jnp.arange(8 * 16 * 256, dtype=jnp.bfloat16).reshape(8 * 16, 1, 256) % 3

    def summed(auto):
        function = jax.shard_map(
            lambda x: reductions.reduce(x, auto),
            mesh=mesh,
            in_specs=P("tensor"),
            out_specs=P(None),
            check_vma=False,
        )
        return str(jax.make_jaxpr(function)(x)).count("ppermute["), function(x)

    sent, expected = summed(machine())
    assert sent == 3
    sent, total = summed(machine(PSUM, DIRECT))
    assert sent == 14
    assert (total == expected).all()


@pytest.mark.parametrize("layout", ["rows", "pages"])
def test_an_engine_asks_for_the_choice_of_its_cache(layout, monkeypatch):
    def reduction_for(name, model_config, mesh, layout="rows"):
        return f"{name} of {layout}"

    monkeypatch.setattr(choose, "reduction_for", reduction_for)
    mesh = make_mesh(Mesh(data=1, tensor=1), jax.devices()[:1])
    options = Decode(slots=2, max_length=64, kv_layout=layout)
    assert design.design(MODEL, mesh, options).spec.reduction == f"auto of {layout}"


def test_a_named_reduction_has_the_program_that_auto_has(machine):
    """What v5p needs beside the name: the last round of short messages tied."""
    mesh = make_mesh(Mesh(data=1, tensor=8), jax.devices()[:8])
    auto = machine(PSUM, DIRECT)
    named = choose.reduction_for("direct", MODEL, mesh)
    assert named[1:] == auto[1:] and named.ties_last(message(8))
    assert named.name_for(message(500)) == "direct"
    assert named is choose.reduction_for("direct", MODEL, mesh)


# ---------------------------------------------------------------- a damaged table

HEAD = ",".join(field.name for field in dataclasses.fields(Trial))
LINE = "v5p,8,ladder,256,512,rows,16,512,16,direct,90.0,9.0,0.10.2"


@pytest.mark.parametrize(
    "text, problem",
    [
        (f"{HEAD}\n{LINE[:-7]}\n", "line 2 has not 13 values"),
        (f"{HEAD}\n{LINE}\n{LINE},1\n", "line 3 has not 13 values"),
        (f"{HEAD}\n{LINE.replace('direct', 'fastest')}\n", "reduction='fastest' is"),
        (f"{HEAD}\n{LINE.replace('256', 'wide')}\n", "line 2: invalid literal for int"),
        (f"{HEAD}\n{LINE.replace('90.0', 'inf')}\n", "step_us is no time"),
        (f"{HEAD}\n{LINE.replace(',16,direct', ',0,direct')}\n", "rows is below 1"),
        (f"{HEAD}\n{LINE}\n{LINE}\n", "line 3 has the same program as another"),
        ("recipe,target,step_us\nllama3_8b,v5p,1\n", "its columns are not chip,tensor"),
        ("\x00\n\x00", "its columns are not chip,tensor"),
        ("", "its columns are not chip,tensor"),
        (b"\xff\xfe\x00", "codec can't decode"),
    ],
)
def test_a_damaged_or_foreign_table_is_one_clear_line(machine, text, problem):
    data = text if isinstance(text, bytes) else text.encode()
    tuned.PATH.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        machine()
    assert "\n" not in str(error.value) and problem in str(error.value)
    assert str(error.value).startswith(f"the table of reductions {tuned.PATH} cannot")


# ---------------------------------------------------------------- how it is made


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """A function that runs --tune, with steps in place of compilers."""
    steps, planned = {}, []

    def results(function, tasks, jobs, limit):
        for task in tasks:
            row = task.trial
            planned.append(row)
            step = steps.get((row.reduction, row.batch, row.context), 100.0)
            if step is KeyboardInterrupt:
                raise step
            done = dataclasses.replace(row, step_us=step)
            yield (task, done, "") if step else (task, None, "it did not end")

    monkeypatch.setattr(workers, "results", results)
    monkeypatch.setattr(tune, "TPU", ("psum", "recursive-doubling", "direct"))
    monkeypatch.setattr(tuned, "PATH", tmp_path / "tuned.csv")
    devices = lambda self, taken=0: list(range(8))
    monkeypatch.setattr("ladder_jax.hardware.aot.Target.devices", devices)
    monkeypatch.setattr(planning, "check_fit", lambda requests: None)

    def run(target="v5p:2x2x2", **changes):
        words = dict(recipe="configs/llama3_8b.py", target=target, tensor=8, tune=True)
        words |= dict(sweep=("batch=1,2,16", "context=512,2048"), kv_layout="rows")
        words |= changes
        config = from_recipe("configs/llama3_8b.py")
        return command.run(config, PlanArguments(**words)).text

    return SimpleNamespace(steps=steps, planned=planned, run=run)


def test_tuning_writes_every_trial_and_shows_what_auto_takes(tuning, capsys):
    tuning.steps |= {
        ("direct", 1, 512): 50.0,
        ("direct", 2, 2048): 101.0,  # its message has two rows, as a lone request's
        ("recursive-doubling", 1, 512): 90.0,
        ("recursive-doubling", 16, 512): 0.0,
        ("direct", 16, 512): 99.0,
    }
    lines = tuning.run().splitlines()
    rows = tuned.read(tuned.PATH)
    assert len(rows) == 3 * 2 * 3 == len(tuning.planned)
    assert {(row.batch, row.rows) for row in rows} == {(1, 2), (2, 2), (16, 16)}
    assert (
        "rows of 16x512, recursive-doubling: it did not end" in capsys.readouterr().out
    )
    assert "modelled" in lines[0]
    keys = "chip tensor layout batch context".split()
    assert lines[1].split() == [*keys, *tune.TPU]
    line = next(line for line in lines if line.split()[3:5] == ["16", "512"])
    assert "no plan" in line and "*99 (0)" in line
    line = next(line for line in lines if line.split()[3:5] == ["1", "512"])
    assert "*90 (0)" in line and " 50 (0)" in line
    assert lines[-1] == f"written to {tuned.PATH}"


def test_a_job_that_was_cut_off_goes_on(tuning, monkeypatch):
    tuning.steps["recursive-doubling", 1, 512] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tuning.run()
    done = tuned.read(tuned.PATH)
    assert {row.reduction for row in done} == {"psum"} and len(done) == 6
    tuning.planned.clear()
    tuning.steps.clear()
    tuning.run()
    assert len(tuning.planned) == 12 and len(tuned.read(tuned.PATH)) == 18
    tuning.run()
    assert len(tuning.planned) == 12
    # Another compiler plans all again, in place of the old rows.
    monkeypatch.setattr("jaxlib.__version__", "9.0")
    tuning.run()
    assert len(tuning.planned) == 30
    assert {row.jaxlib for row in tuned.read(tuned.PATH)} == {"9.0"}


def test_auto_is_both_layouts_of_the_cache(tuning):
    tuning.steps |= {("direct", 16, 512): 90.0}
    words = dict(sweep=("batch=16",), context=512)
    tuning.run(kv_layout="pages", **words)
    assert {row.layout for row in tuning.planned} == {"pages"}
    lines = tuning.run(kv_layout="auto", **words).splitlines()
    assert len(tuning.planned) == 2 * len(tune.TPU)
    assert [line.split()[2] for line in lines[2:4]] == ["rows", "pages"]


def test_on_other_chips_a_lone_row_is_one(tuning):
    tuning.run("tpu7x:2x2x1", sweep=("batch=1", "context=512"))
    assert {row.rows for row in tuning.planned} == {1}
    tuning.run("h100:1x8", sweep=("batch=1", "context=512"))
    assert [row.reduction for row in tuning.planned[-2:]] == ["psum", "one-shot"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(compare=True), "leave out --compare"),
        (dict(json=True), "leave out --json"),
        (dict(reduction="psum"), "leave out the reduction"),
        (dict(sweep=("reduction=psum,direct",)), "leave out the reduction"),
        (dict(schedule="standard"), "schedules with delays, not of 'standard'"),
        (dict(workload="prefill"), "of decode steps"),
    ],
)
def test_options_that_have_no_table_are_refused(tuning, changes, message):
    with pytest.raises(ConfigError, match=message):
        tuning.run(**changes)
    assert not tuning.planned and not tuned.PATH.exists()


def test_a_table_that_cannot_be_written_is_one_line(tuning, monkeypatch):
    def replacing(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ladder_jax.files.replacing", replacing)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        tuning.run()
    assert not tuning.planned
