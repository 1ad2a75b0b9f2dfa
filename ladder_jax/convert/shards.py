"""Safetensors files of a model, one after the other; a later run goes on after them.

A record beside the files has the digest of each one that is whole. A run that finds the
record of the same export keeps the files whose digests are right, and removes all else.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ladder_jax import files
from ladder_jax.convert import folder
from ladder_jax.convert.safetensors_file import bytes_of, total_bytes, write_file
from ladder_jax.convert.safetensors_source import INDEX, SINGLE
from ladder_jax.convert.source import TensorInfo
from ladder_jax.data.tokenizer_files import dump

RECORD = "export.json"

Shard = dict[str, TensorInfo]  # the tensors of a file
# A shard -> the function that reads one of its tensors. It is called for the names in
# the shard's order.
Reader = Callable[[Sequence[str]], Callable[[str], np.ndarray]]


def split(infos: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, Shard]:
    """Tensors by the names of their files, none larger than `shard_bytes`.

    A tensor that is larger has a file of its own.
    """
    shards: list[Shard] = [{}]
    for name, info in infos.items():
        size = total_bytes(shards[-1].values()) + bytes_of(info)
        if shards[-1] and size > shard_bytes:
            shards.append({})
        shards[-1][name] = info
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


class Shards:
    """The files of one export (a folder.Kept).

    Args:
      shards: the tensors of each file.
      export: what tells this export from others: the checkpoint, the dtype, the sizes.
    """

    def __init__(self, shards: Mapping[str, Shard], export: str) -> None:
        self.shards = shards
        names = [(file, list(shard)) for file, shard in shards.items()]
        text = json.dumps([export, names])
        self._export = hashlib.sha256(text.encode()).hexdigest()
        self.whole: dict[str, str] = {}  # the digests of the files that are whole
        self.lost = ""  # see folder.Kept

    def clean(self, part: Path) -> None:
        """Keeps the files of the same export whose digests are right."""
        was_empty = not folder.contents(part)
        whole, reason = self._record(part)
        self.whole = {
            file: digest
            for file, digest in whole.items()
            if file in self.shards and _digest(part / file) == digest
        }
        kept = self.keep(part)
        self.lost = "" if kept or was_empty else reason or "its files are damaged"

    def _record(self, part: Path) -> tuple[dict[str, str], str]:
        """(the record's digests, or why it has none)."""
        try:
            record = json.loads((part / RECORD).read_text())
            if record["export"] != self._export:
                return {}, "its checkpoint or its options were others"
            return dict(record["whole"]), ""
        except FileNotFoundError:
            return {}, "no file was whole"
        except (OSError, ValueError, KeyError, TypeError):
            return {}, "its files are damaged"

    def keep(self, part: Path) -> bool:
        """Removes all but the whole files. Returns whether there are any."""
        folder.remove_all(part, self.whole)
        if self.whole:
            self._write_record(part)
        return bool(self.whole)

    def write(self, part: Path, reader: Reader) -> None:
        """Writes the files that are not there, and the index if there are several."""
        for file, shard in self.shards.items():
            if file in self.whole:
                continue
            unfinished = part / f"{file}.part"
            digest = write_file(unfinished, shard, reader(list(shard)))
            unfinished.rename(part / file)
            self.whole[file] = digest
            self._write_record(part)
        if len(self.shards) > 1:
            (part / INDEX).write_text(dump(self._index()), encoding="utf-8")

    def end(self, part: Path) -> None:
        """Removes the record: the folder is complete."""
        (part / RECORD).unlink()

    def _write_record(self, part: Path) -> None:
        record = dict(export=self._export, whole=self.whole)
        files.write_text(part / RECORD, json.dumps(record))

    def _index(self) -> dict[str, object]:
        where = {name: file for file, shard in self.shards.items() for name in shard}
        total = sum(total_bytes(shard.values()) for shard in self.shards.values())
        return dict(metadata=dict(total_size=total), weight_map=where)


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
