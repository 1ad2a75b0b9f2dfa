"""A new folder that appears when it is complete, and never before."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ladder_jax.config import ConfigError
from ladder_jax.run_folder import FILE, Lease


def absolute(out: str | Path) -> Path:
    """The absolute path of a folder to write."""
    if "://" in str(out):
        raise ConfigError(f"out={str(out)!r} is not accepted: it must be a folder here")
    return Path(out).expanduser().absolute()


def require_new(out: Path) -> None:
    """Raises ConfigError where `out` exists and is no empty folder, or has no name."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"out={str(out)!r} is not accepted: it exists already. Choose another "
            "folder, or remove it"
        )
    if not out.name:
        raise ConfigError(f"out={str(out)!r} is not accepted: it must name a folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `out` when the body succeeds.

    It stands beside `out`. If the body fails, it is removed. A process that is killed
    leaves it; the next call for the same `out` empties it and starts again, and raises
    ConfigError while another process still writes there.
    """
    require_new(out)
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Lease(part, "out"):
            _empty(part)
            try:
                yield part
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        require_new(out)
        part.rename(out)
    except OSError as error:
        if error.errno is None:  # not of the file system: one of ours, with its text
            raise
        raise OSError(f"{out} cannot be written: {error.strerror}") from error


def _empty(folder: Path) -> None:
    """Removes everything in a folder but the lease's own files."""
    for path in folder.iterdir():
        if path.name.startswith(FILE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
