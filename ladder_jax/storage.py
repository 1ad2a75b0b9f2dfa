"""Addresses of object stores, such as s3://bucket/folder and gs://bucket/folder.

What a job reads may be at an address: it is copied to this machine first, through
fsspec. docs/storage.md has the table of what may be where.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from ladder_jax import files
from ladder_jax.config import ConfigError
from ladder_jax.interrupts import check_interrupted
from ladder_jax.say import Say

# Seconds before each new try of a store that does not answer or fails.
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
COPIES = 8  # files that are copied at one time
INDEX = ".index.json"  # of a copy: {name: version in the store}
# What tells a new version of a file: s3's, then gcs's, then other stores' names.
VERSIONS = ("ETag", "etag", "generation", "LastModified", "updated", "mtime")

# The file of a checkpoint that is written last and removed first: one without it is not
# complete.
META = "meta", "data.json"

T = TypeVar("T")


def cache_folder() -> Path:
    """Where copies of checkpoints go."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ladder_jax" / "storage"


class Listing(NamedTuple):
    """The files at an address."""

    store: Any  # an fsspec.AbstractFileSystem
    root: str  # the address, in the store's own form
    files: dict[str, Mapping[str, Any]]  # path in the store -> what the store says


def fetch_source(address: str, field: str, folder: Path, say: Say) -> str:
    """Copies the files at an address to this machine, and returns where they are.

    A file that an earlier call copied is copied again only if it has changed; one that
    the store does not have any more is removed.

    Args:
      address: of a file, a folder or a glob.
      field: the option that holds it, for messages.
      folder: where copies go. Each address has a folder of its own in it.
      say: gets a line before files are copied, and before a new try.

    Returns the path of the file or folder, or the glob, in the copy.

    Raises ConfigError where there is no file, a package is missing, or the disk has too
    little space; OSError where the store fails until the last try.
    """
    listing = _list(address, field, say)
    target = folder / hashlib.sha256(address.encode()).hexdigest()[:12]
    _copy(listing, listing.files, target, address, say)
    return str(target / listing.root)


class Copies(Sequence[Path]):
    """Checkpoints at an address, newest first: the folders of their copies.

    A checkpoint is copied to `cache_folder` when its folder is asked for, so that a
    reader which finds the newest one good copies no other.
    """

    def __init__(
        self, address: str, listing: Listing, places: list[PurePosixPath], say: Say
    ) -> None:
        self._address, self._listing, self._say = address, listing, say
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        place = self._places[number]
        own = {
            path: about
            for path, about in self._listing.files.items()
            if place in PurePosixPath(path).parents
        }
        key = hashlib.sha256(f"{self._address} {place}".encode()).hexdigest()[:12]
        target = cache_folder() / key
        _copy(self._listing, own, target, self._address, self._say)
        return target / place


def fetch_checkpoints(address: str, step: int | None, say: Say) -> Copies:
    """The checkpoints at an address.

    Args:
      address: of a run's folder, its checkpoints folder or the folder of one step.
      step: the only one; None: all.
      say, errors: as for `fetch_source`.
    """
    listing = _list(address, "checkpoint", say)
    base = PurePosixPath(listing.root)
    folders = {
        PurePosixPath(path).parents[1]
        for path in listing.files
        if PurePosixPath(path).parts[-2:] == META
    }
    places = [base, *(f for f in folders if f.parent in (base, base / "checkpoints"))]
    steps = {int(f.name): f for f in places if f in folders and f.name.isdigit()}
    if not steps or step not in (None, *steps):
        wanted = "" if step is None else f" of step {step}, only {sorted(steps)}"
        raise ConfigError(
            f"{address} holds no checkpoint{wanted}: the address of a run's folder, "
            "its checkpoints folder or the folder of one step is accepted"
        )
    chosen = sorted(steps, reverse=True) if step is None else [step]
    return Copies(address, listing, [steps[number] for number in chosen], say)


def open_store(address: str, field: str) -> tuple[Any, str]:
    """(the fsspec.AbstractFileSystem of an address, the address in its own form).

    Raises ConfigError, which names `field`, where a package is missing.
    """
    try:
        import fsspec

        store, root = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # no such package; no such scheme
        raise ConfigError(
            f"{field}={address!r} is not accepted: {error}. s3:// and gs:// need "
            "pip install 'ladder_jax[storage]'"
        ) from None
    return store, str(root).rstrip("/")


def _list(address: str, field: str, say: Say) -> Listing:
    """The files at an address. Raises as `fetch_source` does."""
    store, root = open_store(address, field)
    look = store.glob if glob.has_magic(root) else store.find

    def found() -> dict[str, Mapping[str, Any]]:
        store.invalidate_cache()
        return dict(look(root, detail=True))

    listed = tried(found, f"{field}={address!r}", say)
    paths = {p: about for p, about in listed.items() if about.get("type") == "file"}
    if not paths:
        raise ConfigError(f"{field}={address!r} is not accepted: there is no file")
    return Listing(store, root.rstrip("/"), paths)


def _copy(
    listing: Listing,
    wanted: Mapping[str, Mapping[str, Any]],
    target: Path,
    address: str,
    say: Say,
) -> None:
    """Makes `target` a copy of the `wanted` files."""
    index = _read_index(target)
    versions = {path: version(about) for path, about in wanted.items()}
    missing = [
        path
        for path, version in versions.items()
        if index.get(path) != version or not _has_size(target / path, wanted[path])
    ]
    for path in index.keys() - versions.keys():
        (target / path).unlink(missing_ok=True)
    kept = {p: v for p, v in versions.items() if p not in missing}
    size = sum(int(wanted[path].get("size") or 0) for path in missing)
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if size > free:
        raise ConfigError(
            f"{address} has {size / 1e9:.1f} GB to copy, and {target} has "
            f"{free / 1e9:.1f} GB free"
        )
    if missing:
        say(f"copying {len(missing)} files, {size / 1e9:.2f} GB, of {address}")

    def copy(path: str) -> None:
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(place) as part:
            tried(lambda: listing.store.get_file(path, str(part)), address, say)

    try:
        with ThreadPoolExecutor(COPIES) as pool:
            for path, _ in zip(missing, pool.map(copy, missing)):
                kept[path] = versions[path]
    finally:  # also after an error: the next call goes on from here
        files.write_text(target / INDEX, json.dumps(kept))


def _has_size(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether a copy has as many bytes as the store says."""
    with contextlib.suppress(OSError):
        return path.stat().st_size == about.get("size", path.stat().st_size)
    return False


def _read_index(target: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((target / INDEX).read_text(encoding="utf-8")))
    return {}


def version(about: Mapping[str, Any]) -> str:
    """What changes when a file of a store changes."""
    known = (str(about[name]) for name in VERSIONS if about.get(name))
    return f"{about.get('size')} {next(known, '')}"


def tried(action: Callable[[], T], what: str, say: Say, verb: str = "read") -> T:
    """The result of `action`, which is tried again while the store fails.

    what, verb: for messages: "data.source='s3://...' cannot be read".

    Raises FileNotFoundError and PermissionError at once, as another try would not help;
    OSError, one line that begins with `what`, after the last try.
    """
    for pause in _pauses():
        try:
            return action()
        except (ConfigError, FileNotFoundError, PermissionError):
            raise
        # Each store's package has errors of its own, which share no class.
        except Exception as error:
            check_interrupted(error)
            reason = " ".join(str(error).split()) or type(error).__name__
            if pause is None:
                raise OSError(
                    f"{what} cannot be {verb}: {reason} ({1 + len(PAUSES_S)} tries)"
                ) from error
            say(f"{what} cannot be {verb}: {reason}; trying again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("the last pause is None")


def _pauses() -> Iterator[float | None]:
    yield from PAUSES_S
    yield None
