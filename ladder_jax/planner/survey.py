"""The tables of docs/overlap.md: `python -m ladder_jax.planner.survey decode` prints one, a row a plan.

python -m ladder_jax.planner.survey prefill --recipes llama3_8b --targets v5p:2x2x2 --schedules ladder standard
"""

import argparse
import dataclasses
import sys

from ladder_jax.config import ConfigError, Mesh, from_recipe
from ladder_jax.hardware import aot

TARGETS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2", "h100:1x8")
SHAPES = {
    "decode": ("1x2048", "16x2048", "64x2048"),
    "prefill": ("1x1024", "4x2048"),
    "train": ("1x2048",),
}
HEADER = """| | batch x context | schedule, reduction | step | compute | sent | hidden | exposed | at least | \
of the hideable, hidden |
|---|---|---|---|---|---|---|---|---|---|"""


def row(recipe, target, workload, shape, schedule, reduction="auto"):
    """One line of the table: the plan of a recipe's model, tensor-parallel over 8 devices. Times in microseconds."""
    from ladder_jax.planner import plan

    config = from_recipe(f"configs/{recipe}.py")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, residual=schedule),
        mesh=Mesh(data=-1, tensor=8, reduction=reduction),
    )
    batch, context = map(int, shape.split("x"))
    request = plan.Request(recipe, config, aot.parse(target), workload, batch, context)
    try:
        with aot.silence():
            compiled = plan.build(request)
    except ConfigError as error:
        return f"| {recipe}, {target} | {shape} | {schedule} | {error} | | | | | | |"
    made = plan.report(compiled, plan.read(compiled))
    total = made["totals"]
    sent, exposed, least = (
        total[f"{name}_us"] for name in ("communication", "exposed", "unavoidable")
    )
    share = (
        f"{min((sent - exposed) / (sent - least), 1):.0%}"
        if sent - least > 0.01 * sent
        else "-"
    )
    numbers = [
        f"{total[f'{name}_us']:,.0f}"
        for name in (
            "step",
            "compute",
            "communication",
            "hidden",
            "exposed",
            "unavoidable",
        )
    ]
    return (
        f"| {recipe}, {target} | {shape} | {schedule}, {made['reduction']} | "
        + " | ".join([*numbers, share])
        + " |"
    )


def main():
    """Prints a table as Markdown, line by line as it is made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=SHAPES)
    parser.add_argument("--recipes", nargs="+", default=["llama3_8b", "llama3_70b"])
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--shapes", nargs="+", help="batch x context, such as 4x2048")
    parser.add_argument("--schedules", nargs="+", default=["ladder"])
    parser.add_argument("--reduction", default="auto")
    chosen = parser.parse_args()
    aot.prepare()
    print(HEADER)
    for recipe in chosen.recipes:
        for target in chosen.targets:
            for shape in chosen.shapes or SHAPES[chosen.workload]:
                for schedule in chosen.schedules:
                    print(
                        row(
                            recipe,
                            target,
                            chosen.workload,
                            shape,
                            schedule,
                            chosen.reduction,
                        )
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
