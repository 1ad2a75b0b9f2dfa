"""Rotary embedding in config.json: its two forms, read and written.

Files of transformers 5 have one object `rope_parameters`; older ones have `rope_theta`
and `rope_scaling`. A file that has both must say the same twice.
"""

import sys
from typing import Any

from ladder_jax.config import ConfigError, Model, RopeScaling, require
from ladder_jax.convert.fields import Fields

# Keys of a rope object, by rope_type.
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
    ),
}


def read_rope(fields: Fields, default_theta: float) -> tuple[float, RopeScaling]:
    """(base, scaling) of the rotary embedding that a config.json describes.

    Raises ConfigError where the kind is not supported, or two forms disagree.
    """
    new, old = _plain(fields, "rope_parameters"), _plain(fields, "rope_scaling")
    thetas = {
        f"{form}.rope_theta": values["rope_theta"]
        for form, values in (("rope_parameters", new), ("rope_scaling", old))
        if values.get("rope_theta") is not None
    }
    if fields.has("rope_theta"):
        thetas["rope_theta"] = fields.number("rope_theta")
    if len(set(map(repr, map(_as_float, thetas.values())))) > 1:
        text = ", ".join(f"{name}={value!r}" for name, value in thetas.items())
        raise ConfigError(f"{fields.where} gives two bases: {text}: remove one")
    if new and old and _meaning(new) != _meaning(old):
        raise ConfigError(
            f"{fields.where}: rope_parameters={new} and rope_scaling={old} disagree: "
            "remove one"
        )
    values = {"rope_theta": next(iter(thetas.values()), default_theta)} | (new or old)
    where = f"{fields.where}: {'rope_parameters' if new else 'rope_scaling'}"
    rope = Fields(values, where)
    return rope.number("rope_theta", default_theta), _scaling(rope, fields)


def _plain(fields: Fields, key: str) -> dict[str, Any]:
    """A rope object with rope_type; {} if there is none.

    An object for each kind of layer is accepted where they are equal.
    """
    value = fields.values.get(key)
    if value is None:
        return {}
    fields.need(key, isinstance(value, dict), "an object or null", value)
    if any(isinstance(inner, dict) for inner in value.values()):
        first = next(iter(value.values()))
        same = all(inner == first for inner in value.values())
        fields.need(key, same, "the same for all kinds of layers", value)
        value = first
    if not value:
        return {}
    return value | {"rope_type": value.get("rope_type", value.get("type", "default"))}


def _as_float(value: Any) -> Any:
    most = sys.float_info.max
    is_number = type(value) in (int, float) and -most <= value <= most
    return float(value) if is_number else value


def _meaning(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a rope object that decide on the angles, without its base."""
    keys = ("rope_type", *KEYS.get(str(values["rope_type"]), tuple(values)))
    given = {key: _as_float(values.get(key)) for key in keys}
    return {key: value for key, value in given.items() if value is not None}


def _scaling(rope: Fields, fields: Fields) -> RopeScaling:
    kind = rope.text("rope_type", "default")
    accepted = f"one of {', '.join(KEYS)}: other kinds are not supported"
    require(kind in KEYS, f"{rope.where}.rope_type", kind, accepted)
    for where in (rope, fields):
        if where.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            where.need("partial_rotary_factor", False, "1: every dimension is rotated")
    if kind == "default":
        return RopeScaling()
    values = _values(kind, rope, fields)
    try:
        return RopeScaling(**values)
    except ConfigError as error:
        raise ConfigError(f"{fields.where} describes no model: {error}") from None


def _values(kind: str, rope: Fields, fields: Fields) -> dict[str, Any]:
    """The fields of RopeScaling, of a kind other than default."""
    if kind == "linear":
        return dict(kind="linear", factor=rope.number("factor"))
    length = fields.integer(
        "original_max_position_embeddings",
        rope.integer(
            "original_max_position_embeddings",
            fields.integer("max_position_embeddings", 2048),
        ),
    )
    if kind == "llama3":
        return dict(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_length=length,
        )

    def optional(key: str) -> float | None:
        return rope.number(key) if rope.values.get(key) else None

    ratio = fields.integer("max_position_embeddings", 2048) / length
    return dict(
        kind="yarn",
        factor=rope.number("factor", ratio),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=rope.flag("truncate", True),
        original_length=length,
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
    )


def write_rope(model: Model) -> dict[str, Any]:
    """Both forms, which say the same: rope_parameters; rope_theta and rope_scaling."""
    scaling = model.rope_scaling
    is_plain = scaling.factor == 1 and scaling.kind != "yarn"
    kind = "default" if is_plain else scaling.kind
    fields = {
        key: getattr(scaling, _OURS.get(key, key))
        for key in KEYS[kind]
        if getattr(scaling, _OURS.get(key, key)) is not None
    }
    values = {"rope_type": kind} | fields
    return {
        "rope_parameters": values | {"rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": None if kind == "default" else values,
    }


_OURS = {"original_max_position_embeddings": "original_length"}
