"""The conversion study: its runs, rows and table; and all of it with a tiny parent."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from ladder_jax import model, saving, train_programs
from ladder_jax.bench import conversion, conversion_report, conversion_text
from ladder_jax.config import ConfigError, to_dict
from ladder_jax.data import tokenizer


def arguments(**fields):
    own = dict(parent="parent", batch=2, length=8, seeds=2, budgets=(0, 30, 64))
    return conversion.Arguments(**own | fields)


def test_the_control_comes_first_and_every_kind_once_a_seed():
    plan = conversion.runs(arguments(layers=("last:2", "all"), rates=(1e-3, 1e-2)))
    assert [run[:2] for run in plan[:4]] == [
        ("none", "sft"),
        ("last:2", "sft"),
        ("last:2", "distill"),
        ("last:2", "anneal"),
    ]
    assert plan[4][:2] == ("all", "distill") and len(set(plan)) == len(plan)
    assert sum(run.seed == 1 for run in plan) == 1 + 2 * 3
    assert {run.rate for run in plan if run.seed == 1} == {1e-3}
    assert {run.total for run in plan} == {64}
    longer = conversion.runs(arguments(long_budgets=(100,), seeds=1))
    assert {run.total for run in longer} == {64, 96}


class FakeStudy:
    """A study whose blended model has the losses that a test gives."""

    def __init__(self, losses=(), **fields):
        self.arguments = arguments(anneal=0.4, **fields)
        self.losses, self.seen = iter(losses), []

    def blended_loss(self, parameters, freshness):
        self.seen.append(freshness.tolist())
        return next(self.losses)


STATE = train_programs.State(None, None)


def delays(study, method, steps=10, first=0, state=None):
    """The share of the fresh stream in every step, and the delay's state at the end."""
    run = conversion.Run("last:1", method, 0, 1e-3, 80)
    delay = conversion.Delay(study, run, np.float32([1, 1, 0, 0]), 10, state)
    shares = []
    for step in range(first, steps):
        delay.before_step(step, STATE)
        shares.append(delay.share(step))
        delay.after_step()
    return shares, delay.state()


def test_the_delay_is_annealed_block_by_block():
    study = FakeStudy()
    run = conversion.Run("last:1", "anneal", 0, 1e-3, 80)
    delay = conversion.Delay(study, run, np.float32([1, 1, 0, 0]), 10, None)
    assert delay.freshness(0).tolist() == [1, 1, 1, 1]
    delay.after_step()
    assert delay.freshness(1).tolist() == [1, 1, 0.75, 0.75]
    assert delays(study, "anneal")[0] == [1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0]
    assert delays(study, "distill")[0] == [0] * 10 and not study.seen


def test_the_gate_waits_for_the_held_out_loss_and_goes_on_where_it_stopped():
    losses = [2.0, 2.3, 2.1, 2.0]
    options = dict(tolerance=0.2, gate_every=2)
    study = FakeStudy(losses, **options)
    shares, state = delays(study, "gated")
    # It waits after step 2, and goes on after step 4.
    assert shares == [1, 0.75, 0.5, 0.5, 0.5, 0.25, 0, 0, 0, 0]
    assert [seen[2] for seen in study.seen] == [1, 0.5, 0.5]
    study = FakeStudy(losses, **options)
    first, state = delays(study, "gated", steps=4)
    again, _ = delays(study, "gated", first=4, state=json.loads(json.dumps(state)))
    assert first + again == shares
    # However long it waits, the last step has the whole delay.
    shares, _ = delays(FakeStudy([2.0] + [9.0] * 9, **options), "gated")
    assert shares == [1, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(methods=("dream",)), "methods='dream'"),
        (dict(budgets=(0,)), "budgets"),
        (dict(tolerance=-1.0), "tolerance=-1.0"),
        (dict(gate_every=0), "gate_every=0"),
        (dict(task_limit=0), "task_limit=0"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ConfigError, match=message):
        arguments(**fields)


def row(run, tokens, value):
    names = ("bits_per_byte", "loss", "divergence")
    kinds = ("documentation", "notices")
    values = {f"{kind}_{name}": value for kind in kinds for name in names}
    return dict(**run._asdict(), tokens=tokens, tokens_per_s=1.0, **values)


def test_rows_survive_a_restart_and_are_replaced(tmp_path):
    control, seed_one = (conversion.Run("none", "sft", s, 1e-3, 64) for s in (0, 1))
    rows = conversion_report.Rows(tmp_path / "rows.csv")
    for each, value in ((control, 1.0), (seed_one, 1.5)):
        for tokens in (0, 64):
            rows.add(row(each, tokens, value))
    rows.add(row(control, 64, 1.25))
    rows = conversion_report.Rows(tmp_path / "rows.csv")
    assert len(rows.rows) == 4 and rows.complete(control._asdict())
    assert not rows.complete(control._replace(total=96)._asdict())
    table = conversion_report.table(rows.rows)
    assert "| the parent, next token (control) | 1.2500 ± 0.2500 | 1.3750" in table
    rows.remove(seed_one._asdict())
    assert len(conversion_report.Rows(tmp_path / "rows.csv").rows) == 2


def test_rows_with_other_columns_and_accuracies(tmp_path):
    converted, control = (
        conversion.Run(layers, "sft", 0, 1e-3, 64) for layers in ("last:1", "none")
    )
    rows = conversion_report.Rows(tmp_path / "rows.csv")
    rows.add(row(control, 32, 1.5))
    scores = dict(words_accuracy=0.5, words_accuracy_stderr=0.01)
    for each in (control, converted):
        for tokens in (0, 64):
            rows.add(row(each, tokens, 1.0) | scores)
    rows.add(row(converted._replace(seed=1), 64, 1.0) | scores | {"words_accuracy": 1})
    rows.add(row(converted, 32, 1.0))
    again = conversion_report.Rows(tmp_path / "rows.csv").rows
    assert [bool(conversion_report.accuracies(x)) for x in again] == [
        0,
        1,
        1,
        1,
        1,
        1,
        0,
    ]
    table = conversion_report.task_table(again)
    assert "| the parent | 0.00M | 0.500 ± 0.010 |" in table
    assert "| last:1, untrained | 0.00M | 0.500 ± 0.010 |" in table
    assert "(control); rate 0.001 | 0.00M | 0.500 ± 0.010 |" in table
    assert "| last:1, next token; rate 0.001 | 0.00M | 0.750 ± 0.010 |" in table
    assert conversion_report.task_table(again[:1]) == ""


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    first = arguments(parent="p", tasks=("ladder_local",), task_limit=5)
    conversion_report.require_same(tmp_path, first.settings())
    more = dataclasses.replace(first, seeds=9, minutes=1.0, methods=("gated",))
    conversion_report.require_same(tmp_path, more.settings())
    other = dataclasses.replace(first, task_limit=None)
    with pytest.raises(ConfigError, match="task_limit=None .* with 5; keep that"):
        conversion_report.require_same(tmp_path, other.settings())


def test_the_texts_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_text, "documentation", lambda: iter("ab"))
    monkeypatch.setattr(conversion_text, "notices", lambda: iter("c"))
    folders = conversion_text.write(tmp_path)
    assert [p.read_text() for p in sorted(folders["documentation"].iterdir())] == [
        "a",
        "b",
    ]
    monkeypatch.setattr(conversion_text, "documentation", lambda: 1 / 0)
    assert conversion_text.write(tmp_path) == folders


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The arguments of a study with a tiny parent."""
    tiny.write_corpus(tmp_path / "corpus")
    texts = [path.read_text() for path in sorted((tmp_path / "corpus").iterdir())] * 4
    texts = [f"{number} {text}" for number, text in enumerate(texts)]
    monkeypatch.setattr(conversion_text, "documentation", lambda: iter(texts))
    monkeypatch.setattr(conversion_text, "notices", lambda: iter(texts))
    shape = tiny.make(tmp_path, model_residual="standard")
    own = tokenizer.ByteTokenizer().to_json()
    meta = dict(config=to_dict(shape), tensor=1, tokenizer=own)
    parameters = model.init(shape.model, jax.random.key(0))
    with saving.Checkpoints(tmp_path / "parent", keep=1) as checkpoints:
        checkpoints.save(0, dict(model=parameters), None, meta)
    return conversion.Arguments(
        parent=str(tmp_path / "parent"),
        out=str(tmp_path / "study"),
        budgets=(0, 512, 1024),
        layers=("last:1", "auto:1"),
        methods=("sft", "distill", "gated"),
        gate_every=1,
        tolerance=0.05,
        seeds=1,
        batch=8,
        length=32,
        rates=(3e-3,),
        measured_tokens=256,
        chunk=0,
        save=True,
    )


@pytest.mark.slow
def test_a_stopped_study_goes_on_with_the_same_numbers(study, tmp_path, monkeypatch):
    conversion.run(study)
    out = tmp_path / "study"
    whole = (out / "rows.csv").read_text().splitlines()
    assert len(whole) == 1 + 7 * 3
    assert "control" in (out / "table.md").read_text()
    assert (out / "plot.png").exists() and not list((out / "state").iterdir())

    class Killed(Exception):
        pass

    def kill(self, *_):
        save(self, *_)
        raise Killed

    # A killed process: after the first save of its state, in the middle of a run.
    save = conversion.Saver.save
    (out / "rows.csv").rename(out / "old.csv")
    with monkeypatch.context() as patch:
        patch.setattr(conversion.Saver, "save", kill)
        with pytest.raises(Killed):
            conversion.run(study)
    conversion.run(study)
    speed = whole[0].split(",").index("tokens_per_s")
    train_loss = whole[0].split(",").index("train_loss")

    def numbers(lines):
        cells = [line.split(",") for line in lines]
        return [
            [c for i, c in enumerate(r) if i not in (speed, train_loss)] for r in cells
        ]

    again = (out / "rows.csv").read_text().splitlines()
    assert sorted(numbers(again)) == sorted(numbers(whole))
