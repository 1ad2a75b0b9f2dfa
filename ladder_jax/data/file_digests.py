"""Digests of the contents of files, stored so that an unchanged file is read once.

The whole file is hashed, not a sample: an edit that a sample misses would make a run
train on old tokens, silently. To hash takes about a thousandth of the time that
tokenising takes. What is known of a file holds while its path, size and time of the
last change are the same.

Processes and hosts that hash the same files share the work by the stored lines: each
takes the files in another order, and looks for lines of the others.
"""

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ladder_jax.data.sources import size_and_time

NAME = ".digests.jsonl"  # hidden: it is no text of a source that holds the folder
BLOCK = 1 << 20
THREADS = 16
REFRESH_S = 1.0
# A file that changed so short a time ago may change again without another time.
FRESH_S = 3.0


class Contents(NamedTuple):
    """What a file held when it was looked at."""

    size: int  # bytes
    time: int  # of the last change, ns
    digest: str


def digests(
    files: Sequence[Path],
    folder: Path,
    report: Callable[[int], None] = lambda read: None,
) -> list[Contents]:
    """Returns the contents of files.

    Args:
      files: of a source.
      folder: where digests are stored, in the file NAME.
      report: called with the bytes of each file that is done.

    Raises:
      OSError: if the digests cannot be stored.
    """
    store = _Store(folder / NAME)
    order = random.sample(range(len(files)), len(files))
    found: dict[int, Contents] = {}

    def look(i: int) -> None:
        found[i] = store.contents(files[i])
        report(found[i].size)

    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(look, order):
            pass
    return [found[i] for i in range(len(files))]


class _Store:
    """Lines of [path, size, time, digest] in a file that processes append to."""

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, dict[str, Contents]()
        self._position, self._read_at = 0, -REFRESH_S
        self._lock = threading.Lock()

    def contents(self, path: Path) -> Contents:
        """Returns the contents of a file, which is read only if it must be."""
        name = os.path.abspath(path)
        while True:
            before = size_and_time(path)
            with self._lock:
                self._refresh()
                known = self._known.get(name)
            if known and known[:2] == before:
                return known
            now = Contents(*before, _digest(path))
            if size_and_time(path) == before:
                break
        if time.time_ns() - now.time > FRESH_S * 10**9:
            line = json.dumps([name, *now]) + "\n"
            with self._lock, open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        return now

    def _refresh(self) -> None:
        """Reads the lines that were added since the last time."""
        if time.monotonic() - self._read_at < REFRESH_S:
            return
        self._read_at = time.monotonic()
        try:
            with open(self._path, "rb") as file:
                file.seek(self._position)
                added = file.read()
        except FileNotFoundError:
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            try:
                name, *contents = json.loads(line)
                self._known[name] = Contents(*contents)
            except (ValueError, TypeError):  # two hosts wrote at the same place
                continue


def _digest(path: Path) -> str:
    """Returns a digest of a file's contents; of one without access, a fixed text."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError:
        return "cannot be read"
    return digest.hexdigest()
