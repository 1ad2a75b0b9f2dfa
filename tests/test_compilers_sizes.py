"""Published shapes, planned by the compilers of TPUs and GPUs: the bar of docs/overlap.md,
docs/scaling.md and the cells of the grid. Most are slow; `make test` runs the others.
"""

# ruff: noqa: E501  the tests' names are long
import dataclasses

import jax
import pytest
from compilers import hides, needs_gpu, needs_tpu
from helpers import ROOT

from ladder_jax.config import Mesh, from_recipe
from ladder_jax.hardware import aot
from ladder_jax.planner import grid, grid_job, plan, recipe_plans, report, scaling

# The bar at full size. Of v6e's prefill of 4x2048 tokens the program is read by jaxlib 0.12 alone.
SLICES, RECIPES = (
    ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "h100:1x8"),
    ("llama3_8b", "llama3_70b"),
)
SHAPES = [
    *(("decode", batch, 2048) for batch in (1, 16, 64)),
    ("prefill", 1, 1024),
    ("prefill", 4, 2048),
    ("train", 1, 2048),
]
FULL = [
    *(
        (recipe, target, *shape)
        for recipe in RECIPES
        for target in SLICES
        for shape in SHAPES
        if jax.__version_info__ >= (0, 12)
        or (target, *shape) != ("v6e:2x4", "prefill", 4, 2048)
    ),
    *(
        ("llama3_8b", target, "decode", 512, 2048)
        for target in ("v5e:16x16", "v5p:8x8x8")
    ),
]


@pytest.mark.slow
@needs_tpu
@needs_gpu
@pytest.mark.parametrize("recipe, target, workload, batch, context", FULL)
def test_full_sizes_hide_what_can_be_hidden(recipe, target, workload, batch, context):
    config = from_recipe(f"configs/{recipe}.py")
    config = dataclasses.replace(config, mesh=Mesh(data=-1, tensor=8, reduction="auto"))
    compiled = plan.build(
        plan.Request(recipe, config, aot.parse(target), workload, batch, context)
    )
    result = report.make_report(compiled, report.make_timeline(compiled))
    assert hides(result), result["totals"]


@pytest.mark.slow
@needs_tpu
@needs_gpu
@pytest.mark.parametrize("recipe", scaling.HARDWARE)
def test_every_recipes_step_fits_the_hardware_that_its_docstring_names(recipe):
    """It compiles as it is, with its mesh, its parts and its remat."""
    kind, chips, _ = scaling.HARDWARE[recipe]
    row = scaling.plan_row(scaling.row_of(recipe, kind, chips, "ladder"))
    assert not row.error and row.fits == "yes" and row.step_ms > 0, row
    mesh = from_recipe(f"configs/{recipe}.py").mesh
    assert (row.data, row.fsdp, row.tensor) == (mesh.data, mesh.fsdp, mesh.tensor)
    assert 0.19 < row.mfu < 0.6, row  # the least is 176B's, between 32 nodes


def planned_again(row):
    """A row of docs/overlap/grid.csv, planned in this process."""
    again = grid_job.plan_row(
        dataclasses.replace(row, verdict="", reason="", share=0.0)
    )
    assert again.verdict, row
    return again


def cells_of_the_grid(cells):
    """The rows of docs/overlap/grid.csv of these cells, by this jaxlib."""
    rows = {
        row.cell: row
        for row in grid.read(ROOT / "docs/overlap")
        if "auto" in row.key and row.jaxlib == recipe_plans.jaxlib_version()
    }
    return [rows[cell] for cell in cells if cell in rows]


# Two of the cells that hid half: a lone row, and a cache so short that XLA estimates no time for a message.
LONE = [
    grid.Cell(recipe, "v5p:2x2x2", "decode", 1, context, 1, 1, 8)
    for recipe, context in (("llama3_8b", 512), ("llama3_70b", 1024))
]


@needs_tpu
@pytest.mark.parametrize("cell", LONE, ids=str)
def test_a_lone_row_with_a_short_cache_hides_what_can_be_hidden(cell):
    [row] = cells_of_the_grid([cell])
    again = planned_again(row)
    assert again.verdict == row.verdict == "hidden", again
    assert again.step_us == pytest.approx(row.step_us, rel=0.02)


@pytest.mark.slow
@needs_tpu
@needs_gpu
@pytest.mark.parametrize("cell", grid.CORNERS, ids=str)
def test_what_once_failed_is_as_the_grid_says(cell):
    for row in cells_of_the_grid([cell]):
        again = planned_again(row)
        assert (again.verdict, again.share) == (
            row.verdict,
            pytest.approx(row.share, abs=0.01),
        ), again.reason
