"""Imports point down one list of rooms, and never in a circle.

To add a file, put its module into the row that says what it may know. A module may
import modules of lower rows and of its own row.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ladder_jax"

# Top to bottom. A name is a module of `ladder_jax`, or a room: a folder of modules.
ROWS = {
    "doors": ["__main__", "cli", "server"],
    "jobs": [
        "training",
        "rollback",
        "mirror",
        "profiling",
        "identity",
        "train_programs",
        "preparation",
        "tokenizing",
        "generating",
        "devices",
        "agreement",
        "step_inputs",
        "initial",
        "anneal",
        "crossing",
        "progress",
        "stop_signal",
        "evaluation",
        "bench",
        "planner",
        "chat",
        "loading",
        "hugging_face",
        "inspection",
        "report",
        "generate",
    ],
    "serving": ["serve"],
    "conversion": ["convert"],
    "device programs": [
        "decode",
        "decode_pages",
        "decode_prompts",
        "decode_state",
        "decode_scores",
        "decode_shapes",
        "decode_step",
        "decode_weights",
        "sampling",
        "speculation",
        "optimizer",
        "skipping",
        "distill",
        "objective",
    ],
    "model": [
        "model",
        "cross_entropy",
        "attention",
        "rotary",
        "gated",
        "matmul",
        "kv_cache",
        "pages",
        "beside",
        "page_kernels",
    ],
    "residual": ["residual"],
    "data": ["data"],
    "hardware": ["hardware"],
    "ground": [
        "sharding",
        "saving",
        "checkpoint",
        "checkpoint_arrays",
        "orbax_output",
        "stored_arrays",
        "addresses",
        "files",
        "storage",
        "interrupts",
        "run_folder",
        "metrics",
        "config",
        "sections",
        "checks",
        "arguments",
        "say",
        "standard_streams",
        "schedule",
        "output_major",
        "quantised",
    ],
}
# Files that transformers loads from an exported folder: no modules of the package, and
# their imports are relative, as transformers requires.
EXPORTED = PACKAGE / "convert" / "exported"
# Names in ROWS whose files are still to be written.
PLANNED: set[str] = set()


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `ladder_jax`."""
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        if EXPORTED in path.parents:
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        paths[".".join(part for part in parts if part != "__init__")] = path
    return paths


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The package's modules that a file imports, at its top or inside a function."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] + [base]
        else:
            continue
        below = [n.removeprefix("ladder_jax.") for n in names if "ladder_jax." in n]
        imported |= {name for name in below if name in known and name}
    return imported


def row_of(module: str) -> int:
    """The number of the row that names a module, or the room that it is in."""
    rows = list(ROWS.values())
    for name in (module, module.partition(".")[0]):
        for number, row in enumerate(rows):
            if name in row:
                return number
    raise AssertionError(f"ladder_jax/{module}: give it a row in {__file__}")


MODULES = modules()
IMPORTS = {name: imports_of(path, set(MODULES)) for name, path in MODULES.items()}
IMPORTS = {
    # A package's `__init__` is imported with each of its modules: no arrow of its own.
    name: {n for n in imported if n != name and not name.startswith(f"{n}.")}
    for name, imported in IMPORTS.items()
}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_imports_point_down(module: str) -> None:
    up = [name for name in IMPORTS[module] if row_of(name) < row_of(module)]
    assert not up, f"{module} imports {up}, which stand above it in ROWS"


def test_no_circles() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail("modules import each other: " + " -> ".join(error.args[1]))


def test_rows_name_what_there_is() -> None:
    rooms = {name.partition(".")[0] for name in MODULES if name}
    for name in [name for row in ROWS.values() for name in row]:
        exists = name in MODULES or name in rooms
        assert exists != (name in PLANNED), f"{name}: change ROWS or PLANNED"
