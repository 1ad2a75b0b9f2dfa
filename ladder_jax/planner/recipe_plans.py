"""What the rows of docs/overlap have in common: their request, result and version."""

import ast
import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ladder_jax.config import ConfigError, Mesh, from_recipe
from ladder_jax.hardware import aot
from ladder_jax.planner import records
from ladder_jax.planner.records import Record

if TYPE_CHECKING:
    from ladder_jax.planner.plan import Request

# Modules that import JAX are imported inside functions: `aot.prepare` must run before.

Planned = TypeVar("Planned", bound=Record)
PACKAGE = Path(__file__).resolve().parent.parent
# The files of ladder_jax that determine a plan: see `code_version`.
HASHED_FILES = (
    *("attention.py", "config.py", "kv_cache.py", "matmul.py", "model.py"),
    *("objective.py", "optimizer.py", "schedule.py", "sharding.py"),
    *("train_programs.py", "training.py", "hardware/*.py", "residual/*.py"),
    "residual/tuned.csv",  # what "auto" takes
    *(f"planner/{name}.py" for name in ("fused", "hlo", "operations", "plan")),
    *(f"planner/{name}.py" for name in ("report", "scopes", "stack", "timeline")),
)


def make_request(
    recipe: str, target: str, workload: str, shape: str, schedule: str, mesh: Mesh
) -> "Request":
    """The request for a recipe's model on another mesh, with another schedule.

    Args:
      recipe: its file, or the name of a file in configs/, such as "llama3_8b".
      target: see aot.parse.
      workload: "decode", "prefill" or "train".
      shape: batch x context, such as "4x2048".
      schedule: the residual schedule.
      mesh: in place of the recipe's.
    """
    from ladder_jax.planner.plan import Request

    path = recipe if recipe.endswith(".py") else f"configs/{recipe}.py"
    config = from_recipe(path)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, residual=schedule),
        mesh=mesh,
    )
    batch, _, context = shape.partition("x")
    if not (batch.isdigit() and context.isdigit()):
        raise ConfigError(
            f"shapes={shape!r} is not accepted: it must be batch x context, "
            "such as 4x2048"
        )
    return Request(
        recipe, config, aot.parse(target), workload, int(batch), int(context)
    )


def with_result(record: Planned, report: dict[str, Any]) -> Planned:
    """A row with the times of its plan's report, and the reduction in use."""
    totals = report["totals"] | dict(sent_us=report["totals"]["communication_us"])
    times = {name: round(totals[name], 3) for name in records.TIMES}
    return dataclasses.replace(record, reduction=report["reduction"], **times)


def code_version(package: Path = PACKAGE) -> str:
    """A hash of the code that determines a plan, without comments and docstrings."""
    digest = hashlib.sha256()
    for pattern in HASHED_FILES:
        for path in sorted(package.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".py":
                text = ast.dump(_without_docstrings(ast.parse(text)))
            digest.update(text.encode())
    return digest.hexdigest()[:8]


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return tree


def jaxlib_version() -> str:
    """The version of the XLA that plans."""
    import jaxlib

    return jaxlib.__version__
