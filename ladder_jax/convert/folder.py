"""A new folder that appears when it is complete, and never before."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from ladder_jax.addresses import local_path
from ladder_jax.config import ConfigError
from ladder_jax.run_folder import FILE, Lease


def absolute(out: str | Path) -> Path:
    """The absolute path of a folder to write."""
    return local_path(out, "out").absolute()


def require_new(out: Path) -> None:
    """Raises ConfigError where `out` exists and is no empty folder, or cannot be."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"out={str(out)!r} is not accepted: it exists already. Choose another "
            "folder, or remove it"
        )
    parent = _there(out)
    if not parent.is_dir():
        raise ConfigError(f"out={str(out)!r} is not accepted: {parent} is no folder")
    if not out.name:
        raise ConfigError(f"out={str(out)!r} is not accepted: it must name a folder")


def free_disk(out: Path) -> int | None:
    """The bytes that `out` can take: those that are free, and those that a conversion
    which was cut off takes. None where the file system does not say."""
    left = (path for path in _part(out).rglob("*") if path.is_file())
    with contextlib.suppress(OSError):
        taken = sum(path.stat().st_size for path in left)
        return shutil.disk_usage(_there(out)).free + taken
    return None


def _there(out: Path) -> Path:
    """The nearest of a path and its parents that exists."""
    return next(path for path in (out, *out.parents) if path.exists())


def _part(out: Path) -> Path:
    """The folder that is renamed to `out` when it is complete."""
    return out.with_name(f".{out.name}.part")


class Kept(Protocol):
    """What a conversion that was cut off leaves for the next one.

    Attributes:
      lost: why `clean` found nothing to go on with in a folder that was not empty; ""
        where it found something, or there was nothing.
    """

    lost: str

    def clean(self, part: Path) -> None:
        """Removes everything from a folder that the next conversion cannot use."""
        ...

    def keep(self, part: Path) -> bool:
        """The same after a failure. Returns whether anything is left."""
        ...


def kept_text(kept: Kept, whole: int, count: int, kind: str) -> str:
    """A line about what a conversion goes on with, "" if it is the first one.

    whole, count: how many of its parts are there, and how many there will be.
    kind: their name, such as files.
    """
    if whole:
        return f"{whole} of {count} {kind} are there already"
    if kept.lost:
        return f"starts over after one that was cut off: {kept.lost}"
    return ""


@contextlib.contextmanager
def new_folder(out: Path, kept: Kept | None = None) -> Iterator[Path]:
    """Yields a folder that is renamed to `out` when the body succeeds.

    It stands beside `out`, and is empty but for what `kept` left in it. If the body
    fails, it is removed, unless `kept` keeps something. A process that is killed leaves
    it; the next call for the same `out` takes it over, and raises ConfigError while
    another process still writes there.
    """
    require_new(out)
    part = _part(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Lease(part, "out"):
            remove_all(part) if kept is None else kept.clean(part)
            try:
                yield part
                _sync(part)
            except BaseException:
                if kept is None or not kept.keep(part):
                    shutil.rmtree(part, ignore_errors=True)
                raise
        require_new(out)
        part.rename(out)
    except OSError as error:
        if error.errno is None:  # not of the file system: one of ours, with its text
            raise
        raise OSError(f"{out} cannot be written: {error.strerror}") from error


def contents(folder: Path) -> list[Path]:
    """What a folder holds, without the lease's own files."""
    return [path for path in folder.iterdir() if not path.name.startswith(FILE)]


def remove_all(folder: Path, but: Collection[str] = ()) -> None:
    """Removes everything in a folder but these names and the lease's own files."""
    for path in contents(folder):
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    """Makes the disk write the files of a folder, before it gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
