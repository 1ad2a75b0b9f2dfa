"""A checkpoint whose parameters are saved a few at a time; a later process goes on.

Orbax saves each of them into one unfinished checkpoint (`ocp.partial`), and finishes it
at the end. A record beside it has the parameters that are whole, and the size of every
file then. A process that finds the record of the same import removes all files that
came later, of a save that was cut off, and saves the parameters that are not there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp

from ladder_jax import checkpoint, files
from ladder_jax import model as models
from ladder_jax.config import Model
from ladder_jax.convert import folder
from ladder_jax.orbax_output import without_progress
from ladder_jax.saving import Checkpoints, storage_options

RECORD = "import.json"
FOLDER = "unfinished"  # Orbax's; it is gone when the import is complete


class Parts:
    """The parameters of one import (a folder.Kept).

    Args:
      identity: JSON values that tell this import from others: source, options.
      model: whose parameters they are.

    Attributes:
      saved: the parameters that are whole, by their names in a checkpoint.
      lost: see folder.Kept.
    """

    def __init__(self, identity: Any, model: Model) -> None:
        text = json.dumps([identity, checkpoint.VERSION], sort_keys=True)
        self._identity = hashlib.sha256(text.encode()).hexdigest()
        self._model = model
        self._sizes: dict[str, int] = {}  # of every file when the last save ended
        self.saved: list[str] = []
        self.lost = ""

    def clean(self, part: Path) -> None:
        """Takes up what an import that was cut off left, or removes it."""
        self.forget()
        was_empty = not folder.contents(part)
        reason = self._take_up(part)
        kept = self.keep(part)
        self.lost = "" if kept or was_empty else reason or "its files are damaged"

    def _take_up(self, part: Path) -> str:
        """Reads the record. Returns why it is of no use, "" where it is of use."""
        try:
            record = json.loads((part / RECORD).read_text())
            if record["import"] != self._identity:
                return "its source or its options were others"
            if record["ends"]:
                return "it had begun to make the checkpoint"
            self.saved, self._sizes = list(record["saved"]), dict(record["sizes"])
        except FileNotFoundError:
            return "no parameter was whole"
        except (OSError, ValueError, KeyError, TypeError):
            return "its files are damaged"
        return ""

    def keep(self, part: Path) -> bool:
        """Removes all but the parameters that are whole. Returns whether any are."""
        there = _sizes(part / FOLDER)
        if not all(there.get(name) == size for name, size in self._sizes.items()):
            self.forget()
        folder.remove_all(part, (RECORD, FOLDER) if self.saved else ())
        if self.saved:
            for name in there.keys() - self._sizes.keys():
                (part / FOLDER / name).unlink()
            _remove_empty(part / FOLDER)
        return bool(self.saved)

    def forget(self) -> None:
        """What was saved is of no use any more: `keep` removes it."""
        self.saved, self._sizes = [], {}

    def save(self, part: Path, arrays: Mapping[str, jax.Array]) -> None:
        """Saves parameters by their names, such as layers/attention/wq."""
        state = unflatten_dict(dict(arrays), sep="/")
        with _context(), without_progress():
            ocp.partial.save((part / FOLDER / "model").absolute(), state)
        sizes = _sizes(part / FOLDER)
        for name in sizes.keys() - self._sizes.keys():
            with (part / FOLDER / name).open("rb") as file:
                os.fsync(file.fileno())
        self.saved, self._sizes = [*self.saved, *arrays], sizes
        self._write_record(part)

    def end(self, part: Path, meta: checkpoint.Meta) -> None:
        """Makes the checkpoint of step 0, in the folder checkpoints; meta: its JSON.

        An import that is cut off in here starts over.
        """
        self._write_record(part, ends=True)
        self.forget()
        unfinished = part / FOLDER / "model"
        with _context(), without_progress():
            ocp.partial.finalize(unfinished.absolute())
        # A checkpoint with all but the parameters, whose folder then takes this place.
        placeholder = dict(model=dict(placeholder=jnp.zeros(1)))
        with Checkpoints(part / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(0, placeholder, None, meta)
        target = part / "checkpoints" / "0" / "model"
        shutil.rmtree(target)
        (arrays,) = (path for path in unfinished.iterdir() if path.is_dir())
        arrays.rename(target)
        shutil.rmtree(part / FOLDER)
        # Raises ValueError where one is missing, or has another shape.
        checkpoint.open_model(part, models.abstract(self._model))
        (part / RECORD).unlink()

    def _write_record(self, part: Path, ends: bool = False) -> None:
        record = {"import": self._identity, "saved": self.saved, "sizes": self._sizes}
        files.write_text(part / RECORD, json.dumps(record | dict(ends=ends)))


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = storage_options
    return context


def _sizes(where: Path) -> dict[str, int]:
    """The size of every file below a folder, by its path there."""
    return {
        str(path.relative_to(where)): path.stat().st_size
        for path in where.rglob("*")
        if path.is_file()
    }


def _remove_empty(where: Path) -> None:
    """Removes the folders below a folder that hold no file."""
    for path in sorted(where.rglob("*"), reverse=True):  # those inside come first
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
