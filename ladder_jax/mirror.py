"""A run whose train.out is in an object store: s3://bucket/run.

A run appends to files, renames them and holds a lease, which a store cannot do. So it
works in a folder of this machine (`work_folder`), and a thread of process 0 copies what
changed to the store: a checkpoint once it is complete, its meta last, so that readers
(storage.fetch_checkpoints) find whole ones alone; other files every INTERVAL_S seconds.

The store has a lease of its own, lease.json: the process that writes there, and a
number that grows while it lives.
"""

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ladder_jax import checkpoint, files, run_folder, storage
from ladder_jax.addresses import is_address, local_path
from ladder_jax.config import ConfigError, Train
from ladder_jax.say import Say

INTERVAL_S = 30.0  # from one copy of what changed to the next
STALE_S = 120.0  # after which a lease whose number does not grow is that of a dead job
MOST_FAILING_S = 1800.0  # after which a run stops whose store does not take its files
CHECKPOINTS = "checkpoints"
LEASE = run_folder.FILE
INDEX = ".mirror.json"  # {file: [size, time here, version in the store]}
log = logging.getLogger(__name__)


def work_folder(options: Train) -> Path:
    """The folder of this machine in which a run works: train.out, if it is a path.

    For an address it is a folder of its own in train.work_dir.
    """
    if not is_address(options.out):
        return local_path(options.out, "train.out")
    base = options.work_dir or str(storage.cache_folder().parent / "runs")
    address = options.out.rstrip("/")
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    name = PurePosixPath(address).name
    return local_path(base, "train.work_dir") / f"{name}-{digest}"


@contextlib.contextmanager
def of_run(options: Train, leads: bool) -> Iterator["Mirror | None"]:
    """Yields the Mirror of a run, which copies for the last time when the body ends.

    None where train.out is a path, or this process does not lead its group.
    """
    if not (leads and is_address(options.out)):
        yield None
        return
    mirror = Mirror(
        options.out.rstrip("/"), work_folder(options), options.keep_checkpoints
    )
    try:
        yield mirror
    except BaseException:
        try:
            mirror.end()
        except OSError as error:  # the body's error is the one to report
            log.warning("%s", error)
        raise
    mirror.end()


class Mirror:
    """The copy of a run's folder at an address; see the module.

    Args:
      address: where the run's files go.
      folder: in which the run works.
      keep: how many checkpoints stay in the store, beside those of `folder`.

    Attributes:
      failed: the last error of a copy; None where the last one succeeded.
    """

    def __init__(self, address: str, folder: Path, keep: int) -> None:
        self.address, self.folder, self.keep = address, folder, keep
        self.failed: OSError | None = None
        self._failing_since = 0.0  # time.monotonic()
        self._say: Say = log.warning
        self._store: Any = None  # an fsspec.AbstractFileSystem, once `begin` has run
        self._root = ""
        self._there: dict[str, str] = {}  # file -> its version in the store, or ""
        self._others: dict[int, Mapping[str, str]] = {}  # step -> all files at address
        self._changing = threading.Lock()  # held to change `_there`, INDEX and files
        self._lease: Lease | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    # ------------------------------------------------------------ start and end

    def begin(self, resume: bool, say: Say) -> None:
        """Takes the lease, copies a newer checkpoint from the store, starts the thread.

        Args:
          resume: whether the run continues what is in the store.
          say: gets a line where files are copied, or the store fails.

        Raises ConfigError where the store cannot be written to, another job writes to
        this address, or it holds a run and `resume` is false; OSError where the store
        fails until the last try.
        """
        self._say = say
        self._store, self._root = storage.open_store(self.address, "train.out")
        listed = self._tried(self._list)
        steps = _steps(listed)
        if steps and not resume:
            raise ConfigError(
                f"{self.address} already holds a run, at step {max(steps)}: "
                "continue it with --resume, or choose another --train.out"
            )
        self._lease = Lease(self.address, self._store, f"{self._root}/{LEASE}")
        try:
            self._tried(self._lease.acquire)
        except (FileNotFoundError, PermissionError) as error:
            raise ConfigError(
                f"train.out={self.address!r} is not accepted: it cannot be written to "
                f"({' '.join(str(error).split())})"
            ) from None
        index = self._read_index()
        self._there = {
            name: index[name][2] if name in index and index[name][2] == version else ""
            for name, version in listed.items()
        }
        self._bring_newest(listed)
        say(f"{self.address} gets the files of {self.folder}")
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def _bring_newest(self, listed: Mapping[str, str]) -> None:
        """Copies the newest checkpoint, if the store has a newer one than `folder`, and
        the files beside it; where its meta is damaged, the one before it, too.
        """
        here, there = _steps(_files(self.folder)), _steps(listed)
        self._others = {step: listed for step in there - here}
        if there and max(there) > max(here, default=-1):
            self._fetch([name for name in listed if _step(name) is None], listed)
        for step in sorted(here | there if there else (), reverse=True):
            self.bring(step)
            if checkpoint.has_meta(self.folder / CHECKPOINTS / str(step)):
                break  # else a reader says so, and takes the one before it

    def others(self) -> list[int]:
        """The steps of the store's checkpoints that are not in `folder`."""
        return sorted(self._others)

    def bring(self, step: int) -> None:
        """Copies a checkpoint to `folder` if it is one of `others`.

        Raises OSError where the store fails.
        """
        if (listed := self._others.pop(step, None)) is None:
            return
        names = [name for name in listed if _step(name) == step]
        self._say(f"copying {len(names)} files of {self.address}, at step {step}")
        with self._changing:
            self._fetch(names, listed)
            place = self.folder / CHECKPOINTS / str(step)
            _part_of(place).replace(place)

    def check(self) -> None:
        """Raises OSError where the run should stop: another job writes to the address,
        or the store has failed for MOST_FAILING_S seconds. Call before each save.
        """
        if self._lease is not None and self._lease.lost:
            raise OSError(self._lease.lost)
        failing = time.monotonic() - self._failing_since
        if self.failed is not None and failing > MOST_FAILING_S:
            raise OSError(f"{self.failed}, for {failing / 60:.0f} minutes{self._rest}")

    def end(self) -> None:
        """Copies what is left, and gives the lease back.

        Raises OSError where the store does not take it.
        """
        if self._lease is None:  # `begin` did not come so far
            return
        if self._thread is None:
            return self._lease.release()
        self._ended.set()
        self._thread.join()
        try:
            self._renew_and_copy()
        except OSError as error:
            rest = "" if self._lease.lost else self._rest
            raise OSError(f"{error}{rest}") from None
        self._lease.release()

    @property
    def _rest(self) -> str:
        return (
            f"; the run's files are in {self.folder}: give the same command with "
            "--resume here once the store answers"
        )

    # ------------------------------------------------------------ to the store

    def _run(self) -> None:
        """Copies and renews the lease until `end` (a thread)."""
        while not self._ended.wait(INTERVAL_S):
            try:
                self._renew_and_copy()
            except OSError as error:
                if self._lease is not None and self._lease.lost:
                    return  # `check` says it
                if self.failed is None:
                    self._failing_since = time.monotonic()
                    self._say(f"{error}; the run goes on, in {self.folder}")
                self.failed = error
            else:
                if self.failed is not None:
                    self._say(f"{self.address} takes files again")
                self.failed = None

    def _renew_and_copy(self) -> None:
        """`_copy`, unless another job has taken the lease. Raises OSError, one line."""
        assert self._lease is not None
        try:
            self._tried(self._lease.renew)
            if not self._lease.lost:
                with self._changing:
                    return self._copy()
        except (FileNotFoundError, PermissionError) as error:  # not tried again
            reason = " ".join(str(error).split())
            raise OSError(
                f"train.out={self.address!r} cannot be written: {reason}"
            ) from None
        raise OSError(self._lease.lost)

    def _copy(self) -> None:
        """Copies what changed, checkpoints first, and removes what `folder` removed."""
        here = _files(self.folder)
        index, steps = self._read_index(), _steps(here)
        order = sorted(here, key=_order)
        try:
            for name in order:
                step, known = _step(name), index.get(name)
                if step is not None and step not in steps:
                    continue  # it is not complete
                if _is_meta(name) and not self._is_whole(step, here):
                    continue  # the run removes it now
                if known and known[:2] == here[name] and name in self._there:
                    if known[2] == self._there[name]:
                        continue
                self._put(name)
                index[name] = [*here[name], self._there[name]]
            self._remove(steps)
        finally:
            kept = {name: row for name, row in index.items() if name in self._there}
            files.write_text(self.folder / INDEX, json.dumps(kept))

    def _is_whole(self, step: int | None, here: Mapping[str, Any]) -> bool:
        """Whether all files of a checkpoint are there still."""
        own = [name for name in here if _step(name) == step]
        return all((self.folder / name).exists() for name in own)

    def _put(self, name: str) -> None:
        path, target = self.folder / name, f"{self._root}/{name}"

        def put() -> str:
            if path.exists():  # Orbax may have removed an old checkpoint meanwhile
                self._store.put_file(str(path), target)
                self._store.invalidate_cache()
                return storage.version(self._store.info(target))
            return ""

        self._there[name] = self._tried(put)

    def _remove(self, here: set[int]) -> None:
        """Removes checkpoints that the run removed, and those that are not its newest.

        here: the steps in `folder`. If there is none, nothing is removed.
        """
        if not here:
            return
        known = {step for name in self._there if (step := _step(name)) is not None}
        newest = sorted(known | here)[-self.keep :]
        surplus = {
            step
            for step in known - here
            if step > max(here) or step not in newest or step in self._seen_here()
        }
        names = [name for name in self._there if _step(name) in surplus]
        for name in sorted(names, key=_order, reverse=True):  # the meta first
            with contextlib.suppress(FileNotFoundError):
                self._tried(partial(self._store.rm_file, f"{self._root}/{name}"))
            del self._there[name]

    def _seen_here(self) -> set[int]:
        """The steps that this folder has had."""
        return _steps(self._read_index())

    # ------------------------------------------------------------ from the store

    def _fetch(self, names: list[str], listed: Mapping[str, str]) -> None:
        """Copies files to `folder`; those of a checkpoint into a part of its own."""
        index = self._read_index()
        for name in names:
            target = self.folder / name
            if (step := _step(name)) is not None:
                place = self.folder / CHECKPOINTS / str(step)
                target = _part_of(place) / target.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(target) as file:
                source = f"{self._root}/{name}"
                self._tried(partial(self._store.get_file, source, str(file)), "read")
            about = target.stat()
            index[name] = [about.st_size, about.st_mtime_ns, listed[name]]
            self._there[name] = listed[name]
        files.write_text(self.folder / INDEX, json.dumps(index))

    def _list(self) -> dict[str, str]:
        """{file: its version} of all files at the address but the lease."""
        self._store.invalidate_cache()
        found = self._store.find(self._root, detail=True)
        start = len(self._root) + 1
        versions = {path[start:]: storage.version(a) for path, a in found.items()}
        return {name: v for name, v in versions.items() if name and name != LEASE}

    def _tried(self, action: Any, verb: str = "written") -> Any:
        return storage.tried(action, f"train.out={self.address!r}", self._say, verb)

    def _read_index(self) -> dict[str, list[Any]]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.folder / INDEX).read_text(encoding="utf-8")))
        return {}


# ---------------------------------------------------------------- the store's lease


class Lease:
    """lease.json in a store: one job at a time writes there.

    Two jobs that start in the same moment may both find none. Then the job whose file
    the other replaced sees it at its next renewal, and stops.

    Attributes:
      lost: why the lease is another job's now; empty where it is this job's.
    """

    def __init__(self, address: str, store: Any, path: str) -> None:
        self.address, self._store, self._path = address, store, path
        self._own = dict(run_folder.own_process(), beat=0)
        self.lost = ""

    def acquire(self) -> None:
        """Writes the file. Raises ConfigError where another job's grows or its process
        runs here; it waits up to STALE_S seconds to know.
        """
        first, end = self._read(), time.monotonic() + STALE_S
        holder = first
        while holder and run_folder.runs(holder) is not False:
            if run_folder.runs(holder) or holder.get("beat") != first.get("beat"):
                raise ConfigError(
                    f"train.out={self.address!r} is not accepted: "
                    f"{run_folder.name(holder)} writes there. Choose another one or "
                    f"end that process; if it does not run any more, remove {LEASE}"
                )
            if time.monotonic() > end:
                break
            time.sleep(min(5.0, STALE_S / 10))
            holder = self._read()
        self._write()

    def renew(self) -> None:
        """Writes a larger number into the file, or sets `lost`."""
        holder = self._read()
        if holder and holder.get("token") != self._own["token"]:
            self.lost = (
                f"{self.address} is now written to by {run_folder.name(holder)}: this "
                "job stops without another write"
            )
            return
        self._own["beat"] += 1
        self._write()

    def release(self) -> None:
        """Removes the file, if it is this job's and the store answers."""
        with contextlib.suppress(Exception):  # else the next start sees a dead process
            if self._read().get("token") == self._own["token"]:
                self._store.rm_file(self._path)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._store.cat_file(self._path))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        self._store.pipe_file(self._path, json.dumps(self._own).encode())


# ---------------------------------------------------------------- names


def _files(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, time]} of what is to be copied: nothing unfinished, no lease."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        parts = [p for p in name.parts if p.startswith(".") or ".orbax-" in p]
        if parts or str(name) == LEASE:
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                about = path.stat()
                found[name.as_posix()] = [about.st_size, about.st_mtime_ns]
    return found


def _step(name: str) -> int | None:
    """The step of the checkpoint that a file belongs to. None: to none."""
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and parts[0] == CHECKPOINTS and parts[1].isdigit():
        return int(parts[1])
    return None


def _part_of(place: Path) -> Path:
    """Where a checkpoint's folder is until it is whole."""
    return place.with_name(f".{place.name}.part")


def _is_meta(name: str) -> bool:
    return PurePosixPath(name).parts[2:] == storage.META


def _steps(names: Mapping[str, Any]) -> set[int]:
    """The steps of complete checkpoints: those that have a meta."""
    found = {_step(name) for name in names if _is_meta(name)}
    return {step for step in found if step is not None}


def _order(name: str) -> tuple[bool, int, bool, str]:
    """Sorts files: checkpoints by step, the meta of each last; then the others."""
    step = _step(name)
    return step is None, step or 0, _is_meta(name), name
