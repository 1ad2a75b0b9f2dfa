"""The arrays of a checkpoint on disk, read piece by piece: no more memory than a piece.

Orbax loads whole arrays. It stores them by TensorStore, in a key-value store (OCDBT) of
one folder, as arrays in chunks (Zarr), under names such as layers.mlp.gate; `_METADATA`
says in which version of Zarr. So TensorStore alone can read a part of one.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils.epath import Path

# TensorStore decodes this many chunks at a time.
_CHUNKS = 1


class StoredArray(NamedTuple):
    """One array on disk."""

    name: str  # as in layers/mlp/gate
    store: Any  # tensorstore.TensorStore
    chunk: tuple[int, ...]  # the shape that is read and decoded at one time

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype.numpy_dtype

    @property
    def chunk_bytes(self) -> int:
        """The bytes that TensorStore holds while it reads any part of the array."""
        return math.prod(self.chunk) * self.dtype.itemsize

    def read(self, first: int, stop: int) -> np.ndarray:
        """The rows from `first` to `stop` of the array's first dimension.

        Raises ValueError, one line, where the files are damaged.
        """
        try:
            return self.store[first:stop].read(order="C").result()
        except Exception as error:  # TensorStore has no narrower type
            text = str(error).split(" [source locations=")[0]
            reason = " ".join(text.split())[:300]
        raise ValueError(f"{self.name} of the checkpoint is damaged: {reason}")


def open_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a part of a checkpoint, such as <step>/model, by their names.

    Nothing of them is read. Raises OSError, ValueError or KeyError where the folder is
    damaged.
    """
    about = json.loads((folder / "_METADATA").read_text())
    version = "zarr3" if about.get("use_zarr3") else "zarr"
    context = ts.Context({"data_copy_concurrency": {"limit": _CHUNKS}})
    arrays = {}
    for entry in about["tree_metadata"].values():
        keys = [str(key["key"]) for key in entry["key_metadata"]]
        spec = {
            "driver": version,
            "kvstore": {
                "driver": "ocdbt",
                "base": _address(folder),
                "path": ".".join(keys) + "/",
            },
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,
        }
        store = ts.open(spec, read=True, open=True, context=context).result()
        chunk: Any = store.chunk_layout.read_chunk.shape or ()  # a scalar
        arrays["/".join(keys)] = StoredArray("/".join(keys), store, tuple(chunk))
    return arrays


def _address(folder: Path) -> Any:
    """The folder as TensorStore names it."""
    text = f"{folder}/"
    return text if "://" in text else dict(driver="file", path=text)
