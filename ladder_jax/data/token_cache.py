"""Tokenises a corpus once, writes the ids to disk and memory-maps them.

A cache is a folder `tokens-<fingerprint>` in `data.token_cache`:

- ids.bin: the ids of all documents, each as bos, text, eos; or a conversation each.
- counted.bin: of conversations alone: a byte for each id, 1 if it counts as a target.
- documents.npy: an array of `DOCUMENT`, one element a document.
- about.json: dtype, sizes and checksums of these, and what reading left out.

The process that tokenises writes the files in a folder of its own and then renames it:
a cache is complete or absent. If a cache is damaged later, it is written again.

Dims: D documents.
"""

import array
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from ladder_jax.config import ConfigError, Data
from ladder_jax.data import chat, sources
from ladder_jax.data.tokenizer import Tokenizer

# The version of a cache's contents. Raise it if the layout of its files changes, or the
# documents that `sources` reads from a file, or the ids of a conversation.
FORMAT = 3
# A longer document is tokenised in pieces of this many characters, cut at line ends.
PIECE_CHARACTERS = 1 << 20
# One call of the tokenizer has about this many characters.
BATCH_CHARACTERS = 1 << 22
# If no process has written to an unfinished cache for so long, its process has died.
STALE_SECONDS = 86400
# A checksum covers at most this many bytes, in blocks spread over the file.
CHECKSUM_BYTES = 1 << 30
CHECKSUM_BLOCK = 1 << 20

# stop: where the document ends in ids.bin, in ids; bytes: of its text in UTF-8 (of a
# conversation, of the text of its targets that count); hash: `document_hash`.
DOCUMENT = np.dtype([("stop", "<u8"), ("bytes", "<u8"), ("hash", "<u8")])


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The token ids of a corpus, and the position of each document in them.

    Attributes:
      ids: all ids, memory-mapped.
      documents_D: `DOCUMENT` of each document.
      counted: of conversations, whether each of `ids` counts as a target,
        memory-mapped; None if all do.
      left_out, noted, repaired: as in `sources.Tally`.
      damage: the damage of the cache that this one replaces, or None.
    """

    ids: np.ndarray
    documents_D: np.ndarray
    counted: np.ndarray | None
    left_out: dict[str, int]
    noted: dict[str, int]
    repaired: int
    damage: str | None


def document_hash(raw: bytes) -> int:
    """Returns a 64-bit hash of a document, which is given as UTF-8."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def conversation_hash(messages: list[dict[str, str]]) -> int:
    """Returns `document_hash` of a conversation: it depends on no chat template."""
    return document_hash(json.dumps(messages, sort_keys=True).encode())


def open_cache(data_config: Data, tokenizer: Tokenizer) -> TokenCache:
    """Opens the cache of `data.source`; tokenises the source first if there is none.

    If two processes tokenise the same corpus, the second one to finish deletes its own
    files and opens those of the first.

    Raises:
      ConfigError: if the source is missing or has no usable document, if the tokenizer
        fails, or if the cache cannot be written.
    """
    tally = sources.Tally()
    files = sources.files(data_config.source, tally)
    root = Path(data_config.token_cache).expanduser()
    folder = root / f"tokens-{_fingerprint(data_config, files, tokenizer)}"
    damage = None
    if folder.exists():
        damage = find_damage(folder)
        if damage is None:
            return _open(folder, None)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root, folder.name)
        working = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=root))
        try:
            working.chmod(0o755)
            _tokenise(data_config, files, tokenizer, tally, working)
            _rename(working, folder)
        finally:
            shutil.rmtree(working, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"data.token_cache={data_config.token_cache!r} cannot be written "
            f"({error.strerror or error}): it must be a writable folder"
        ) from None
    return _open(folder, damage)


def _fingerprint(data_config: Data, files: list[Path], tokenizer: Tokenizer) -> str:
    """Returns the name of a cache: a hash of everything that decides its contents.

    These are the path, size and time of every file, the tokenizer with its chat
    template, the fields of data that say what to read, and FORMAT.
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
        [(os.path.abspath(path), *sources.size_and_time(path)) for path in files],
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _remove_stale(root: Path, name: str) -> None:
    """Removes the unfinished caches of processes that have died."""
    for working in root.glob(f"{name}.*"):
        paths = working, working / "ids.bin"
        last_write = max(sources.size_and_time(path)[1] for path in paths)
        if time.time_ns() - last_write > STALE_SECONDS * 10**9:
            shutil.rmtree(working, ignore_errors=True)


def _rename(working: Path, folder: Path) -> None:
    """Renames a complete cache, unless another process has written it by now."""
    try:
        working.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        if find_damage(folder) is None:
            return
        damaged = working.with_name(f"{working.name}.damaged")
        folder.rename(damaged)
        working.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)


# ------------------------------------------------------------------ reading


def _open(folder: Path, damage: str | None) -> TokenCache:
    """Opens a complete cache. damage: see `TokenCache`."""
    about = _read_about(folder)
    counted = None
    if "counted.bin" in about["files"]:
        counted = np.asarray(np.memmap(folder / "counted.bin", np.uint8, "r"))
    return TokenCache(
        ids=np.asarray(np.memmap(folder / "ids.bin", about["dtype"], "r")),
        documents_D=np.load(folder / "documents.npy"),
        counted=counted,
        left_out=about["left_out"],
        noted=about["noted"],
        repaired=about["repaired"],
        damage=damage,
    )


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes about.json, with a checksum of its own contents."""
    checksum = zlib.crc32(json.dumps(about).encode())
    (folder / "about.json").write_text(json.dumps(about | {"checksum": checksum}))


def _read_about(folder: Path) -> dict[str, Any]:
    """Returns what `_write_about` wrote. Raises ValueError for anything else."""
    about = json.loads((folder / "about.json").read_text())
    checksum = about.pop("checksum", None) if isinstance(about, dict) else None
    if checksum != zlib.crc32(json.dumps(about).encode()):
        raise ValueError("about.json has other contents than were written")
    return about


def find_damage(folder: Path) -> str | None:
    """Returns a description of the damage to the cache in `folder`, or None."""
    try:
        files = _read_about(folder)["files"]
        for name, expected in files.items():
            if size_and_checksum(folder / name) != expected:
                return f"{folder / name} has other contents than were written"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    except ValueError:
        return f"{folder / 'about.json'} has other contents than were written"
    return None


def size_and_checksum(path: Path) -> list[int]:
    """Returns [bytes, CRC-32] of a file.

    The checksum of a file of more than CHECKSUM_BYTES is that of every n-th block, and
    of the last one.
    """
    size = path.stat().st_size
    block_starts = range(0, size, CHECKSUM_BLOCK)
    stride = math.ceil(len(block_starts) * CHECKSUM_BLOCK / CHECKSUM_BYTES) or 1
    checksum = 0
    with open(path, "rb") as file:
        for start in sorted({*block_starts[::stride], *block_starts[-1:]}):
            file.seek(start)
            checksum = zlib.crc32(file.read(CHECKSUM_BLOCK), checksum)
    return [size, checksum]


# ------------------------------------------------------------------ tokenising


class _Piece(NamedTuple):
    """A part of a document."""

    text: str
    is_first: bool  # of its document
    document: tuple[int, int] | None  # in the last piece: the document's (bytes, hash)


def _pieces(text: str) -> Iterator[_Piece]:
    """Yields the pieces of a document."""
    raw, start = text.encode(), 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        stop = text.rfind("\n", start, end) + 1 or end
        yield _Piece(text[start:stop], start == 0, None)
        start = stop
    yield _Piece(text[start:], start == 0, (len(raw), document_hash(raw)))


def _batches(
    data_config: Data, files: list[Path], tally: sources.Tally
) -> Iterator[list[_Piece]]:
    """Yields the pieces of all documents, about BATCH_CHARACTERS at once."""
    batch: list[_Piece] = []
    size = 0
    for path in files:
        texts = sources.read(data_config.source, path, data_config.text_field, tally)
        for text in texts:
            for piece in _pieces(text):
                batch.append(piece)
                size += len(piece.text)
                if size >= BATCH_CHARACTERS:
                    yield batch
                    batch, size = [], 0
    yield batch


class _Writer:
    """Writes the files of a cache, document by document.

    Args:
      folder: where they are written.
      size: of the tokenizer.
      is_chat: whether the documents are conversations.
    """

    def __init__(self, folder: Path, size: int, is_chat: bool) -> None:
        self._folder = folder
        self._dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4")
        self._names = ["ids.bin", *(["counted.bin"] if is_chat else [])]
        self._stop = 0
        # stop, bytes and hash of each document, one after the other. An array takes 24
        # bytes a document; a list would take 150.
        self._document_fields = array.array("Q")

    def __enter__(self) -> Self:
        self._files = [open(self._folder / name, "wb") for name in self._names]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def write(self, ids: list[int], counted: list[bool] | None = None) -> None:
        """Writes ids, and for conversations which of them count."""
        self._files[0].write(np.array(ids, self._dtype).tobytes())
        if counted is not None:
            self._files[1].write(np.array(counted, np.uint8).tobytes())
        self._stop += len(ids)

    def end_document(self, size: int, hash: int) -> None:
        """Ends a document: all ids since the one before. size: in bytes of text."""
        self._document_fields.extend((self._stop, size, hash))

    def finish(self, tally: sources.Tally) -> bool:
        """Writes the last files. Returns False, and writes none, without a document."""
        if not self._document_fields:
            return False
        for file in self._files:
            file.flush()
        documents_D = np.frombuffer(self._document_fields, np.uint64).view(DOCUMENT)
        np.save(self._folder / "documents.npy", documents_D)
        about: dict[str, Any] = {
            "dtype": self._dtype.str,
            # Without the kinds whose count is 0.
            "left_out": +tally.left_out,
            "noted": +tally.noted,
            "repaired": tally.repaired,
            "files": {
                name: size_and_checksum(self._folder / name)
                for name in (*self._names, "documents.npy")
            },
        }
        _write_about(self._folder, about)
        return True


def _tokenise(
    data_config: Data,
    files: list[Path],
    tokenizer: Tokenizer,
    tally: sources.Tally,
    folder: Path,
) -> None:
    """Writes the files of a cache into `folder`."""
    is_chat = sources.holds_chat(data_config, files)
    write = _write_conversations if is_chat else _write_texts
    total = sum(sources.size_and_time(path)[0] for path in files)
    progress = tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenise", disable=None
    )
    with _Writer(folder, tokenizer.size, is_chat) as writer, progress:
        for _ in write(data_config, files, tokenizer, tally, writer):
            progress.update(tally.read - progress.n)
        if not writer.finish(tally):
            raise sources.no_document(data_config, tally, is_chat)


def _write_texts(
    data_config: Data,
    files: list[Path],
    tokenizer: Tokenizer,
    tally: sources.Tally,
    writer: _Writer,
) -> Iterator[None]:
    """Writes all documents; yields after each batch of their pieces."""
    for batch in _batches(data_config, files, tally):
        batch_ids = tokenizer.encode_batch([piece.text for piece in batch])
        for ids, piece in zip(batch_ids, batch):
            if piece.is_first:
                ids = [tokenizer.bos, *ids]
            if piece.document:
                ids = [*ids, tokenizer.eos]
            writer.write(ids)
            if piece.document:
                writer.end_document(*piece.document)
        yield


def _write_conversations(
    data_config: Data,
    files: list[Path],
    tokenizer: Tokenizer,
    tally: sources.Tally,
    writer: _Writer,
) -> Iterator[None]:
    """Writes all conversations; yields after each one."""
    for messages, encoded in chat.read(data_config, files, tokenizer, tally):
        writer.write(encoded.ids, encoded.counted)
        writer.end_document(encoded.bytes, conversation_hash(messages))
        yield
