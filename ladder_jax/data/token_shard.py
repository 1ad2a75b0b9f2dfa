"""One shard of a token cache: the ids of some documents, and where each one ends.

A shard is a folder:

- ids.bin: the ids of its documents, each as bos, text, eos; or a conversation each.
- counted.bin: of conversations alone: a byte for each id, 1 if it counts as a target.
- documents.npy: an array of `DOCUMENT`, one element a document.
- about.json: sizes and checksums of these, and what reading left out.

A shard is a function of its unit of work alone: not of the process that writes it, nor
of the time. It is written into a folder of its own, which is then renamed: a shard is
complete or absent.
"""

import array
import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ladder_jax.config import Data
from ladder_jax.data import chat, sources
from ladder_jax.data.formats import Part
from ladder_jax.data.tokenizer import Tokenizer

# A longer document is tokenised in pieces of this many characters, cut at line ends.
PIECE_CHARACTERS = 1 << 20
# One call of the tokenizer has about this many characters.
BATCH_CHARACTERS = 1 << 20
# The checksums of a cache cover at most this many bytes of each kind of file, in blocks
# spread over them.
CHECKSUM_BYTES = 1 << 30
CHECKSUM_BLOCK = 1 << 20
ABOUT = "about.json"

# stop: where the document ends in ids.bin, in ids; bytes: of its text in UTF-8 (of a
# conversation, of the text of its targets that count); hash: `document_hash`.
DOCUMENT = np.dtype([("stop", "<u8"), ("bytes", "<u8"), ("hash", "<u8")])

# Called with (bytes read, documents written) of a shard so far.
Report = Callable[[int, int], None]


def document_hash(raw: bytes) -> int:
    """Returns a 64-bit hash of a document, which is given as UTF-8."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def conversation_hash(messages: list[dict[str, str]]) -> int:
    """Returns `document_hash` of a conversation: it depends on no chat template."""
    return document_hash(json.dumps(messages, sort_keys=True).encode())


class File(NamedTuple):
    """A part of a file to tokenise, and the file as it was when that was planned."""

    part: Part
    size: int  # bytes
    time: int  # of the last change, ns


@dataclasses.dataclass(frozen=True)
class Job:
    """What the shards of a cache have in common.

    Attributes:
      folder: of the cache.
      data_config: how to read the source.
      tokenizer: encodes.
      is_chat: whether the documents are conversations.
      checked: how many bytes of a file its checksum covers.
    """

    folder: Path
    data_config: Data
    tokenizer: Tokenizer
    is_chat: bool
    checked: int

    def shard(self, number: int) -> Path:
        """Returns the folder of a shard."""
        return self.folder / f"{number:06}"


class Changed(Exception):
    """A file of the source changed after the cache was planned."""


def write(job: Job, number: int, files: list[File], report: Report) -> None:
    """Writes a shard. If another process writes the same one, the first one counts.

    Raises:
      ConfigError: if the tokenizer fails, or a package for a file's format is missing.
      OSError: if the shard cannot be written.
      Changed: if a file of the source was changed.
    """
    shard = job.shard(number)
    working = Path(tempfile.mkdtemp(prefix=f"{shard.name}.", dir=shard.parent))
    tally = sources.Tally()
    try:
        working.chmod(0o755)
        kind = _write_conversations if job.is_chat else _write_texts
        parts = [file.part for file in files]
        with _Writer(working, job) as writer:
            for _ in kind(job, parts, tally, writer):
                report(tally.read, writer.documents)
            writer.finish(tally)
        for part, *expected in files:
            if list(sources.size_and_time(part.path)) != expected:
                raise Changed(f"{part.path} was changed while it was tokenised")
        working.rename(shard)
    except OSError:
        if not shard.exists():
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)


# ------------------------------------------------------------------ checks


def about_text(about: dict[str, Any]) -> str:
    """Returns the text of an about.json, with a checksum of its own contents."""
    checksum = zlib.crc32(json.dumps(about).encode())
    return json.dumps(about | {"checksum": checksum})


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what `about_text` was made of. Raises ValueError for anything else."""
    about = json.loads((folder / ABOUT).read_text())
    checksum = about.pop("checksum", None) if isinstance(about, dict) else None
    if checksum != zlib.crc32(json.dumps(about).encode()):
        raise ValueError("about.json has other contents than were written")
    return about


def find_damage(shard: Path) -> str | None:
    """Returns a description of the damage to a shard, or None."""
    try:
        about = read_about(shard)
        for name, expected in about["files"].items():
            if size_and_checksum(shard / name, about["checked"]) != expected:
                return f"{shard / name} has other contents than were written"
    except OSError as error:
        return f"{error.filename or shard}: {error.strerror}"
    except (ValueError, KeyError):
        return f"{shard / ABOUT} has other contents than were written"
    return None


def size_and_checksum(path: Path, limit: int) -> list[int]:
    """Returns [bytes, CRC-32] of a file.

    The checksum of a file of more than `limit` bytes is that of every n-th block, and
    of the last one.
    """
    size = path.stat().st_size
    block = min(CHECKSUM_BLOCK, max(limit // 16, 1 << 12))
    block_starts = range(0, size, block)
    stride = math.ceil(len(block_starts) * block / limit) or 1
    checksum = 0
    with open(path, "rb") as file:
        for start in sorted({*block_starts[::stride], *block_starts[-1:]}):
            file.seek(start)
            checksum = zlib.crc32(file.read(block), checksum)
    return [size, checksum]


# ------------------------------------------------------------------ writing


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
    data_config: Data, parts: list[Part], tally: sources.Tally
) -> Iterator[list[_Piece]]:
    """Yields the pieces of all documents, about BATCH_CHARACTERS at once."""
    batch: list[_Piece] = []
    size = 0
    for part in parts:
        texts = sources.read(data_config.source, part, data_config.text_field, tally)
        for text in texts:
            for piece in _pieces(text):
                batch.append(piece)
                size += len(piece.text)
                if size >= BATCH_CHARACTERS:
                    yield batch
                    batch, size = [], 0
    yield batch


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Returns the type of the ids of a cache."""
    return np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")


# A kind of `Tally.noted`: a tokenizer without bytes or a token for unknown characters
# drops them.
WITHOUT_IDS = "documents of which the tokenizer knows no character"


class _Writer:
    """Writes the files of a shard, document by document, into `folder`."""

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder, self._checked = folder, job.checked
        self._dtype = dtype_of(job.tokenizer)
        self._names = ["ids.bin", *(["counted.bin"] if job.is_chat else [])]
        self._stop = self.documents = self._bytes = 0
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
        self.documents += 1
        self._bytes += size

    def finish(self, tally: sources.Tally) -> None:
        """Writes the last files."""
        for file in self._files:
            file.flush()
        documents_D = np.frombuffer(self._document_fields, np.uint64).view(DOCUMENT)
        np.save(self._folder / "documents.npy", documents_D)
        about = {
            "ids": self._stop,
            "documents": self.documents,
            "bytes": self._bytes,
            # Without the kinds whose count is 0.
            "left_out": +tally.left_out,
            "noted": +tally.noted,
            "repaired": tally.repaired,
            "checked": self._checked,
            "files": {
                name: size_and_checksum(self._folder / name, self._checked)
                for name in (*self._names, "documents.npy")
            },
        }
        (self._folder / ABOUT).write_text(about_text(about))


def _write_texts(
    job: Job, parts: list[Part], tally: sources.Tally, writer: _Writer
) -> Iterator[None]:
    """Writes all documents; yields after each batch of their pieces."""
    tokenizer, has_ids = job.tokenizer, False
    for batch in _batches(job.data_config, parts, tally):
        batch_ids = tokenizer.encode_batch([piece.text for piece in batch])
        for ids, piece in zip(batch_ids, batch):
            has_ids = bool(ids) or has_ids and not piece.is_first
            if piece.is_first:
                ids = [tokenizer.bos, *ids]
            if piece.document:
                ids = [*ids, tokenizer.eos]
            writer.write(ids)
            if piece.document:
                writer.end_document(*piece.document)
                tally.noted[WITHOUT_IDS] += not has_ids
        yield


def _write_conversations(
    job: Job, parts: list[Part], tally: sources.Tally, writer: _Writer
) -> Iterator[None]:
    """Writes all conversations; yields after each one."""
    for messages, encoded in chat.read(job.data_config, parts, job.tokenizer, tally):
        writer.write(encoded.ids, encoded.counted)
        writer.end_document(encoded.bytes, conversation_hash(messages))
        yield
