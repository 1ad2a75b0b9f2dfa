"""The configuration of a run: its sections, stored as JSON or read from a recipe.

A recipe in `configs/` builds one `Config`. Any field can be overridden on the command
line (`--train.steps 50`). Every checkpoint stores the `Config` of its run as JSON.

This module has all names that other modules use. The fields are in sections.py, the
checks of types and names in checks.py.
"""

import dataclasses
import runpy
import traceback
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladder_jax.checks import (
    RENAMED_FIELDS,
    RENAMED_VALUES,
    ConfigError,
    Section,
    describe,
    field_types,
    fits,
    near_matches,
    require,
    require_field,
    short_repr,
    to_bytes,
)
from ladder_jax.sections import (
    Config,
    Data,
    Decode,
    Distill,
    Mesh,
    Model,
    Optimizer,
    RopeScaling,
    Train,
)

__all__ = [
    "Config",
    "ConfigError",
    "Data",
    "Decode",
    "Distill",
    "Mesh",
    "Model",
    "Optimizer",
    "RopeScaling",
    "Section",
    "Train",
    "describe",
    "field_types",
    "fits",
    "from_dict",
    "from_meta",
    "from_recipe",
    "near_matches",
    "require",
    "require_field",
    "short_repr",
    "to_bytes",
    "to_dict",
]

# ---------------------------------------------------------------- JSON


def to_dict(section: Section) -> dict[str, Any]:
    """`section` as a dict of plain values that JSON can store."""
    return dataclasses.asdict(section)  # type: ignore[call-overload]  # all are


def from_dict(values: Mapping[str, Any], cls: type = Config) -> Any:
    """The section of class `cls` with these `values`; the inverse of `to_dict`.

    Fields that `values` does not name have their defaults. Names and values of
    ladder_jax 0.1.0 are accepted. Raises ConfigError on an unknown field.
    """
    types_of = field_types(cls)
    fields = {}
    for name, value in values.items():
        path = cls.path(name)  # type: ignore[attr-defined]  # cls is a Section
        name = RENAMED_FIELDS.get(path, name)
        if isinstance(value, str):
            value = RENAMED_VALUES.get((path, value), value)
        require_field(cls, name)
        if isinstance(value, dict):
            options: tuple[Any, ...] = typing.get_args(types_of[name])
            for option in (types_of[name], *options):
                if dataclasses.is_dataclass(option):
                    value = from_dict(value, option)  # type: ignore[arg-type]  # a type
                    break
        fields[name] = value
    return cls(**fields)


def from_meta(meta: Mapping[str, Any], where: object) -> Config:
    """The Config in a checkpoint's `meta` (checkpoint.read_meta).

    Args:
      meta: has "config", and "ladder_jax": the version that wrote it.
      where: names the checkpoint in a message.
    Raises ConfigError that names the checkpoint and the version that wrote it where
    this version cannot read its configuration.
    """
    try:
        require(isinstance(meta["config"], dict), "config", meta["config"], "an object")
        return from_dict(meta["config"])
    except ConfigError as error:
        writer = meta.get("ladder_jax", "of an unknown version")
        raise ConfigError(
            f"{where} was written by ladder_jax {writer}, and this version cannot read "
            f"its configuration: {error}"
        ) from None


# ---------------------------------------------------------------- recipes


def from_recipe(path: str | Path) -> Config:
    """The `config` that a recipe (a Python file) defines.

    Raises ConfigError that names the file and the line.
    """
    path = str(path)
    if not Path(path).is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        hint = f": there are {known}" if known else ""
        raise ConfigError(f"recipe {path!r} does not exist{hint}")
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:
        line = _line_of(error, path)
        where = f"recipe {path!r}" + (f", line {line}" if line else "")
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{where}: {kind}{error}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"recipe {path!r} defines no `config` of type ladder_jax.config.Config"
        )
    return config


def _line_of(error: Exception, path: str) -> int | None:
    """The line of the file `path` that raised `error`, or None."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return lines[-1] if lines else None
