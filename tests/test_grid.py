"""The grid of plans: its order, how a job goes on, its verdicts, pages and pictures."""

import dataclasses
import os
import time

import pytest
from helpers import ROOT

from ladder_jax.planner import (
    grid,
    grid_job,
    maps,
    recipe_plans,
    survey,
    tables,
    workers,
)
from ladder_jax.planner.grid import Cell, Row

DOCS = ROOT / "docs/overlap"
ROW = Row(
    *("llama3_8b", "v6e:2x4", "decode", 32, 512, 8, "ladder", "auto"),
    reduction="psum",
    step_us=1200.0,
    compute_us=1100.0,
    sent_us=300.0,
    hidden_us=200.0,
    exposed_us=100.0,
    unavoidable_us=20.0,
    jaxlib="0.10.2",
    code="one",
)


def test_a_job_plans_what_failed_and_then_an_even_sample():
    cells = grid.cells()
    assert len(cells) == len(set(cells)) > 5000
    assert cells[: len(grid.CORNERS)] == grid.CORNERS
    assert all(cell.data * cell.fsdp * cell.tensor == 8 for cell in cells)
    first = cells[len(grid.CORNERS) :][:250]
    for name, least in (("target", 7), ("workload", 3), ("recipe", 2)):
        counts = [getattr(cell, name) for cell in first]
        assert len(set(counts)) >= least
    for target in grid.TARGETS:  # none has more than twice its share
        assert 250 / 14 < sum(cell.target == target for cell in first) < 250 / 3.5
    decode = {(one.batch, one.context) for one in first if one.workload == "decode"}
    assert {(1, 256), (1, 32768), (256, 256), (256, 32768)} <= decode


def test_no_recipe_of_a_published_shape_is_forgotten():
    shapes = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert shapes - set(grid.RECIPES) == {"demo", "smollm2_hybrid"}


# ---------------------------------------------------------------- verdicts


def collective(block, **values):
    values = dict(exposed_us=0.0, window_compute_us=9.0, asynchronous=True) | values
    same = dict(kind="collective-permute", axis="tensor", communication_us=3.0)
    return dict(block=block, count=10.0, **same) | values


def test_an_exposed_cell_says_which_collectives_are_waited_for():
    report = dict(
        memory=dict(overlaps=True),
        collectives=[
            collective("forward layer1 mlp"),
            collective("forward layer1 attention", exposed_us=2.0),
            collective(
                "forward layer2 attention", exposed_us=3.0, window_compute_us=0.0
            ),
        ],
    )
    row = grid.judge(ROW, report)
    assert (row.verdict, row.share) == ("exposed", pytest.approx(200 / 280, abs=1e-4))
    assert row.reason == (
        "collective-permute beside forward attention, tensor: 50 us in 20 waits; "
        "10 empty windows, 4.5 us of compute in one on average, 3.0 us sent"
    )
    report["memory"]["overlaps"] = False
    assert "80% of the memory" in grid.judge(ROW, report).reason


@pytest.mark.parametrize(
    "changes, hides",
    [
        (dict(exposed_us=34.0), True),  # 95% of 280 us, and 20 more
        (dict(exposed_us=35.0), False),
        (dict(unavoidable_us=95.0), True),  # within a tenth of it
        (dict(unavoidable_us=299.0), True),  # nothing is hideable
    ],
)
def test_the_bar_is_95_percent_or_a_tenth_of_what_nothing_hides(changes, hides):
    row = grid.judge(
        dataclasses.replace(ROW, **changes),
        dict(memory=dict(overlaps=True), collectives=[collective("mlp")]),
    )
    assert row.hides == hides and (row.verdict == "hidden") == hides
    assert bool(row.reason) != hides


# ---------------------------------------------------------------- the file


def test_rows_are_added_by_several_jobs_and_a_cut_off_one_is_planned_again(tmp_path):
    path = tmp_path / grid.CSV
    assert grid.read(tmp_path) == []
    other = dataclasses.replace(ROW, batch=64, reason='one line, "quoted"')
    for row in (ROW, other):
        tables.append_csv(path, row)
    with path.open("a", encoding="utf-8") as file:
        file.write("llama3_8b,v6e:2x4,deco")  # the process was killed
    assert grid.read(tmp_path) == [ROW, other]
    newer = dataclasses.replace(ROW, step_us=1.0)
    tables.append_csv(path, newer)
    assert grid.read(tmp_path) == [newer, other]
    grid.write(tmp_path, grid.read(tmp_path))
    assert path.read_text("utf-8").count("\n") == 3


# ---------------------------------------------------------------- the job


@pytest.fixture
def job(monkeypatch, tmp_path):
    """A function that runs a job without compilers; returns the planned cells."""
    code = ["one"]
    monkeypatch.setattr(recipe_plans, "code_version", lambda: code[0])

    def results(function, tasks, jobs, limit):
        for number, row in enumerate(tasks):
            planned = dataclasses.replace(row, verdict="hidden", share=1.0)
            yield (row, None, "it crashed") if number == 1 else (row, planned, "")

    monkeypatch.setattr(workers, "results", results)

    def run(*words, version="one"):
        code[0] = version
        args = survey.parse(["grid", *words, "--folder", str(tmp_path)])
        return list(grid_job.run(args))

    return run


def test_a_job_goes_on_where_it_was_stopped(job, tmp_path):
    words = ["--recipes", "llama3_8b", "--corners", "--workloads", "train", "decode"]
    planned = job(*words)
    assert [row.cell for row in planned] == [
        cell
        for cell in grid.CORNERS
        if cell.recipe == "llama3_8b" and cell.workload != "prefill"
    ]
    assert [row.verdict for row in planned[:3]] == ["hidden", "no plan", "hidden"]
    assert planned[1].reason == "it crashed" and planned[0].date
    assert len(grid.read(tmp_path)) == len(planned)
    assert job(*words) == []
    assert len(job(*words, "--targets", "v5p:2x2x2")) == 0
    assert len(job(*words, "--again")) == len(planned)
    assert len(job(*words, version="two")) == len(planned)
    assert job(*words, "--minutes", "0", version="three") == []
    assert len(job("--shapes", "8x512", "--corners")) == 1
    assert {row.tensor for row in job("--tensor", "4", "--shapes", "2x256")} == {4}


def square(task):
    """What a process computes: 3 ends it, 4 never ends."""
    if task == 3:
        os._exit(7)
    while task == 4:
        time.sleep(60)
    return task * task


def test_processes_survive_tasks_that_crash():
    found = {task: result for task, *result in workers.results(square, range(4), 2, 99)}
    assert found == {
        0: [0, ""],
        1: [1, ""],
        2: [4, ""],
        3: [None, "the compiler ended its process: 7"],
    }


def test_a_task_that_does_not_end_is_given_up():
    [(task, result, ended)] = workers.results(square, [4], 1, 0)
    assert (task, result, ended) == (4, None, "the compiler did not end within 0 s")


# ---------------------------------------------------------------- pages and pictures


def test_the_page_of_the_docs_is_that_of_its_rows():
    """If this fails: python -m ladder_jax.planner.survey tables"""
    rows = grid.read(DOCS)
    assert (DOCS / "grid.md").read_text("utf-8") == maps.page(rows)
    assert {one.name for one in maps.pictures(rows)} == {
        path.name for path in DOCS.glob("grid_*.png")
    }
    assert all(row.verdict in grid.VERDICTS for row in rows)
    assert all(row.reason for row in rows if row.verdict != "hidden")


def test_a_picture_has_a_panel_for_each_target_and_mesh():
    rows = [
        dataclasses.replace(ROW, batch=batch, context=context, verdict=verdict)
        for batch in (1, 2, 4, 8, 16, 32)
        for context, verdict in zip((256, 512, 1024, 2048), grid.VERDICTS)
    ]
    [picture] = maps.pictures(rows)
    assert (picture.name, len(picture.rows)) == ("grid_llama3_8b_decode.png", 24)
    panels = maps.figure(picture).axes
    assert len(panels) == len(grid.TARGETS) * 3
    frames = [patch for patch in panels[1].patches if not patch.get_fill()]
    assert len(frames) == 6  # around the exposed ones
    newer = dataclasses.replace(rows[0], jaxlib="0.12.0", share=0.5)
    [picture] = maps.pictures([newer, *rows])
    assert newer in picture.rows and rows[0] not in picture.rows


def test_a_row_is_a_line():
    assert maps.line(grid.judge(dataclasses.replace(ROW, exposed_us=21.0), {})) == (
        "llama3_8b v6e:2x4 decode 32x512, tensor 8, psum: 99.6% hidden, step 1,200 us"
    )
    row = dataclasses.replace(ROW, verdict="no room", reason="20 GB a device, of 16")
    assert maps.line(row).endswith("tensor 8: no room: 20 GB a device, of 16")
    assert row.cell == Cell("llama3_8b", "v6e:2x4", "decode", 32, 512, 1, 1, 8)
