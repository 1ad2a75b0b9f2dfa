"""Shows how much the hints that residual/overlap.py gives to XLA shorten a step.

The command prints a Markdown table. A row is a program; its columns have the modelled
step with no hint, with some hints, and with all of them.

python -m ladder_jax.planner.hints decode
python -m ladder_jax.planner.hints train --recipes llama3_70b --targets v6e:2x4
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

from ladder_jax.config import ConfigError, Mesh, from_recipe
from ladder_jax.hardware import aot
from ladder_jax.planner.records import SLICES

SHAPES = {  # batch x context
    "decode": ("1x2048", "16x2048", "64x2048"),
    "prefill": ("1x1024",),
    "train": ("1x2048",),
}
# The columns, see `only`. Programs without a backward pass have no hints for it.
HINTS = {
    "decode": ("none", "forward"),
    "prefill": ("none", "forward"),
    "train": ("none", "forward", "carried", "all"),
}


@contextlib.contextmanager
def only(hints: str) -> Iterator[None]:
    """A context in which traced programs contain only some of the hints.

    Args:
      hints: "none"; "forward", the hints of the forward pass; "carried", the forward
        hints, and backward reductions that pass from block to block and that XLA may
        end anywhere; or "all".
    """
    from ladder_jax.residual import blocks, overlap, stream

    with contextlib.ExitStack() as stack:

        def replace(owner: object, name: str, function: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, function))

        if hints == "none":
            replace(overlap.AsyncReduction, "progress", lambda self, product: product)
        if hints in ("none", "forward"):
            for module in (blocks, stream):
                replace(module, "backward_reduction", lambda *args: None)
        if hints == "carried":
            replace(overlap.BackwardReduction, "progress", lambda self, x: x)
        yield


def cell(recipe: str, target: str, workload: str, shape: str, hints: str) -> str:
    """One cell of the table: a ladder model's step in microseconds, and the share of
    its hideable communication that is hidden."""
    from ladder_jax.planner import plan, report

    config = from_recipe(f"configs/{recipe}.py")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, residual="ladder"),
        mesh=Mesh(data=-1, tensor=8, reduction="auto"),
    )
    batch, context = map(int, shape.split("x"))
    request = plan.Request(recipe, config, aot.parse(target), workload, batch, context)
    try:
        with aot.silence(), only(hints):
            compiled = plan.build(request)
    except ConfigError as error:
        return str(error)
    totals = report.make_report(compiled, report.make_timeline(compiled))["totals"]
    sent = totals["communication_us"]
    hideable = sent - totals["unavoidable_us"]
    hidden = min((sent - totals["exposed_us"]) / hideable, 1)
    return f"{totals['step_us']:,.0f} ({hidden:.0%})"


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=SHAPES)
    parser.add_argument("--recipes", nargs="+", default=["llama3_8b"])
    parser.add_argument("--targets", nargs="+", default=SLICES)
    parser.add_argument("--shapes", nargs="+", help="batch x context, such as 4x2048")
    args = parser.parse_args()
    aot.prepare()
    columns = HINTS[args.workload]
    print("| |", args.workload, "|", " | ".join(columns), "|")
    print("|" + "---|" * (len(columns) + 2))
    for recipe in args.recipes:
        for target in args.targets:
            for shape in args.shapes or SHAPES[args.workload]:
                print(f"| {recipe}, {target} | {shape} |", end="", flush=True)
                for hints in columns:
                    text = cell(recipe, target, args.workload, shape, hints)
                    print(f" {text} |", end="", flush=True)
                print()


if __name__ == "__main__":
    main()
