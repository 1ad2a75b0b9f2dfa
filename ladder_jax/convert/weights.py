"""Where an export reads parameters: from a model in memory, or from a checkpoint."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from ladder_jax import checkpoint, sharding
from ladder_jax import model as models
from ladder_jax.config import Model
from ladder_jax.stored_arrays import StoredArray

# A name of sharding.PARAMETERS, and the number of the layer; None: not one of a layer.
Place = tuple[str, int | None]
Read = Callable[[Place], np.ndarray]


class Weights(Protocol):
    """A model's parameters.

    Attributes:
      name: tells these parameters from all others, also in another process; empty where
        nothing does.
      parts: the names of the parameters.
    """

    name: str
    parts: frozenset[str]

    def reader(self, wanted: Iterable[Place]) -> Read:
        """A function that reads these parameters, once each and in this order."""
        ...


class InMemory:
    """The parameters of a model on any mesh (Weights)."""

    name = ""

    def __init__(self, model: models.Transformer) -> None:
        names = jax.tree.leaves(sharding.parameter_names(model))
        self._arrays = dict(zip(names, jax.tree.leaves(model)))
        self.parts = frozenset(self._arrays)

    def reader(self, wanted: Iterable[Place]) -> Read:
        def read(place: Place) -> np.ndarray:
            part, layer = place
            array = self._arrays[part]
            return np.asarray(jax.device_get(array if layer is None else array[layer]))

        return read


class OnDisk:
    """The parameters of a checkpoint (Weights): they are read piece by piece.

    A piece is a tensor; of a checkpoint whose chunks on disk have several layers, a
    tensor of as many layers.

    Args:
      path, config, step: of the checkpoint, see checkpoint.load_model.
    Raises ValueError as checkpoint.load_model does.
    """

    def __init__(
        self, path: str | Path, config: Model, step: int | None = None
    ) -> None:
        shapes = models.abstract(config)
        folder, stored = checkpoint.open_model(path, shapes, step)
        self._arrays: dict[str, StoredArray] = {}
        self._stacked = set()  # the parameters of layers
        for name, array in stored.items():
            part = name.removeprefix("layers/").replace("/", ".")
            self._arrays[part] = array
            if name.startswith("layers/"):
                self._stacked.add(part)
        self.parts = frozenset(self._arrays)
        self.name = checkpoint.fingerprint(folder)

    def reader(self, wanted: Iterable[Place]) -> Read:
        ends: dict[str, int] = {}  # by part: the end of the wanted layers
        for part, layer in wanted:
            if layer is not None:
                ends[part] = max(ends.get(part, 0), layer + 1)
        held: list[
            tuple[str, int, np.ndarray]
        ] = []  # one piece: layers from a first on

        def read(place: Place) -> np.ndarray:
            part, layer = place
            array = self._arrays[part]
            if layer is None:
                held.clear()
                return array.read(0, array.shape[0])
            if not (
                held and held[0][0] == part and layer - held[0][1] < len(held[0][2])
            ):
                held.clear()  # before the next piece takes memory
                end = min(_end_of_chunk(array, layer), ends[part])
                held.append((part, layer, array.read(layer, end)))
            _, first, piece = held[0]
            return piece[layer - first]

        return read

    def memory(self, shard_bytes: int) -> int:
        """Bytes that an export with files of `shard_bytes` holds, at most: a piece, the
        chunk that it is decoded from, and a tensor with its transpose."""
        most = 0
        for part, array in self._arrays.items():
            tensor = math.prod(array.shape) * array.dtype.itemsize
            layers = array.shape[0] if part in self._stacked else 1
            tensor //= layers
            in_file = max(2 * shard_bytes // tensor, 1)  # bfloat16 of float32
            piece = tensor * min(array.chunk[0], in_file) if layers > 1 else tensor
            most = max(most, piece + array.chunk_bytes + 2 * tensor)
        return most


def _end_of_chunk(array: StoredArray, layer: int) -> int:
    """The layer after the last one in the chunk that has `layer`."""
    rows = array.chunk[0]
    return (layer // rows + 1) * rows
