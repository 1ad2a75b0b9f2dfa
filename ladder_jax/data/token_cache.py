"""Tokenises a corpus once, writes the ids to disk and memory-maps them.

A cache is a folder `tokens-<fingerprint>` in `data.token_cache`:

- 000000/, 000001/, ...: shards (see `token_shard`), in the order of the documents.
- about.json: the sizes of the shards, a digest of their documents, and what reading
  left out. It is written last: a cache with it is complete.

The fingerprint is of contents: of the files, the tokenizer and the fields of data that
say what to read. Where the files are and when they changed does not matter.

Several processes and hosts may tokenise the same source at the same time: they share
its units of work (see `token_units`). What was finished when a process died is kept. A
damaged shard is written again.

Dims: D documents.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ladder_jax import files as file_tools
from ladder_jax.config import ConfigError, Data
from ladder_jax.data import (
    file_digests,
    formats,
    sources,
    token_shard,
    token_units,
)
from ladder_jax.data.token_progress import Progress, print_to_stderr
from ladder_jax.data.token_shard import ABOUT, Job
from ladder_jax.data.token_units import Queue, Unit, size_of
from ladder_jax.data.token_worker import Worker
from ladder_jax.data.tokenizer import Tokenizer

# The version of a cache's contents. Raise it if the layout of its files changes, or the
# documents that `sources` reads from a file, or the ids of a conversation.
FORMAT = 4
PREFIX = "tokens-"  # of the name of a cache's folder
# A process has this many shards open at a time: each takes a file descriptor.
OPEN_SHARDS = 256

Say = Callable[[str], None]


class Joined:
    """The arrays in one file of each shard, as one; slices are read from disk.

    Args:
      paths: of the files, without those that are empty.
      sizes: of each, in elements.
      dtype: of the elements.
    """

    def __init__(
        self, paths: Sequence[Path], sizes: Sequence[int], dtype: np.dtype
    ) -> None:
        self.dtype = dtype
        self._paths = list(paths)
        self._stops = np.cumsum(np.array(sizes, np.int64))
        self._open = functools.lru_cache(OPEN_SHARDS)(self._open_file)

    def _open_file(self, i: int) -> np.ndarray:
        return np.asarray(np.memmap(self._paths[i], self.dtype, "r"))

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, _ = key.indices(len(self))
        pieces = []
        i = int(np.searchsorted(self._stops, start, side="right"))
        while start < stop:  # one turn, as a document is in one shard
            offset = int(self._stops[i - 1]) if i else 0
            end = min(stop, int(self._stops[i]))
            pieces.append(self._open(i)[start - offset : end - offset])
            start, i = end, i + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, self.dtype), *pieces])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The token ids of a corpus, and the position of each document in them.

    Attributes:
      folder: of the cache.
      ids: all ids, on disk.
      counted: of conversations, whether each of `ids` counts as a target, on disk; None
        if all do.
      documents: how many documents each shard has.
      digest: a hash of all documents, in order.
      left_out, noted, repaired: as in `sources.Tally`.
      damage: the damage of the cache that was mended, or None.
    """

    folder: Path
    ids: Joined
    counted: Joined | None
    documents: list[int]
    digest: str
    left_out: dict[str, int]
    noted: dict[str, int]
    repaired: int
    damage: str | None

    def indexes(self) -> Iterator[np.ndarray]:
        """Yields the `DOCUMENT`s of each shard that has some; stops are of its ids."""
        return _indexes(self.folder, self.documents)


def _indexes(folder: Path, documents: Sequence[int]) -> Iterator[np.ndarray]:
    for number, count in enumerate(documents):
        if count:
            path = folder / f"{number:06}" / "documents.npy"
            yield np.load(path, mmap_mode="r")


def open_cache(
    data_config: Data,
    tokenizer: Tokenizer,
    workers: int | None = None,
    say: Say | None = None,
) -> TokenCache:
    """Opens the cache of `data.source`; tokenises what it lacks first.

    Args:
      data_config: the source, and how to read it.
      tokenizer: encodes.
      workers: processes that tokenise. None: one for each core.
      say: writes lines of progress, where stderr is no terminal.

    Raises:
      ConfigError: if the source is missing or has no usable document, if the tokenizer
        fails, or if the cache cannot be written.
      RuntimeError: if a worker dies, or a file of the source changes meanwhile.
    """
    tally = sources.Tally()
    files = sources.files(data_config.source, tally)
    root = Path(data_config.token_cache).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        total = sum(sources.size_and_time(path)[0] for path in files)
        with Progress("look for changes", total, say) as progress:
            contents = file_digests.digests(files, root, progress.elsewhere)
        folder = root / (PREFIX + _fingerprint(data_config, files, contents, tokenizer))
        damage = find_damage(folder) if folder.exists() else None
        is_complete = (folder / ABOUT).exists() and damage is None
        if not is_complete:
            _mention_old(root, say)
            stated = [(path, c.size, c.time) for path, c in zip(files, contents)]
            _tokenise(data_config, stated, tokenizer, tally, folder, workers, say)
    except token_shard.Changed as error:
        raise RuntimeError(f"{error}: start the same command again") from None
    except OSError as error:
        raise ConfigError(
            f"data.token_cache={data_config.token_cache!r} cannot be written "
            f"({error.strerror or error}): it must be a writable folder"
        ) from None
    return _open(folder, token_shard.dtype_of(tokenizer), damage)


def _fingerprint(
    data_config: Data,
    files: Sequence[Path],
    contents: Sequence[file_digests.Contents],
    tokenizer: Tokenizer,
) -> str:
    """Returns the name of a cache: a hash of everything that decides its contents.

    These are the contents of every file with what its name says of its kind, in order,
    the tokenizer with its chat template, the fields of data that say what to read, and
    FORMAT.
    """
    is_builtin = data_config.source == "builtin"
    # Texts do not depend on the chat template; a source may turn out to be chat.
    is_text = is_builtin or data_config.format == "text"
    values = [
        FORMAT,
        is_builtin,
        data_config.text_field,
        data_config.format,
        data_config.train_on,
        tokenizer.documents_json() if is_text else tokenizer.to_json(),
        [
            (formats.named_kind(path), content.size, content.digest)
            for path, content in zip(files, contents)
        ],
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


# ------------------------------------------------------------------ reading


def _open(folder: Path, dtype: np.dtype, damage: str | None) -> TokenCache:
    """Opens a complete cache. damage: see `TokenCache`."""
    about = token_shard.read_about(folder)
    sizes = {i: ids for i, (ids, _) in enumerate(about["shards"]) if ids}

    def joined(name: str, dtype: np.dtype) -> Joined:
        paths = [folder / f"{i:06}" / name for i in sizes]
        return Joined(paths, list(sizes.values()), dtype)

    is_chat = about["is_chat"]
    return TokenCache(
        folder=folder,
        ids=joined("ids.bin", dtype),
        counted=joined("counted.bin", np.dtype(np.uint8)) if is_chat else None,
        documents=[documents for _, documents in about["shards"]],
        digest=about["digest"],
        left_out=about["left_out"],
        noted=about["noted"],
        repaired=about["repaired"],
        damage=damage,
    )


def find_damage(folder: Path) -> str | None:
    """Returns a description of the damage to a complete cache, or None.

    A cache without about.json is not damaged, but not complete.
    """
    if not os.path.lexists(folder / ABOUT):
        return None
    try:
        shards = token_shard.read_about(folder)["shards"]
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    except (ValueError, KeyError):
        return f"{folder / ABOUT} has other contents than were written"
    damages = (token_shard.find_damage(folder / f"{i:06}") for i in range(len(shards)))
    return next(filter(None, damages), None)


# ------------------------------------------------------------------ all caches


class Entry(NamedTuple):
    """A cache, complete or not."""

    name: str  # the fingerprint, as in the name of its folder
    size: int  # bytes of its files
    time: float  # of its last change, s
    source: str | None  # `data.source` when it was written; None: unknown
    documents: int | None  # None: it is not complete
    is_old: bool  # whether an older version wrote it, and this one cannot read it


def entries(root: Path) -> list[Entry]:
    """Returns the caches in a folder, the oldest first."""
    found = []
    for folder in root.glob(f"{PREFIX}*"):
        if not folder.is_dir():
            continue
        source, documents = None, None
        is_old = (folder / "ids.bin").exists()
        try:
            about = token_shard.read_about(folder)
            is_old = is_old or about.get("format") != FORMAT
            if not is_old:
                source = about["source"]
                documents = sum(count for _, count in about["shards"])
        except (OSError, ValueError, KeyError):  # not complete, or damaged
            pass
        states = [path.stat() for path in folder.rglob("*") if path.is_file()]
        size = sum(state.st_size for state in states)
        last = max([folder.stat().st_mtime, *(state.st_mtime for state in states)])
        name = folder.name.removeprefix(PREFIX)
        found.append(Entry(name, size, last, source, documents, is_old))
    return sorted(found, key=lambda entry: entry.time)


def _mention_old(root: Path, say: Say | None) -> None:
    """Says that caches of older versions are not read, if there are some."""
    count = sum(entry.is_old for entry in entries(root))
    if count:
        line = f"{count} token caches in {root} are of an older version, and not used: "
        line += "ladder-jax tokenize --remove old"
        (say or print_to_stderr)(line)


# ------------------------------------------------------------------ tokenising


def cores() -> int:
    """Returns how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _tokenise(
    data_config: Data,
    files: Sequence[tuple[Path, int, int]],
    tokenizer: Tokenizer,
    tally: sources.Tally,
    folder: Path,
    workers: int | None,
    say: Say | None,
) -> None:
    """Writes the shards of a cache that are not there, and then its about.json."""
    is_chat = sources.holds_chat(data_config, [path for path, *_ in files])
    units = token_units.plan(files, divide=data_config.source != "builtin")
    checked = max(token_shard.CHECKSUM_BYTES // max(len(units), 1), 1 << 16)
    job = Job(folder, data_config, tokenizer, is_chat, checked)
    folder.mkdir(exist_ok=True)
    with Progress("tokenise", sum(map(size_of, units)), say) as progress:
        _write_shards(job, units, workers or cores(), progress)
    _finish(job, len(units), tally)


def _write_shards(
    job: Job, units: Sequence[Unit], workers: int, progress: Progress
) -> None:
    """Returns when all shards are complete, whichever process writes them.

    One worker, or one unit, needs no process of its own.
    """
    found = lambda number: progress.elsewhere(size_of(units[number]))
    queue = Queue(job, range(len(units)), found)
    missing = sum(not job.shard(number).exists() for number in range(len(units)))
    workers = min(workers, missing)
    if workers <= 1:
        for number in queue.take():
            report = functools.partial(progress.update, number)
            token_shard.write(job, number, units[number], report)
            progress.finish(number, size_of(units[number]))
        return
    errors: list[BaseException] = []
    started: list[Worker] = []
    with contextlib.ExitStack() as stack:

        def work(worker: Worker) -> None:
            try:
                for number in queue.take():
                    report = functools.partial(progress.update, number)
                    worker.write(number, units[number], report)
                    progress.finish(number, size_of(units[number]))
            except BaseException as error:
                errors.append(error)
                queue.stopped = True
                for other in started:
                    other.kill()

        for _ in range(workers):
            started.append(stack.enter_context(Worker(job)))
        threads = [threading.Thread(target=work, args=[w]) for w in started]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C
            queue.stopped = True
            for worker in started:
                worker.kill()
            raise
    if errors:  # the first one; the others died of it
        raise errors[0]


def _finish(job: Job, count: int, tally: sources.Tally) -> None:
    """Writes about.json of a cache whose `count` shards are complete.

    Raises ConfigError where there is no document.
    """
    abouts = [token_shard.read_about(job.shard(number)) for number in range(count)]
    for about in abouts:
        tally.left_out.update(about["left_out"])
        tally.noted.update(about["noted"])
        tally.repaired += about["repaired"]
    documents = [about["documents"] for about in abouts]
    if not sum(documents):
        token_units.remove(job.folder)
        raise sources.no_document(job.data_config, tally, job.is_chat)
    # The rows do not tell what a chat template makes of them.
    settings = job.tokenizer.to_json() if job.is_chat else ""
    whole = {
        "format": FORMAT,
        "source": job.data_config.source,
        "is_chat": job.is_chat,
        "digest": _digest(job.folder, documents, settings),
        "shards": [[about["ids"], about["documents"]] for about in abouts],
        "bytes": sum(about["bytes"] for about in abouts),
        # Without the kinds whose count is 0.
        "left_out": +tally.left_out,
        "noted": +tally.noted,
        "repaired": tally.repaired,
    }
    path = job.folder / ABOUT
    if path.is_dir():
        token_units.remove(path)
    file_tools.write_text(path, token_shard.about_text(whole))
    for path in job.folder.glob("[0-9]*.*"):
        token_units.remove(path)  # locks, and what processes that died did not finish


def _digest(folder: Path, documents: Sequence[int], settings: str) -> str:
    """Returns a hash of the sizes and hashes of all documents, and of `settings`."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for field in ("bytes", "hash"):
        for index_D in _indexes(folder, documents):
            digest.update(np.ascontiguousarray(index_D[field]).data)
    return digest.hexdigest()
