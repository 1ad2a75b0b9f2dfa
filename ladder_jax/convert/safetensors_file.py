"""One safetensors file: read or written tensor by tensor.

The format: 8 bytes, the header's length; the header, JSON, which gives each tensor's
dtype, shape and place; the tensors' bytes. NumPy has no bfloat16 of its own, so the
`safetensors` package reads none through NumPy; ml_dtypes, which JAX brings, has one.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from ladder_jax.config import ConfigError, short_repr
from ladder_jax.convert.source import TensorInfo
from ladder_jax.data.foreign_files import parse_object, read_bytes

# The names of dtypes in a header. Weights in any other dtype are quantised.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The longest header that the `safetensors` package accepts.
LONGEST_HEADER = 100_000_000
LONGEST_NAME = 500  # of a tensor; longer ones are damage


class Place(NamedTuple):
    """Where a tensor is in its file."""

    info: TensorInfo
    start: int  # in bytes, from the start of the file


def read_header(path: Path) -> dict[str, Place]:
    """Returns the place of every tensor of a file; reads its header alone.

    Raises ConfigError, one line, if the file is damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise _damaged(path, f"a header of {length} bytes in {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = parse_object(text, "its header")
    except ConfigError as error:
        raise _damaged(path, str(error)) from None
    header.pop("__metadata__", None)
    try:
        rows = {name: _row(name, row) for name, row in header.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    end = _end_of(path, rows)
    if 8 + length + end != size:
        raise _damaged(
            path, f"it has {size} bytes, and {8 + length + end} are promised"
        )
    return {
        name: Place(info, 8 + length + start) for name, (info, start, _) in rows.items()
    }


def _row(name: str, row: Any) -> tuple[TensorInfo, int, int]:
    """(info, start, end) of a header's row, whose numbers must agree."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"it has a tensor of the name {short_repr(name)}")
    fields: dict[str, Any] = row if isinstance(row, dict) else {}
    keys = ("dtype", "shape", "data_offsets")
    kind, shape, place = [fields.get(key) for key in keys]
    if not (isinstance(kind, str) and _is_sizes(shape) and _is_sizes(place, 2)):
        raise ValueError(f"{name} is {short_repr(row, 100)}")
    if kind not in DTYPES:
        raise ConfigError(
            f"{name} is {short_repr(kind)}: quantised weights are not supported, only "
            f"{', '.join(DTYPES)}"
        )
    start, end = place
    info = TensorInfo(tuple(shape), DTYPES[kind])
    if end - start != math.prod(shape) * info.dtype.itemsize:
        raise ValueError(
            f"{name} of shape {short_repr(shape)} takes {end - start} bytes"
        )
    return info, start, end


def _is_sizes(value: Any, length: int | None = None) -> TypeGuard[list[int]]:
    """Whether a value is a list of whole numbers, none of them negative."""
    if not isinstance(value, list) or length not in (None, len(value)):
        return False
    return all(type(number) is int and number >= 0 for number in value)


def _end_of(path: Path, rows: Mapping[str, tuple[TensorInfo, int, int]]) -> int:
    """Where the last tensor ends. Tensors must follow each other without gaps."""
    end = 0
    for name, (_, start, stop) in sorted(rows.items(), key=lambda row: row[1][1:]):
        if start != end:
            raise _damaged(path, f"{name} starts at byte {start}, not at {end}")
        end = stop
    return end


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} is damaged or no safetensors file: {reason}")


def read_tensor(path: Path, place: Place) -> np.ndarray:
    """Returns a tensor. Raises ConfigError, one line, where it cannot be read whole."""
    info = place.info
    raw = read_bytes(path, place.start, bytes_of(info))
    return raw.view(info.dtype).reshape(info.shape)


def write_file(path: Path, tensors: Mapping[str, TensorInfo], read: Any) -> str:
    """Writes a file, one tensor in memory at a time. Returns its SHA-256 in hex.

    Args:
      path: the file, which must not be read by others before this returns.
      tensors: what is written, in this order.
      read: called with each name in turn; returns the array.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        size = bytes_of(info)
        place = dict(shape=list(info.shape), data_offsets=[end, end + size])
        header[name] = dict(dtype=NAMES[info.dtype]) | place
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors then start at a multiple of 8 bytes
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name, info in tensors.items():
            array = np.ascontiguousarray(read(name), info.dtype)
            assert array.shape == info.shape, name
            write(array.view(np.uint8).data if array.ndim else array.tobytes())
            del array  # before the next one is read
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def bytes_of(info: TensorInfo) -> int:
    """The bytes that a tensor takes."""
    return math.prod(info.shape) * info.dtype.itemsize


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """The bytes that these tensors take together."""
    return sum(map(bytes_of, infos))
