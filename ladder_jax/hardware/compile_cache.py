"""Stores compiled programs in a folder, so that the next start does not compile them.

It is JAX's persistent compilation cache. This file chooses the folder, tests that it
works, and removes entries that are damaged: JAX writes an entry in place, so a process
that dies or a full disk leaves half of one. `manifest.json` has the size and a checksum
of each whole entry. A folder that does not work costs one line and no cache.

    <folder>/<versions>/jit_chunk-<key>-cache, ..., manifest.json
"""

import contextlib
import json
import os
import platform
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from ladder_jax.config import ConfigError

T = TypeVar("T")
NONE = "none"  # the name of the folder for no cache
MANIFEST = "manifest.json"
SUFFIX = "-cache"  # of JAX's entries
# Seconds until a folder that does not answer counts as broken: to test it, to read all
# entries.
TEST_SECONDS, READ_SECONDS = 10.0, 120.0
LEAST_FREE = 64 * 2**20  # bytes of the disk
MOST_BYTES = 8 * 2**30  # of all entries; above, the oldest are removed
# An entry that is not in the manifest belongs to a start that died, or to one that
# still runs: it is removed once it is this old.
UNKNOWN_SECONDS = 600.0
UNUSED_DAYS = 30  # after which the entries of other versions are removed


class CompileCache:
    """The folder of compiled programs of this process, or no folder.

    folder: None if there is no cache. line: says which folder, or why there is none.
    """

    def __init__(self, folder: Path | None, line: str) -> None:
        self.folder, self.line = folder, line
        self._errors: list[str] = []  # that JAX warned of
        self._start = time.time()
        self._show = warnings.showwarning
        if folder is not None:
            warnings.showwarning = self._note_error

    def keep(self) -> str | None:
        """Adds the new entries to the manifest: call it once all programs are compiled.

        Returns a line about errors, or None. It raises nothing.
        """
        folder = self.folder
        if folder is None:
            return None
        warnings.showwarning = self._show
        errors = list(self._errors)
        if not any("writing" in error for error in errors):
            try:
                _within(READ_SECONDS, lambda: _update_manifest(folder, self._start))
            except (OSError, ValueError) as error:
                errors.append(str(error))
        if not errors:
            return None
        return (
            f"the compile cache {folder} had {len(errors)} errors, which cost "
            f"time at this start or at the next: {errors[0]}"
        )

    def _note_error(self, message: Any, *args: Any, **options: Any) -> None:
        """Takes the place of warnings.showwarning, for JAX's warnings about entries."""
        text = str(message)
        if text.startswith("Error ") and "persistent compilation cache" in text:
            self._errors.append(" ".join(text.split())[:300])
        else:
            self._show(message, *args, **options)


def use(folder: str | None = None) -> CompileCache:
    """Makes JAX store compiled programs in a folder; it raises nothing.

    Call it after JAX's devices are known, and before programs are compiled.

    Args:
      folder: a local folder; "none": no cache, not even in a folder that the user has
        given JAX (JAX_COMPILATION_CACHE_DIR); None: that folder, or `default_folder`.
    """
    if folder == NONE:
        return _no_cache("no compile cache, as asked for")
    own = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # a flag
    if folder is None and own:
        return CompileCache(None, f"JAX's own settings: compile cache in {own}")
    try:
        path = _absolute(folder) / versions()
        _within(TEST_SECONDS, lambda: _test(path))
        count = _within(READ_SECONDS, lambda: _clean(path))
    except (OSError, ValueError, RuntimeError) as error:
        where = folder or "the default folder"
        return _no_cache(f"no compile cache: {where}: {_line(error)}")
    _set(str(path))
    return CompileCache(path, f"compile cache: {count} programs in {path}")


def _no_cache(line: str) -> CompileCache:
    """Makes JAX store and load no programs, whatever it was given before."""
    jax.config.update("jax_compilation_cache_dir", None)
    reset()
    return CompileCache(None, line)


def _set(path: str) -> None:
    """Gives JAX a folder for programs, however quickly they compiled."""
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    reset()


def reset() -> None:
    """Makes JAX read its settings again: it stays with its first folder otherwise."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def default_folder() -> Path:
    """ladder_jax/compiled in the user's folder for caches.

    Raises RuntimeError if the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    cache = Path(base) if base else Path.home() / ".cache"
    return cache / "ladder_jax" / "compiled"


def versions() -> str:
    """What compiled programs depend on, as a name of a folder.

    JAX's own keys have the versions, too; but programs for a CPU run on no CPU that
    lacks an instruction of it, and a home folder may be on several machines.
    """
    import jaxlib

    name = f"jax{jax.__version__}-jaxlib{jaxlib.__version__}-{jax.default_backend()}"
    if jax.default_backend() == "cpu":
        name += f"-{zlib.crc32(_cpu().encode()):08x}"
    return name


def _cpu() -> str:
    """The kind of this machine's processor and its instructions."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() in ("flags", "Features"):
                return f"{platform.machine()} {line}"
    return f"{platform.machine()} {platform.processor()}"


# ---------------------------------------------------------------- the folder


def _absolute(folder: str | None) -> Path:
    if folder is None:
        return default_folder()
    if "://" in folder:
        raise ConfigError("it must be a folder of this machine's file system")
    return Path(folder).expanduser().absolute()


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Returns work(). A folder of a dead file server never answers: OSError then."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="compile cache", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise OSError(f"the folder did not answer within {seconds:g} s")
    return results[0]


def _test(path: Path) -> None:
    """Raises OSError unless files can be written to the folder and read back."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Whoever can write here can make this process run code: that is how JAX loads
    # programs.
    if (owner := path.stat().st_uid) not in (0, os.geteuid()):
        raise OSError(f"{path} belongs to another user ({owner})")
    if path.stat().st_mode & 0o002:
        raise OSError(f"{path} can be written by every user")
    free = shutil.disk_usage(path).free
    if free < LEAST_FREE:
        raise OSError(f"only {free / 2**20:.0f} MiB of the disk are free")
    probe, data = path / f"probe-{os.getpid()}", os.urandom(1 << 12)
    try:
        probe.write_bytes(data)
        if probe.read_bytes() != data:
            raise OSError(f"{path} does not give back what was written")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _clean(path: Path) -> int:
    """Removes what is damaged, and the oldest above MOST_BYTES; returns what is left.

    It also removes the folders of other versions that were not used for UNUSED_DAYS.
    """
    known, now = _read_manifest(path), time.time()
    entries = []  # (age, size, file)
    for file in path.glob(f"*{SUFFIX}"):
        is_plain = file.is_file() and not file.is_symlink()
        age, size = now - file.lstat().st_mtime, file.lstat().st_size
        if is_plain and file.name in known:
            is_whole = known[file.name] == _checksum(file)
        else:
            is_whole = is_plain and age < UNKNOWN_SECONDS
        if is_whole:
            entries.append((age, size, file))
        else:
            _remove(file)
    total = sum(size for _, size, _ in entries)
    for _, size, file in sorted(entries, reverse=True):
        if total <= MOST_BYTES:
            break
        _remove(file)
        total -= size
    for manifest in path.parent.glob(f"jax*/{MANIFEST}"):
        unused = now - manifest.stat().st_mtime
        if manifest.parent != path and unused > UNUSED_DAYS * 86400:
            _remove(manifest.parent)
    return sum(file.exists() for *_, file in entries)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _read_manifest(path: Path) -> dict[str, list[int]]:
    """{name: [size, checksum]} of the whole entries; {} if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((path / MANIFEST).read_bytes())
        if isinstance(values, dict):
            return values
    return {}


def _update_manifest(path: Path, since: float) -> None:
    """Writes the manifest of all entries that are there, with a new date.

    since: when the entries of the old manifest were whole (time.time).
    """
    known, entries = _read_manifest(path), {}
    for file in path.glob(f"*{SUFFIX}"):
        if file.is_file():
            is_old = file.name in known and file.stat().st_mtime < since - 1
            entries[file.name] = known[file.name] if is_old else _checksum(file)
    new = path / f"{MANIFEST}-{os.getpid()}"
    new.write_text(json.dumps(entries))
    new.replace(path / MANIFEST)  # a reader sees the old one or the new one


def _checksum(file: Path) -> list[int]:
    data = file.read_bytes()
    return [len(data), zlib.crc32(data)]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
