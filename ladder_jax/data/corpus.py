"""The documents of a source as token ids, split into training and held-out sides.

1. `sources` reads the documents of a source.
2. `token_cache` tokenises them once: it writes the ids to disk and memory-maps them.
3. A hash of a document's text decides its side. So copies of a document are on one
   side, and new documents in the source do not move the others.

A document is a text, or a conversation, in which only some targets count (see `chat`).
`batches` packs the documents of a side into rows and batches.

Dims: D documents.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ladder_jax.config import ConfigError, Data
from ladder_jax.data import chat, sources, token_cache, token_shard
from ladder_jax.data.formats import Part
from ladder_jax.data.remote import with_local_source
from ladder_jax.data.token_cache import Joined
from ladder_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Side:
    """The training or held-out documents of a corpus.

    Attributes:
      ids: token ids of the whole corpus, each document as bos, text, eos; on disk.
      starts_D: where each document of this side begins in `ids`.
      targets_D: how many targets each document has: its text tokens and eos.
      bytes: the size in UTF-8 of the text of all targets that count.
      pad: the id that fills rows of a batch.
      counted: of conversations, 1 for each of `ids` that counts as a target; None: all
        count. Conversations are not cut where a row ends.
    """

    ids: np.ndarray | Joined
    starts_D: np.ndarray
    targets_D: np.ndarray
    bytes: int
    pad: int
    counted: np.ndarray | Joined | None = None

    @functools.cached_property
    def tokens(self) -> int:
        """The number of targets that count in an epoch.

        Of texts, these are all text tokens, and one eos per document.
        """
        return int(self._counted_D().sum())

    def _counted_D(self) -> np.ndarray:
        """Returns how many targets of each document count."""
        if self.counted is None:
            return self.targets_D
        counts = [
            np.count_nonzero(self.counted[start + 1 : start + 1 + size])
            for start, size in zip(self.starts_D, self.targets_D)
        ]
        return np.array(counts, np.int64)

    def cut(self, length: int) -> tuple["Side", list[str]]:
        """Returns this side for rows of `length` targets, and what that leaves out.

        A longer conversation is cut after `length` targets. If none of these counts, it
        is left out. Texts do not change: they go on in the next row.
        """
        if self.counted is None or (self.targets_D <= length).all():
            return self, []
        sizes_D = np.minimum(self.targets_D, length)
        short = dataclasses.replace(self, targets_D=sizes_D)
        counted_D = short._counted_D()
        kept_D = counted_D > 0
        tokens = int(counted_D.sum())
        # The bytes of single targets are not stored: their mean is.
        size = round(self.bytes * tokens / self.tokens)
        side = dataclasses.replace(
            short,
            starts_D=self.starts_D[kept_D],
            targets_D=sizes_D[kept_D],
            bytes=size,
        )
        cut = np.count_nonzero(kept_D & (self.targets_D > length))
        lost = len(kept_D) - np.count_nonzero(kept_D)
        notes = [
            f"{self.tokens - tokens:,} of {self.tokens:,} tokens that count cut off"
        ]
        if cut:
            notes.append(f"{cut:,} conversations cut after {length} tokens")
        if lost:
            notes.append(
                f"{lost:,} conversations left out, as none of their first {length} "
                "tokens counts"
            )
        return side, notes

    def bits_per_byte(self, loss: float) -> float:
        """Converts a mean loss in nats a target to bits a byte of text.

        The result is exact if `loss` is over the whole side. The targets are every text
        token (the first one follows bos) and every eos, so loss * tokens is the code
        length of the documents. It includes the cost of eos, which has no bytes.
        """
        return loss / math.log(2) * self.tokens / self.bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two sides of the documents of a source.

    Attributes:
      train, held_out: the sides.
      digest: a hash of all documents in order; of conversations, and of the tokenizer
        with its chat template. It does not depend on the paths of their files. Two
        corpora have the same sides if digest, tokenizer and data.held_out_fraction are
        equal.
      report: one line that counts what was read, left out and repaired.
    """

    train: Side
    held_out: Side
    digest: str
    report: str

    def cut(self, length: int) -> "Corpus":
        """Returns the corpus for rows of `length` targets, see `Side.cut`.

        Raises:
          ConfigError: if no conversation of a side has a target that counts.
        """
        train, notes = self.train.cut(length)
        held_out, held_out_notes = self.held_out.cut(length)
        for name, side in (("training", train), ("held-out", held_out)):
            if not len(side.starts_D):
                raise ConfigError(
                    f"train.seq_len={length} is not accepted: in no {name} "
                    f"conversation does one of the first {length} tokens count; it "
                    "must be larger"
                )
        report = "; ".join(
            [
                self.report,
                *(f"train: {note}" for note in notes),
                *(f"held out: {note}" for note in held_out_notes),
            ]
        )
        return dataclasses.replace(self, train=train, held_out=held_out, report=report)


def documents(data_config: Data, held_out: bool = False) -> Iterator[str]:
    """Yields the text of the training or held-out documents of `data.source`.

    The text of a conversation is its messages, one after the other.

    Raises:
      ConfigError: if there is no such document.
    """
    data_config = with_local_source(data_config)
    tally = sources.Tally()
    is_empty = True
    threshold = _threshold(data_config.held_out_fraction)
    files = sources.files(data_config.source, tally)
    is_chat = sources.holds_chat(data_config, files)
    read = _hashed_conversations if is_chat else _hashed_texts
    for text, hash in read(data_config, files, tally):
        if (hash < threshold) == held_out:
            is_empty = False
            yield text
    if is_empty:
        side = "training" if held_out else "held out"
        raise sources.no_document(data_config, tally, is_chat, f"all of it is {side}")


def _hashed_texts(
    data_config: Data, files: list[Path], tally: sources.Tally
) -> Iterator[tuple[str, int]]:
    """Yields (text, hash) of each document."""
    field = data_config.text_field
    for path in files:
        for text in sources.read(data_config.source, Part(path), field, tally):
            yield text, token_shard.document_hash(text.encode())


def _hashed_conversations(
    data_config: Data, files: list[Path], tally: sources.Tally
) -> Iterator[tuple[str, int]]:
    """Yields (text, hash) of each conversation."""
    for messages in chat.read_messages(map(Part, files), tally):
        text = "\n".join(message["content"] for message in messages)
        yield text, token_shard.conversation_hash(messages)


def _threshold(held_out_fraction: float) -> int:
    """Returns the limit: a document is held out if its 64-bit hash is below it."""
    return int(held_out_fraction * 2**64)


def prepare(
    data_config: Data,
    tokenizer: Tokenizer,
    workers: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Corpus:
    """Returns the corpus of `data.source`; tokenises it if no cache has its ids yet.

    It leaves out files and rows that it cannot read; `Corpus.report` counts them. Bytes
    that are not UTF-8 become U+FFFD.

    Args:
      data_config, tokenizer, workers, say: see `token_cache.open_cache`.

    Raises:
      ConfigError: if the source is missing or has no usable document, if the tokenizer
        fails, if the cache cannot be written, if one side would be empty, or if the
        source has no chat and `data.train_on` is not its default.
      RuntimeError: see `token_cache.open_cache`.
    """
    data_config = with_local_source(data_config)
    cache = token_cache.open_cache(data_config, tokenizer, workers, say)
    if cache.counted is None and data_config.train_on != Data.train_on:
        raise ConfigError(
            f"data.train_on={data_config.train_on!r} is not accepted: "
            f"data.source={data_config.source!r} holds text, of which all tokens count "
            "(data.format='chat' reads its rows as chat)"
        )
    train, held_out = _split(data_config, cache, tokenizer.pad)
    report = _report(data_config, cache, train, held_out)
    return Corpus(train, held_out, cache.digest, report)


def _split(
    data_config: Data, cache: token_cache.TokenCache, pad: int
) -> tuple[Side, Side]:
    """Returns the training and the held-out side.

    It reads one shard's index at a time: a document then takes 12 bytes of memory.
    """
    threshold = _threshold(data_config.held_out_fraction)
    # Of each side: starts, targets and bytes, shard by shard.
    parts: tuple[list[tuple[np.ndarray, np.ndarray, int]], ...] = ([], [])
    lowest, highest, first = 2**64, -1, 0
    for index_D in cache.indexes():
        hash_D, stops_D = index_D["hash"], index_D["stop"].astype(np.int64)
        lowest, highest = (
            min(lowest, int(hash_D.min())),
            max(highest, int(hash_D.max())),
        )
        starts_D = np.concatenate([[0], stops_D[:-1]])
        targets_D = stops_D - starts_D - 1  # every id but bos
        if targets_D.max() < 2**31:
            targets_D = targets_D.astype(np.int32)
        held_out_D = hash_D < np.uint64(threshold)
        for side, in_side_D in zip(parts, (~held_out_D, held_out_D)):
            size = int(index_D["bytes"][in_side_D].sum())
            side.append((first + starts_D[in_side_D], targets_D[in_side_D], size))
        first += int(stops_D[-1])
    if not lowest < threshold <= highest:
        raise _not_split(data_config, sum(cache.documents), lowest, highest)
    train, held_out = (
        Side(
            cache.ids,
            np.concatenate([starts_D for starts_D, _, _ in side]),
            np.concatenate([targets_D for _, targets_D, _ in side]),
            sum(size for _, _, size in side),
            pad,
            cache.counted,
        )
        for side in parts
    )
    return train, held_out


def _report(
    data_config: Data, cache: token_cache.TokenCache, train: Side, held_out: Side
) -> str:
    """Returns `Corpus.report`."""
    kind, unit = "documents", "tokens"
    if cache.counted is not None:
        kind, unit = "conversations", "tokens that count"
    parts = [
        f"{name} {len(side.starts_D):,} {kind}, {side.bytes / 1e6:.2f} MB, "
        f"{side.tokens:,} {unit}"
        for name, side in (("train", train), ("held out", held_out))
    ]
    parts += [f"left out: {count:,} {kind}" for kind, count in cache.left_out.items()]
    parts += [f"note: {count:,} {kind}" for kind, count in cache.noted.items()]
    if cache.repaired:
        parts.append(
            f"repaired: {cache.repaired:,} documents with bytes that are not UTF-8"
        )
    if cache.damage:
        parts.append(f"the token cache was damaged and has been mended: {cache.damage}")
    return f"data.source={data_config.source!r}: {'; '.join(parts)}"


def _not_split(data_config: Data, count: int, lowest: int, highest: int) -> ConfigError:
    """Returns the error where all `count` documents are on one side.

    lowest, highest: the least and the largest of their hashes.
    """
    low, high = lowest / 2**64, highest / 2**64
    if lowest == highest:
        return ConfigError(
            f"data.source={data_config.source!r} has one document ({count} with "
            "copies), and training and held-out text are split by document: it must "
            "have two or more, as files or rows"
        )
    is_held_out = highest < _threshold(data_config.held_out_fraction)
    empty_side = "training" if is_held_out else "evaluation"
    return ConfigError(
        f"data.held_out_fraction={data_config.held_out_fraction} leaves none of the "
        f"{count} documents for {empty_side}: for "
        f"data.source={data_config.source!r} it must be from "
        f"{math.ceil(low * 1e4) / 1e4} to {math.floor(high * 1e4) / 1e4}"
    )
