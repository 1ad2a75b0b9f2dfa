"""Typed reading of a foreign config.json: a wrong value becomes one line."""

import sys
from collections.abc import Mapping
from typing import Any

from ladder_jax.config import ConfigError, require

MOST = 2**31 - 1  # the largest int32, of which positions and ids are


class Fields:
    """The keys of a JSON object. Absent and null keys give the caller's default.

    Args:
      values: the object.
      where: its name in messages, such as config.json.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values, self.where = values, where

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to MOST. Without a default the key is required."""
        value = self._value(key, default)
        ok = type(value) is int and 0 < value <= MOST
        self.need(key, ok, f"a whole number from 1 to {MOST}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number greater than 0. Without a default the key is required."""
        value = self._value(key, default)
        ok = type(value) in (int, float) and 0 < value <= sys.float_info.max
        self.need(key, ok, "a number greater than 0", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        self.need(key, isinstance(value, bool), "true or false", value)
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        self.need(key, isinstance(value, str), "text", value)
        return value

    def row(self, key: str, length: int) -> list[Any] | None:
        """A list of `length` items, one a layer; None where there is no such key."""
        value = self.values.get(key)
        ok = value is None or (isinstance(value, list) and len(value) == length)
        self.need(key, ok, f"a list with one item for each of {length} layers", value)
        return value

    def need(self, key: str, ok: object, accepted: str, value: object = None) -> None:
        """Raises ConfigError about a key unless `ok`."""
        value = self.values.get(key) if value is None else value
        require(ok, f"{self.where}: {key}", value, accepted)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise ConfigError(f"{self.where} has no {key}, which must be given")
        return default if value is None else value
