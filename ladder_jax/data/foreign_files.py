"""Files that other programs wrote: what is wrong with one becomes one line."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ladder_jax.config import ConfigError, short_repr


def is_file(path: Path) -> bool:
    """Whether there is a file. False where there is nothing.

    Raises ConfigError for what is there and cannot be read: a folder, a pipe, a link to
    nothing, a folder that this user may not enter.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
        target = short_repr(os.readlink(path))
        reason = f"is a link to {target}, which does not exist"
        raise ConfigError(f"{path} {reason}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{_name(path)} cannot be read: {why}") from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "device or a pipe"
        raise ConfigError(f"{path} is a {kind}: it must be a file")
    return True


def _name(path: Path) -> str:
    return str(path) if len(str(path)) < 300 else short_repr(str(path), 200)


def read_bytes(path: Path, start: int, size: int) -> np.ndarray:
    """`size` bytes of a file from byte `start` on, as an array [size] of uint8.

    The file is read and not mapped: the system ends a process (SIGBUS) that looks at a
    mapped byte which another process has cut off since.

    Raises ConfigError, one line, where the file cannot be read or has fewer bytes.
    """
    data = np.empty(size, np.uint8)
    try:
        with path.open("rb") as file:
            file.seek(start)
            count = file.readinto(data.data)
            end = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if count < size:
        raise cut_off(path, start + size, end)
    return data


def cut_off(path: Path, needed: int, end: int) -> ConfigError:
    """The error about a file that has lost its end since its header was read."""
    return ConfigError(
        f"{path} was cut off while it was read: byte {needed} is needed, and it ends "
        f"at byte {end}"
    )


def read_text(path: Path) -> str | None:
    """The content of a text file; None if there is no such file."""
    if not is_file(path):
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError, one line, if there is none."""
    text = read_text(path)
    if text is None:
        raise ConfigError(f"{path} does not exist")
    return parse_object(text, str(path))


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text; `where` is its name in messages.

    Raises ConfigError, one line, also where an object has a key twice, with two values:
    nothing says which of them the writer meant.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except ConfigError as error:
        raise ConfigError(f"{where} is not accepted: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where} is not JSON: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not JSON: it is not UTF-8") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{where} is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {short_repr(value)}: it must be a JSON object")
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                both = f"{short_repr(value)} and {short_repr(values[key])}"
                raise ConfigError(f"it has {short_repr(key)} twice: {both}")
    return values
