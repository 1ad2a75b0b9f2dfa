"""The conversion study measures tasks of lm-eval before and after training."""

import dataclasses

import pytest
import tiny
import tiny_llama
from helpers import ROOT

from ladder_jax import load
from ladder_jax.bench import conversion, conversion_report, conversion_text
from ladder_jax.bench.conversion_tasks import Tasks
from ladder_jax.config import ConfigError
from ladder_jax.convert import command, ladderize
from ladder_jax.evaluation import tasks

TASKS = str(ROOT / "configs" / "eval")
NAMES = ("docs_last_word", "docs_sentence", "minimal_pairs")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tiny_llama.save(tmp_path_factory.mktemp("llama"))
    out = tmp_path_factory.mktemp("runs") / "parent"
    command.run(command.FromHf(str(folder), str(out)))
    return out


def arguments(parent, **fields):
    own = dict(parent=str(parent), tasks=("ladder_local",), task_path=TASKS)
    return conversion.Arguments(**own | dict(task_limit=4, batch=8, length=32) | fields)


def test_accuracy_is_that_of_the_converted_checkpoint(parent, tmp_path):
    loaded = load(parent)
    study = arguments(parent)
    measured = Tasks(study, loaded.config.model, loaded.tokenizer, loaded.mesh)
    scores = measured.scores(loaded.model, "hybrid:last1", trained=False)
    out = str(tmp_path / "converted")
    command.run(ladderize.Ladderize(str(parent), out, layers="last:1"))
    results = tasks.evaluate(load(out), study.tasks, include_path=(TASKS,), limit=4)
    expected = tasks.accuracies(results)
    assert sorted(expected) == sorted(NAMES)
    for name, (accuracy, error) in expected.items():
        assert scores[f"{name}_accuracy"] == accuracy
        assert scores[f"{name}_accuracy_stderr"] == error
    # Untrained models with one schedule are measured once, also after a restart.
    again = Tasks(study, loaded.config.model, loaded.tokenizer, loaded.mesh)
    again.remember([dict(tokens="0", residual="hybrid:last1") | scores])
    assert again.scores(None, "hybrid:last1", trained=False) == scores
    with pytest.raises(ConfigError, match="tasks='ladder_loca'"):
        Tasks(
            dataclasses.replace(study, tasks=("ladder_loca",)),
            loaded.config.model,
            loaded.tokenizer,
            loaded.mesh,
        )


def test_a_study_with_tasks_and_the_gate(parent, tmp_path, monkeypatch):
    texts = [
        path.read_text()
        for path in sorted(tiny.write_corpus(tmp_path / "corpus").iterdir())
    ]
    texts = [f"{number} {text}" for number, text in enumerate(texts * 4)]
    monkeypatch.setattr(conversion_text, "documentation", lambda: iter(texts))
    monkeypatch.setattr(conversion_text, "notices", lambda: iter(texts))
    study = arguments(
        parent,
        out=str(tmp_path / "study"),
        budgets=(0, 512),
        layers=("last:1",),
        methods=("gated",),
        gate_every=1,
        seeds=1,
        measured_tokens=256,
        save=True,
    )
    conversion.run(study)
    rows = conversion_report.Rows(tmp_path / "study" / "rows.csv").rows
    assert [row["method"] for row in rows] == ["sft", "sft", "gated", "gated"]
    for row in rows:
        assert sorted(conversion_report.accuracies(row)) == sorted(NAMES)
    table = (tmp_path / "study" / "table.md").read_text()
    assert "| last:1, distillation, annealed with the gate; rate 0.0003 |" in table
    # The same command again measures nothing.
    monkeypatch.setattr(conversion, "train_run", lambda *_: pytest.fail("it trains"))
    conversion.run(study)
