"""Checks of a configuration's values: types, names, sizes, and one-line errors.

`Section` is the base of the sections in sections.py. It checks every field by its type.
"""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

LARGEST_SIZE = 2**31 - 1  # of what is a dimension of an array, or of the mesh
LARGEST = 2**53  # of other whole numbers: JSON's readers keep them exact


class ConfigError(ValueError):
    """A user's mistake, in one line: the field, its value and what is accepted."""


def require(ok: object, name: str, value: object, accepted: str) -> None:
    """Raises ConfigError with the field, its value and `accepted`, unless `ok`."""
    if not ok:
        text = short_repr(value)
        raise ConfigError(f"{name}={text} is not accepted: it must be {accepted}")


def short_repr(value: object, most: int = 60) -> str:
    """Returns a value's repr on one line, cut after `most` characters."""
    if isinstance(value, (list, tuple)):
        value = value[:most]  # the repr of more items is longer than `most` anyway
    try:
        text = " ".join(repr(value).split())
    except Exception:  # __repr__ of a user's class; or an int of more than 4300 digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}..."


class Section:
    """Base of every section: checks the types of fields, then calls `check`."""

    section: typing.ClassVar[str] = ""  # its name in paths such as model.dim
    largest: typing.ClassVar[int] = LARGEST  # its largest whole number

    def __new__(cls, *_: Any, **values: Any) -> Any:
        for name in values:
            require_field(cls, name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            require(fits(value, hint), self.path(name), value, describe(hint))
            if isinstance(value, int) and not fits(1.0, hint):
                self.need(name, value <= self.largest, f"at most {self.largest}")
        self.check()

    def check(self) -> None:
        """Raises ConfigError where a value of the right type is not accepted."""

    @classmethod
    def path(cls, name: str) -> str:
        """The full name of a field, such as model.dim."""
        return f"{cls.section}.{name}" if cls.section else name

    def need(self, name: str, ok: object, accepted: str) -> None:
        """Raises ConfigError about the field `name` unless `ok`."""
        require(ok, self.path(name), getattr(self, name), accepted)

    def positive(self, *names: str) -> None:
        for name in names:
            self.need(name, getattr(self, name) > 0, "greater than 0")


# ---------------------------------------------------------------- types and names


def field_types(cls: type) -> dict[str, Any]:
    """The type of every field of a dataclass, by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def fits(value: object, hint: Any) -> bool:
    """Whether `value` is of type `hint`.

    `hint`: int, float (finite), str, bool, None, a Literal, a Union or a dataclass. A
    bool is no number, and an int is a float.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if origin is Literal:
        return value in args and type(value) in {type(option) for option in args}
    if hint is type(None):
        return value is None
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        most = sys.float_info.max  # NaN and infinity are not accepted
        return isinstance(value, (int, float)) and -most <= value <= most
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """The words for the type `hint` in a message, such as "a whole number"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    names = {
        type(None): "None",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "True or False",
    }
    return names.get(hint) or (str(hint) if origin else hint.__name__)


def near_matches(name: str, known: Iterable[str]) -> list[str]:
    """At most two of the `known` names that a user may have meant by `name`."""
    return difflib.get_close_matches(name, sorted(known), 2, 0.75)


def to_bytes(text: str, name: str) -> int:
    """The number of bytes that "512MiB", "2GiB", "1.5GB" or "1000" mean.

    Raises ConfigError about the field `name` where `text` is no size.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", 1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power}
        units[f"{letter}b"] = 1000**power
    text_lower = text.strip().lower()
    number = text_lower.rstrip("bkmgti")
    unit = text_lower[len(number) :]
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        size = -1
    require(0 <= size < math.inf, name, text, "a size such as 512MiB or 2GiB")
    return int(size)


def require_field(cls: Any, name: str) -> None:
    """Raises ConfigError unless the section `cls` has a field `name`.

    The message gives the new name of a renamed field, or the nearest name.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    if name in known:
        return
    path = cls.path(name)
    if path in RENAMED_FIELDS:
        raise ConfigError(f"{path} is now {cls.path(RENAMED_FIELDS[path])}")
    near = [cls.path(other) for other in near_matches(name, known)]
    hint = f" (perhaps {' or '.join(near)})" if near else ""
    raise ConfigError(
        f"{path} is not a field: it must be one of {', '.join(sorted(known))}{hint}"
    )


# ---------------------------------------------------------------- old names

# Fields as ladder_jax 0.1.0 named them, and their names now.
RENAMED_FIELDS = {
    "train.batch": "global_batch",
    "train.length": "seq_len",
    "train.accumulate": "grad_accum_steps",
    "train.keep": "keep_checkpoints",
    "data.held_out": "held_out_fraction",
    "data.cache": "token_cache",
    "optimizer.schedule": "lr_schedule",
    "optimizer.final_fraction": "final_lr_fraction",
    "model.attention_bias": "qkv_bias",
    "decode.chunk": "steps_per_call",
    "decode.prefill": "prefill_budget",
    "decode.queue": "queue_size",
    "decode.fit": "fit_shapes",
    "decode.unstack": "unroll_layers",
    "decode.length": "max_length",
    "decode.bias": "max_logit_bias",
    "decode.stop_ids": "max_stop_ids",
    "decode.top_logprobs": "max_logprobs",
}
RENAMED_VALUES = {("train.remat", "products"): "dots"}
