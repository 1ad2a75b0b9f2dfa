"""Divides a source into units of work, which processes and hosts take from each other.

A unit becomes a shard. The units depend on the source alone, not on who tokenises them.
Any number of processes on any number of hosts that see the cache's folder may work on
it. A process locks the file of a unit while it works on it; the system drops the lock
if the process dies. On a file system without locks some units are tokenised twice,
with the same result: the order in which a process takes them is random.
"""

import contextlib
import fcntl
import math
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ladder_jax.data import formats, token_shard
from ladder_jax.data.formats import Part
from ladder_jax.data.token_shard import File, Job

# A source has about this many units, if that makes them of a size between these: small
# enough that a killed process loses little, large enough that there are not too many.
UNITS = 256
SMALLEST = 4 << 20  # bytes of files
LARGEST = 256 << 20
POLL_S = 0.5

Unit = list[File]


def plan(files: Sequence[tuple[Path, int, int]], divide: bool = True) -> list[Unit]:
    """Returns the units of a source, in order.

    Args:
      files: (path, bytes, time of the last change in ns) of each.
      divide: whether a file may become several parts.

    Raises:
      ConfigError: if a package that a file's format needs is not installed.
    """
    total = sum(size for _, size, _ in files)
    limit = min(max(total // UNITS, SMALLEST), LARGEST)
    units: list[Unit] = []
    used = 0
    for path, size, changed in files:
        count = _parts(path, math.ceil(size / limit)) if divide else 1
        for index in range(count):
            share = size // count
            if not units or used + share > limit:
                units.append([])
                used = 0
            units[-1].append(File(Part(path, index, count), size, changed))
            used += share
    return units


def _parts(path: Path, wanted: int) -> int:
    """Returns into how many parts to divide a file of `wanted` units."""
    if wanted <= 1:
        return 1
    try:
        most = formats.most_parts(path)
    except formats.UNREADABLE:
        return 1
    return wanted if most is None else min(wanted, most)


def size_of(unit: Unit) -> int:
    """Returns the bytes of files in a unit."""
    return sum(len(file.part.of(file.size)) for file in unit)


class Queue:
    """The units that are left; threads of this process take from it.

    Args:
      job: of the cache.
      numbers: of the units whose shards may be missing.
      found: called with the number of each unit whose shard is complete already, and
        of each that another process completes.
    """

    def __init__(
        self, job: Job, numbers: Sequence[int], found: Callable[[int], None]
    ) -> None:
        self._job, self._found = job, found
        self._left = list(numbers)
        random.shuffle(self._left)
        self._lock = threading.Lock()
        self._taken: set[int] = set()  # by threads of this process
        self._next_look = 0.0  # when to look again, after all that are left were locked
        self.stopped = False

    def take(self) -> Iterator[int]:
        """Yields numbers of units to write, until all shards are complete.

        A unit belongs to the caller until it asks for the next one.
        """
        while not self.stopped:
            with contextlib.ExitStack() as stack:
                number = self._find(stack)
                if number is not None:
                    try:
                        yield number
                    finally:
                        with self._lock:
                            self._taken.discard(number)
                            if self._job.shard(number).exists():
                                self._left.remove(number)
                    continue
            if not self._left:
                return
            time.sleep(POLL_S)

    def _find(self, stack: contextlib.ExitStack) -> int | None:
        """Locks a unit until `stack` ends; returns None if none is free now."""
        with self._lock:
            start = time.monotonic()
            if start < self._next_look:
                return None
            for number in list(self._left):
                if number in self._taken:
                    continue
                with contextlib.ExitStack() as own:
                    if self._lock_unit(number, own):
                        stack.push(own.pop_all())
                        self._taken.add(number)
                        return number
            # Many hosts look at the same files: a tenth of the time at most.
            now = time.monotonic()
            self._next_look = now + max(POLL_S, 10 * (now - start))
            return None

    def _lock_unit(self, number: int, stack: contextlib.ExitStack) -> bool:
        """Locks a unit, unless another process has it or its shard is complete."""
        shard = self._job.shard(number)
        claim = shard.with_name(f"{shard.name}.claim")
        if not stack.enter_context(_claimed(claim)):
            return False
        if shard.exists():
            if token_shard.find_damage(shard) is None:
                self._left.remove(number)
                self._found(number)
                return False
            remove(shard)
        return True


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Yields whether this process has the lock of a file; it has it in the body."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # the file system has no locks
            pass
        yield True


def remove(path: Path) -> None:
    """Removes a file or folder, if it is still there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
