"""Reads GGUF files, llama.cpp's format: metadata, and tensors of many kinds.

The format (version 2 and 3, little-endian) is a header, the metadata, a table of the
tensors, and their data: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The
header is read here, not by `gguf.GGUFReader`, which follows the counts of a damaged
file without an end, and takes seconds for a vocabulary. The `gguf` package dequantises.
"""

import importlib
import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ladder_jax.addresses import local_path
from ladder_jax.config import ConfigError, short_repr
from ladder_jax.data.foreign_files import cut_off, is_file, read_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# struct's code of each scalar type, by its number in the file.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
# What `GGUFFile.read` returns without conversion; all other kinds become float32.
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MOST_DIMENSIONS = 4
LONGEST_NAME = 500  # of a key or tensor; longer ones are damage
# The name of one file of several: llama.cpp writes NAME-00001-of-00003.gguf.
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """A tensor of the file's table."""

    shape: tuple[int, ...]  # slowest dimension first
    kind: str  # F32, Q4_K, ...
    start: int  # its first byte in the file
    size: int  # bytes
    part: int  # the number of the file that holds it

    @property
    def dtype(self) -> np.dtype:
        """The dtype of what `GGUFFile.read` returns."""
        return PLAIN.get(self.kind, np.dtype(np.float32))


class GGUFFile:
    """A GGUF file, or all files of a model that is split into several.

    Args:
      path: the file; of several, the first.

    Attributes:
      paths: the files.
      metadata: {key: number, text, bool or list of these}.
      tensors: {name: Tensor}.

    Raises:
      ConfigError: one line, if it cannot be read, if it is damaged or cut off, or if it
        holds a kind of tensor that cannot be dequantised.
    """

    def __init__(self, path: str | Path) -> None:
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.paths: list[Path] = []
        self._open(local_path(path, "source"))
        for other in self._other_parts():
            self._open(other)
        promised = self.metadata.get("split.tensors.count", len(self.tensors))
        if promised != len(self.tensors):
            raise ConfigError(
                f"{path} promises {promised} tensors, but its files hold "
                f"{len(self.tensors)}: convert from all files of the model"
            )

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor. Raises ConfigError, one line, where it is not there."""
        tensor = self.tensors[name]
        data = read_bytes(self.paths[tensor.part], tensor.start, tensor.size)
        if tensor.kind in PLAIN:
            return data.view(PLAIN[tensor.kind]).reshape(tensor.shape)
        gguf = import_gguf()
        rows = data.reshape(*tensor.shape[:-1], -1)
        kind = gguf.GGMLQuantizationType[tensor.kind]
        return gguf.quants.dequantize(rows, kind).reshape(tensor.shape)

    def _open(self, path: Path) -> None:
        part = len(self.paths)
        self.paths.append(path)
        metadata, tensors = _read_header(path, part)
        if part == 0:
            self.metadata = metadata
        for name, tensor in tensors.items():
            if name in self.tensors:
                raise ConfigError(f"{path} is damaged: it holds {name!r} twice")
            self.tensors[name] = tensor

    def _other_parts(self) -> list[Path]:
        """The paths of the other files of a split model."""
        count = self.metadata.get("split.count", 1)
        if not isinstance(count, int) or count <= 1:
            return []
        first = self.paths[0]
        match = PART.fullmatch(first.name)
        if not match or int(match[2]) != 1 or int(match[3]) != count:
            raise ConfigError(
                f"{first} is one of {count} files of a model: give the first, named "
                f"such as NAME-00001-of-{count:05}.gguf, with the others beside it"
            )
        names = [f"{match[1]}-{i:05}-of-{count:05}.gguf" for i in range(2, count + 1)]
        return [first.with_name(name) for name in names]


def import_gguf() -> Any:
    """Returns the module `gguf`. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError(
            "reading GGUF files needs the package gguf: pip install 'ladder_jax[hf]'"
        ) from None


def _read_header(path: Path, part: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the metadata and the tensors of the file with number `part`."""
    if not is_file(path):
        raise ConfigError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            if start == MAGIC:
                return _Header(file, path).read(part)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    raise ConfigError(
        f"{path} is not a GGUF file: it starts with {start!r}, not with {MAGIC!r}"
    )


class _Header:
    """Reads the header of an open file, from the end of its MAGIC on."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._offset = file, path, len(MAGIC)
        self._size = os.fstat(file.fileno()).st_size

    def read(self, part: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns the metadata, and the tensors of the file with number `part`."""
        version = self._scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            big = " (a big-endian file)" if swapped in VERSIONS else ""
            known = " and ".join(map(str, VERSIONS))
            raise ConfigError(
                f"{self._path} has GGUF version {version}{big}: versions {known} are "
                "accepted"
            )
        tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
        self._require(key_count * 13 + tensor_count * 24)  # bytes, at the least
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._plain_name()
            if key in metadata:
                raise self._damaged(f"it has {key!r} twice")
            metadata[key] = self._value(self._scalar("I"))
        table = [self._table_row() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        start = -(-self._offset // alignment) * alignment
        return metadata, self._tensors(table, start, part)

    def _table_row(self) -> tuple[str, list[int], int, int]:
        """Returns a tensor's name, dimensions (fastest first), kind and offset."""
        name, count = self._plain_name(), self._scalar("I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {count} dimensions")
        shape = [self._scalar("Q") for _ in range(count)]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _tensors(
        self, table: list[tuple[str, list[int], int, int]], start: int, part: int
    ) -> dict[str, Tensor]:
        """Returns the tensors by name. start: the first byte of their data."""
        tensors: dict[str, Tensor] = {}
        end_of_last = start
        for name, shape, kind, offset in sorted(table, key=lambda row: row[3]):
            kind_name, block_length, block_size = self._kind(name, kind)
            if shape[0] % block_length or not math.prod(shape):
                raise self._damaged(f"tensor {name!r} of {kind_name} has shape {shape}")
            size = math.prod(shape) // block_length * block_size
            first = start + offset
            if first + size > self._size:
                raise ConfigError(
                    f"{self._path} is cut off: tensor {name!r} ends at byte "
                    f"{first + size}, the file at byte {self._size}"
                )
            if name in tensors or first < end_of_last:
                raise self._damaged(f"tensor {name!r} overlaps another")
            end_of_last = first + size
            tensors[name] = Tensor(tuple(reversed(shape)), kind_name, first, size, part)
        return tensors

    def _kind(self, name: str, number: int) -> tuple[str, int, int]:
        """Returns a kind's name, and its values and bytes in a block."""
        gguf = import_gguf()
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ConfigError(
                f"{self._path}: tensor {name!r} is of kind {number}, which the "
                "installed gguf package does not know: update it"
            ) from None
        known = kind.name in PLAIN or kind in gguf.quants._type_traits
        if not known:
            raise ConfigError(
                f"{self._path}: tensor {name!r} is of kind {kind.name}, which the gguf "
                "package cannot dequantise"
            )
        return (kind.name, *gguf.GGML_QUANT_SIZES[kind])

    def _value(self, kind: int, is_item: bool = False) -> Any:
        """Returns a value of the metadata."""
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY or is_item:  # llama.cpp writes no arrays of arrays
            raise self._damaged(f"it has a value of the unknown type {kind}")
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind not in SCALARS:
            self._require(count * 8)
            return [self._value(item_kind, True) for _ in range(count)]
        code = SCALARS[item_kind]
        data = self._take(count * struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", data))

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(code)))
        # The shortest decimal of a float32: 1e-5, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def _plain_name(self) -> str:
        """Returns the name of a key or tensor."""
        name = self._string()
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise self._damaged(f"it has the name {short_repr(name)}")
        return name

    def _string(self) -> str:
        data = self._take(self._scalar("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            # Some vocabularies hold parts of characters.
            return data.decode(errors="replace")

    def _take(self, size: int) -> bytes:
        """Reads the next bytes."""
        self._require(size)
        data = self._file.read(size)
        self._offset += size
        if len(data) < size:
            end = os.fstat(self._file.fileno()).st_size
            raise cut_off(self._path, self._offset, end)
        return data

    def _require(self, size: int) -> None:
        """Raises ConfigError unless the file had `size` more bytes when it was opened.

        So a count of a damaged file allocates no memory.
        """
        if self._offset + size > self._size:
            raise ConfigError(
                f"{self._path} is damaged or cut off: its header needs byte "
                f"{self._offset + size}, the file ends at byte {self._size}"
            )

    def _damaged(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._path} is damaged: {reason}")
