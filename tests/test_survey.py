"""The survey of plans: its rows, its tables in docs/overlap, how it goes on."""

import dataclasses

import pytest
from helpers import ROOT

from ladder_jax.planner import calibrate, hints, recipe_plans, records, survey
from ladder_jax.planner.records import Record

DOCS = ROOT / "docs/overlap"
ROW = Record(
    recipe="llama3_8b",
    target="v5e:2x4",
    workload="decode",
    batch=16,
    context=2048,
    tensor=8,
    schedule="ladder",
    mesh_reduction="auto",
    reduction="psum",
    step_us=1234.5,
    compute_us=1200.0,
    sent_us=100.0,
    hidden_us=65.5,
    exposed_us=34.5,
    unavoidable_us=20.0,
    jaxlib="0.10.2",
    date="2026-11-21",
    code="abc",
)


def test_the_tables_of_the_docs_are_those_of_their_rows():
    """If this fails: python -m ladder_jax.planner.survey tables"""
    expected = records.markdown_files(records.read(DOCS))
    expected["published.md"] = calibrate.page()
    for name, text in expected.items():
        assert (DOCS / name).read_text("utf-8") == text, name


def test_the_rows_of_the_docs_have_a_plan_each_and_add_up():
    rows = records.read(DOCS)
    assert len({row.key for row in rows}) == len(rows) > 100
    for row in rows:
        assert row.step_us > 0 and not row.error, row
        assert row.hidden_us + row.exposed_us == pytest.approx(row.sent_us, abs=2), row
        if not row.target.startswith("h100"):  # there, kernels slow each other down
            total = row.compute_us + row.exposed_us
            assert total == pytest.approx(row.step_us, abs=2), row


def test_rows_survive_the_file(tmp_path):
    failed = dataclasses.replace(ROW, batch=64, error="too large, by far", step_us=0.0)
    records.write(tmp_path, [failed, ROW])
    assert records.read(tmp_path) == [ROW, failed]
    table = (tmp_path / "decode.md").read_text("utf-8").splitlines()
    assert table[-2:] == [
        "| llama3_8b, v5e:2x4 | 16x2048 | ladder, psum (auto) | 1,234 | 1,200 | 100 | "
        "66 | 34 | 20 | 82% | 0.10.2 |",
        "| llama3_8b, v5e:2x4 | 64x2048 | ladder: too large, by far |  |  |  |  |  |  |"
        " - | 0.10.2 |",
    ]
    assert records.read(tmp_path / "nothing") == []


def test_the_hideable_share_is_of_what_could_be_hidden():
    assert ROW.hidden_share == pytest.approx(65.5 / 80)
    lucky = dataclasses.replace(ROW, exposed_us=10.0)
    assert lucky.hidden_share == 1.0
    nothing = dataclasses.replace(ROW, unavoidable_us=99.5)
    assert nothing.hidden_share is None


def test_schedules_stand_side_by_side_where_there_are_several():
    standard = dataclasses.replace(
        ROW, schedule="standard", mesh_reduction="psum", step_us=2469.0
    )
    others = [
        dataclasses.replace(standard, schedule=name, step_us=2000.0)
        for name in ("parallel", "desync:2")
    ]
    alone = records.markdown_files([ROW, standard, *others[:1]])["schedules.md"]
    assert "## " not in alone
    text = records.markdown_files([ROW, standard, *others])["schedules.md"]
    assert "## llama3_8b, v5e:2x4, batch 16, context 2048" in text
    assert text.splitlines()[-4:] == [
        line
        for line in text.splitlines()
        if line.startswith(("| standard", "| parallel", "| ladder", "| desync"))
    ]
    assert (
        "| ladder, psum (auto) | 1,234 | 1,200 | 100 | 66 | 34 | 20 | 2.000 |" in text
    )


@pytest.fixture
def surveyed(monkeypatch, tmp_path):
    """A function that runs the survey without compilers; returns the planned rows."""
    code = ["one"]
    monkeypatch.setattr(recipe_plans, "code_version", lambda: code[0])
    monkeypatch.setattr(
        survey,
        "plan_record",
        lambda record, request, all_reduce: dataclasses.replace(
            record, reduction="psum", step_us=100.0 * request.batch
        ),
    )

    def run(*arguments, version="one"):
        code[0] = version
        args = survey.parse([*arguments, "--folder", str(tmp_path)])
        return [(row.target, row.batch, row.schedule) for row in survey.survey(args)]

    return run


def test_the_survey_goes_on_where_it_was_stopped(surveyed):
    decode = ["decode", "--recipes", "llama3_8b", "--targets", "v5e:2x4"]
    assert surveyed(*decode, "--shapes", "1x2048") == [("v5e:2x4", 1, "ladder")]
    rest = [("v5e:2x4", 16, "ladder"), ("v5e:2x4", 64, "ladder")]
    assert surveyed(*decode) == rest
    assert surveyed(*decode) == []
    assert surveyed(*decode, "--shapes", "1x2048", "--again") == [
        ("v5e:2x4", 1, "ladder")
    ]
    assert len(surveyed(*decode, version="two")) == 3


def test_the_survey_compares_schedules_with_a_row_for_each(surveyed, tmp_path):
    planned = surveyed("compare")
    rows = records.read(tmp_path)
    assert len(planned) == len(rows) == 3 * 9 + 8
    fast = [row for row in rows if row.all_reduce_us]
    assert [(row.target, row.all_reduce_us) for row in fast] == [
        ("h100:1x8", 7.8),
        ("h100:1x8", 10.0),
    ] * 3
    assert (tmp_path / "schedules.md").read_text("utf-8").count("\n## ") == 4


def test_a_shape_that_is_none_is_one_line(surveyed):
    with pytest.raises(
        ValueError, match="shapes='4' is not accepted: it must be batch"
    ):
        surveyed("decode", "--recipes", "llama3_8b", "--shapes", "4")


def test_the_version_of_the_code_ignores_docstrings(tmp_path):
    def version(text):
        (tmp_path / "model.py").write_text(text, encoding="utf-8")
        return recipe_plans.code_version(tmp_path)

    first = version('def f(x):\n    """Adds one."""\n    return x + 1\n')
    assert version("def f(x):\n    # One more.\n    return (x + 1)\n") == first
    assert version("def f(x):\n    return x + 2\n") != first
    for pattern in recipe_plans.HASHED_FILES:
        assert list(recipe_plans.PACKAGE.glob(pattern)), f"{pattern} names no file"


@pytest.mark.parametrize("which", ["none", "forward", "carried", "all"])
def test_hints_can_be_taken_away_and_come_back(which):
    """What they buy is planned with the compilers alone: the names must exist."""
    from ladder_jax.residual import overlap, stream

    before = overlap.AsyncReduction.progress, stream.backward_reduction
    with hints.only(which):
        during = overlap.AsyncReduction.progress, stream.backward_reduction
        assert (during[0] is before[0]) == (which != "none")
        assert (during[1] is before[1]) == (which in ("carried", "all"))
    assert (overlap.AsyncReduction.progress, stream.backward_reduction) == before
