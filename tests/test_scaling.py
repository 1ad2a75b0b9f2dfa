"""The survey of recipes from 8 to 4096 chips: what it plans, and its table."""

import ast
import dataclasses
import re

import pytest
from helpers import ROOT

from ladder_jax.config import ConfigError, Mesh, from_recipe
from ladder_jax.hardware import chips, cost
from ladder_jax.planner import scaling

CSV = ROOT / "docs/overlap/scaling.csv"
PAGE = ROOT / "docs/scaling.md"


def recipe(name):
    return from_recipe(str(ROOT / f"configs/{name}.py"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_recipe_is_planned_on_the_hardware_that_its_docstring_names():
    for name, (kind, count, other) in scaling.HARDWARE.items():
        text = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
        found = re.search(r"Hardware: +(\d+) (?:NVIDIA|TPU) (\w+) of", text)
        assert (int(found[1]), found[2].lower()) == (count, kind)
        mesh = recipe(name).mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == count and other != kind
        where = scaling.machine(kind, count)
        assert scaling.mesh_of(recipe(name), count, where) == Mesh(
            mesh.data, mesh.fsdp, mesh.tensor
        )
    names = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert names - {"demo", "smollm2_hybrid"} == set(scaling.HARDWARE)


def test_machines_are_nodes_or_as_few_slices_as_there_can_be():
    assert scaling.machine("h100", 64) == ("h100:8x8", 1)
    assert scaling.machine("v5p", 1024) == ("v5p:8x8x16", 1)
    assert scaling.machine("v5e", 4096) == ("v5e:16x16", 16)
    with pytest.raises(ConfigError, match="chips=72 is not accepted: no slice of v5e"):
        scaling.machine("v5e", 72)


def test_data_takes_the_rest_and_tensor_grows_where_there_are_too_few_sequences():
    big, small = recipe("llama3_70b"), recipe("scratch_1b")
    mesh = lambda config, kind, chips: scaling.mesh_of(
        config, chips, scaling.machine(kind, chips)
    )
    assert mesh(big, "v5p", 4096) == Mesh(16, 32, 8)
    assert mesh(big, "v5p", 64) == Mesh(1, 8, 8)
    assert mesh(small, "v5e", 4096) == Mesh(256, 8, 2)
    largest = recipe("llama3_405b")
    assert mesh(largest, "v5p", 64) == Mesh(1, 4, 16)
    assert mesh(largest, "h100", 64) == Mesh(1, 8, 8)  # tensor within a node
    # As many sequences at once as on the recipe's mesh, or fewer.
    assert scaling.parts_of(big, Mesh(1, 8, 8)) == 64
    assert scaling.parts_of(big, Mesh(16, 32, 8)) == 1
    assert scaling.parts_of(small, Mesh(1, 8, 1)) == 32


def test_every_row_that_is_planned_divides_evenly():
    args = scaling.parse([])
    rows = list(scaling.wanted(args))
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.chips == row.data * row.fsdp * row.tensor
        at_once = row.batch // row.parts
        assert at_once * row.parts == row.batch
        assert at_once % (row.data * row.fsdp) == 0 and row.data % row.slices == 0
    own = [row for row in rows[:16]]
    assert {row.recipe for row in own} == set(scaling.HARDWARE)
    assert len(list(scaling.wanted(scaling.parse(["--chips", "64"])))) == 32


ROW = scaling.row_of("llama3_8b", "h100", 64, "ladder")


def test_the_survey_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    version = ["one"]
    monkeypatch.setattr(scaling.recipe_plans, "code_version", lambda: version[0])
    step = lambda row: dataclasses.replace(row, step_ms=100.0, fits="yes")
    monkeypatch.setattr(scaling, "plan_row", step)

    def planned(*words):
        args = scaling.parse([*words, "--file", str(tmp_path / "rows.csv")])
        return [(row.chips, row.schedule) for row in scaling.survey_rows(args)]

    words = ["--recipes", "llama3_8b", "--kinds", "h100"]
    both = [(64, "ladder"), (64, "standard")]
    assert planned(*words, "--chips", "64") == both
    assert len(planned(*words)) == 6 and planned(*words) == []
    version[0] = "two"
    assert planned(*words) == []
    assert planned(*words, "--chips", "64", "--again") == both
    rows = scaling.read(tmp_path / "rows.csv")
    assert [row.code for row in rows] == ["one", "one", "two", "two", *["one"] * 4]


def test_a_sum_between_slices_goes_around_a_ring_through_the_hosts():
    chip = chips.CHIPS["v5e"]
    assert cost.between_slices_s(chip, 1e9, 1) == 0
    assert cost.between_slices_s(chip, 1e9, 2) == pytest.approx(8 / 25)
    assert cost.between_slices_s(chip, 1e9, 16) == pytest.approx(8 / 25 * 15 / 8)


def test_the_table_has_ladders_rows_and_standards_step_beside_them():
    row = dataclasses.replace(
        ROW,
        needed_gb=30.25,
        fits="yes",
        step_ms=2000.0,
        exposed_ms=12.0,
        mfu=0.45,
        tokens_per_s=2.1e6,
    )
    standard = dataclasses.replace(row, schedule="standard", step_ms=2100.0)
    large = dataclasses.replace(ROW, target="h100:1x8", fits="no", needed_gb=99.0)
    lines = scaling.table([row, standard, large]).splitlines()
    assert lines[2:] == [
        "| llama3_8b | 64: h100:8x8 | 8 x 1 x 8, 8 | 30.2 | yes | 2,000 | 12 "
        "| 45.0% | 2,100,000 | 1.05 |",
        "| llama3_8b | 8: h100:1x8 | 8 x 1 x 8, 8 | 99.0 | no |  |  |  |  |  |",
    ]


def test_the_table_of_the_docs_is_that_of_its_rows():
    """If this fails: python -m ladder_jax.planner.scaling --table"""
    page = PAGE.read_text("utf-8")
    assert scaling.with_table(page, scaling.read(CSV)) == page


@pytest.mark.parametrize("name", scaling.HARDWARE)
def test_a_recipes_docstring_has_the_step_that_is_planned_for_its_hardware(name):
    """Within 2%, and the MFU within a point. If this fails: write the new plan's step
    and MFU into the line `Time:`.
    """
    text = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
    kind, count, _ = scaling.HARDWARE[name]
    where = scaling.machine(kind, count)
    [row] = [
        row
        for row in scaling.read(CSV)
        if (row.recipe, row.target, row.slices) == (name, *where)
        and row.schedule != "standard"
    ]
    step, mfu = re.search(r"Time: .* of (\S+) s, an MFU of (\d+)%: mod", text).groups()
    assert float(step) == pytest.approx(row.step_ms / 1e3, rel=0.02)
    assert int(mfu) == pytest.approx(100 * row.mfu, abs=1)


def test_every_recipe_fits_its_hardware_and_has_a_step():
    rows = {
        (row.recipe, row.schedule == "standard", row.target): row
        for row in scaling.read(CSV)
    }
    for name, (kind, count, _) in scaling.HARDWARE.items():
        target = scaling.machine(kind, count).target
        for standard in (False, True):
            row = rows[name, standard, target]
            assert row.fits == "yes" and 0 < row.mfu < 1, row
            assert row.compute_ms + row.exposed_ms == pytest.approx(
                row.step_ms, rel=0.01
            )
