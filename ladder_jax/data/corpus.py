"""From documents to batches of packed token rows.

1. Read: the documents of a source, see sources.py.
2. Split by document: a hash of its text decides its side, so copies stay together and more documents move none.
3. Tokenise once: ids go to a cache folder, as bos, text, eos for each document, and are memory-mapped from there.
4. Pack: a side's documents are laid end to end and cut every `length` targets, so a document of n text tokens has
   n + 1 targets (its tokens, then eos), each once an epoch, and no row but an epoch's last is padded.

A row is found by its number alone (the order of an epoch's documents is a seeded permutation), so the whole state of
an iterator is how many batches it has given, and restoring it costs nothing.

Dims: B batch of this process, T length of a row, D documents.
"""

import array
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import grain
import numpy as np
from tqdm import tqdm

from ladder_jax.config import ConfigError
from ladder_jax.data import sources

FORMAT = 1  # of the cache; raise it when the reading of sources or the layout changes
_PIECE = (
    1 << 20
)  # characters: a longer document is tokenised in pieces, cut at line ends
_CHUNK = 1 << 22  # characters tokenised at once
_STALE = 86400  # seconds without a write after which an unfinished cache is another run's leftover
_DOCUMENT = np.dtype([("stop", "<u8"), ("bytes", "<u8"), ("hash", "<u8")])


# ---------------------------------------------------------------- the split


def _hash(raw):
    """64 bits of the document's bytes: it is held out if they are below `_threshold`."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _threshold(held_out):
    return int(held_out * 2**64)


def documents(config):
    """Yields the documents of `config` (config.Data) that are trained on, as str: to train a tokenizer.

    Raises ValueError if there is none.
    """
    tally, none = sources.Tally(), True
    for path in sources.files(config.source):
        for text in sources.read(config.source, path, config.text_field, tally):
            if _hash(text.encode()) >= _threshold(config.held_out_fraction):
                none = False
                yield text
    if none:
        raise _no_document(config, tally)


def _no_document(config, tally):
    why = (
        ", ".join(f"{count} {what}" for what, count in (+tally.left_out).items())
        or "all of it is held out"
    )
    return ConfigError(
        f"data.source={config.source!r} has no usable document ({why}): it must hold text, or rows "
        f"with a text field {config.text_field!r} (data.text_field)"
    )


# ---------------------------------------------------------------- tokenising, once


def _fingerprint(config, files, tok):
    """Names a cache: changes with any file's path, size or time, the tokenizer, the text field or the format."""
    seen = [
        FORMAT,
        config.source == "builtin",
        config.text_field,
        tok.to_json(),
        [(os.path.abspath(path), *sources.size_and_time(path)) for path in files],
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]


def _pieces(text):
    """Yields a document's (piece, whether it begins the document, (bytes, hash) of the document if it ends it)."""
    raw, start = text.encode(), 0
    while len(text) - start > _PIECE:
        stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:stop], start == 0, ()
        start = stop
    yield text[start:], start == 0, (len(raw), _hash(raw))


def _chunks(config, files, tally):
    """Yields lists of the pieces of all documents, about _CHUNK characters each."""
    chunk, size = [], 0
    for path in files:
        for text in sources.read(config.source, path, config.text_field, tally):
            for piece in _pieces(text):
                chunk.append(piece)
                size += len(piece[0])
                if size >= _CHUNK:
                    yield chunk
                    chunk, size = [], 0
    yield chunk


def _tokenise(config, files, tok, folder):
    """Writes `ids.bin` (all documents: bos, text, eos), `documents.npy` and `about.json` into `folder`."""
    tally, stop = sources.Tally(), 0
    dtype = np.dtype("<u2" if tok.size <= 1 << 16 else "<u4")
    columns = array.array(
        "Q"
    )  # stop, bytes, hash of each document: 24 bytes, where a list would take 150
    total = sum(sources.size_and_time(path)[0] for path in files)
    with (
        open(folder / "ids.bin", "wb") as file,
        tqdm(
            total=total, unit="B", unit_scale=True, desc="tokenise", disable=None
        ) as bar,
    ):
        for chunk in _chunks(config, files, tally):
            for ids, (_, begins, ends) in zip(
                tok.encode_batch([piece for piece, *_ in chunk]), chunk
            ):
                ids = [tok.bos] * begins + ids + [tok.eos] * bool(ends)
                file.write(np.array(ids, dtype).tobytes())
                stop += len(ids)
                if ends:
                    columns.extend((stop, *ends))
            bar.update(tally.read - bar.n)
    if not columns:
        raise _no_document(config, tally)
    np.save(folder / "documents.npy", np.frombuffer(columns, np.uint64).view(_DOCUMENT))
    about = {
        "dtype": dtype.str,
        "left_out": +tally.left_out,
        "repaired": tally.repaired,
    }
    (folder / "about.json").write_text(json.dumps(about))


def _cached(config, files, tok):
    """The folder of this corpus's token ids; tokenises them where it is not there yet.

    The work is done in a folder of its own, which is then renamed: a cache is there whole or not at all, and of two
    processes that make the same one, the second to finish finds it there and drops its own.
    """
    root = Path(config.token_cache).expanduser()
    folder = root / f"tokens-{_fingerprint(config, files, tok)}"
    if folder.exists():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{folder.name}.*"):  # by a process that was killed
            touched = max(
                sources.size_and_time(path)[1] for path in (left, left / "ids.bin")
            )
            if time.time_ns() - touched > _STALE * 10**9:
                shutil.rmtree(left, ignore_errors=True)
        working = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=root))
        try:
            working.chmod(0o755)
            _tokenise(config, files, tok, working)
            try:
                working.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(working, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"data.token_cache={config.token_cache!r} cannot be written ({error.strerror or error}): it must be a "
            "folder that can"
        ) from None
    return folder


@dataclasses.dataclass(frozen=True)
class Side:
    """The training or held-out documents of a corpus.

    ids: token ids of the whole corpus, each document as bos, text, eos; memory-mapped.
    starts_D, targets_D: where each document of this side begins in `ids`, and how many targets it has.
    bytes: of the documents' text, in UTF-8. pad: the id that fills rows.
    """

    ids: np.ndarray
    starts_D: np.ndarray
    targets_D: np.ndarray
    bytes: int
    pad: int

    @functools.cached_property
    def tokens(self):
        """Targets in an epoch: the text tokens and one eos for each document."""
        return int(self.targets_D.sum())

    def bits_per_byte(self, loss):
        """Mean loss in nats a target -> bits a byte of text.

        Exact if `loss` is over the whole side: its targets are every text token (the first one follows bos) and every
        eos, so loss * tokens is the documents' whole code length; what eos costs is in it, and eos has no bytes.
        """
        return loss / math.log(2) * self.tokens / self.bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train, held_out: its two sides. report: one line on what was read, and what was left out or repaired."""

    train: Side
    held_out: Side
    report: str


def prepare(config, tok):
    """The corpus that `config` (config.Data) names, in ids of `tok` (a tokenizer): tokenised, or opened if it was.

    Raises ValueError, one line, if the source is missing or has no usable document, if the cache cannot be written,
    or if one side would be empty. What cannot be read is left out and counted in `report`; bytes that are not UTF-8
    become U+FFFD.
    """
    folder = _cached(config, sources.files(config.source), tok)
    about = json.loads((folder / "about.json").read_text())
    documents_D = np.load(folder / "documents.npy")
    ids = np.asarray(np.memmap(folder / "ids.bin", about["dtype"], "r"))
    stops_D = documents_D["stop"].astype(np.int64)
    starts_D = np.concatenate([[0], stops_D[:-1]])
    held_D = documents_D["hash"] < np.uint64(_threshold(config.held_out_fraction))
    _check_split(config, documents_D["hash"], held_D)

    def side(chosen_D):
        return Side(
            ids,
            starts_D[chosen_D],
            (stops_D - starts_D - 1)[chosen_D],
            int(documents_D["bytes"][chosen_D].sum()),
            tok.pad,
        )

    train, held_out = side(~held_D), side(held_D)
    words = [
        f"{name} {len(one.starts_D):,} documents, {one.bytes / 1e6:.2f} MB, {one.tokens:,} tokens"
        for name, one in (("train", train), ("held out", held_out))
    ]
    words += [
        f"left out: {count:,} {what}" for what, count in about["left_out"].items()
    ]
    words += [
        f"repaired: {about['repaired']:,} documents with bytes that are not UTF-8"
    ] * bool(about["repaired"])
    return Corpus(train, held_out, f"data.source={config.source!r}: {'; '.join(words)}")


def _check_split(config, hash_D, held_D):
    if held_D.any() and not held_D.all():
        return
    low, high = int(hash_D.min()) / 2**64, int(hash_D.max()) / 2**64
    if low == high:
        raise ConfigError(
            f"data.source={config.source!r} has one document ({len(held_D)} with copies), and training "
            "and held-out text are split by document: it must have two or more, as files or rows"
        )
    raise ConfigError(
        f"data.held_out_fraction={config.held_out_fraction} leaves none of the {len(held_D)} documents for "
        f"{'training' if held_D.all() else 'evaluation'}: for data.source={config.source!r} it must be "
        f"from {math.ceil(low * 1e4) / 1e4} to {math.floor(high * 1e4) / 1e4}"
    )


# ---------------------------------------------------------------- rows and batches


class _Rows(grain.MapDataset):
    """Rows of a side's documents laid end to end, in a new order each epoch; `len` is one epoch.

    `multiple`: rows of padding are added at the end until an epoch is a multiple of this many.
    """

    def __init__(self, side, length, seed, multiple=1):
        super().__init__()
        self._side, self._length, self._seed = side, length, seed
        self._rows = -(-side.tokens // (length * multiple)) * multiple
        self._order = functools.lru_cache(maxsize=2)(
            self._order
        )  # of this epoch and the one being prefetched

    def __len__(self):
        return self._rows

    def _order(self, epoch):
        """The epoch's documents in order, and where each one's targets stop when laid end to end."""
        raw_D = np.random.PCG64([self._seed, epoch]).random_raw(
            len(self._side.starts_D)
        )
        order_D = np.argsort(raw_D, kind="stable")
        return order_D, np.cumsum(self._side.targets_D[order_D])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, self._rows)
        order_D, stops_D = self._order(epoch)
        side, length = self._side, self._length
        tokens_T, targets_T = (np.full(length, side.pad, np.int32) for _ in range(2))
        segments_T, positions_T = (np.zeros(length, np.int32) for _ in range(2))
        weights_T = np.zeros(length, np.float32)
        filled, segment = 0, 0
        place = np.searchsorted(stops_D, row * length, side="right")
        while filled < length and place < len(order_D):
            document = order_D[place]
            begin = row * length + filled - (stops_D[place] - side.targets_D[document])
            size = min(side.targets_D[document] - begin, length - filled)
            ids = side.ids[side.starts_D[document] + begin :][: size + 1]
            here = slice(filled, filled + size)
            segment += 1
            tokens_T[here], targets_T[here] = ids[:-1], ids[1:]
            segments_T[here], positions_T[here], weights_T[here] = (
                segment,
                np.arange(size),
                1,
            )
            filled, place = filled + size, place + 1
        return dict(
            tokens=tokens_T,
            targets=targets_T,
            segments=segments_T,
            positions=positions_T,
            weights=weights_T,
        )


def _check(process_index, process_count, **sizes):
    for name, value in {"process_count": process_count, **sizes}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} is not accepted: it must be 1 or more")
    if not 0 <= process_index < process_count:
        raise ConfigError(
            f"process_index={process_index} is not accepted: it must be from 0 to {process_count - 1}"
        )


def train_iterator(corpus, *, batch, length, seed, process_index=0, process_count=1):
    """Batches of training rows for ever, as a Grain iterator (get_state and set_state; a checkpointable of Orbax v1).

    corpus: from `prepare`. batch: rows of this process, B. length: T. seed: of the order of documents and rows, which
    is new each epoch. process_index, process_count: which share of every step's rows this process gets; processes
    that hold the same rows (tensor parallelism across hosts) must give the same index. The shares of one step, joined
    in order, are the batch that one process would get alone: within an epoch no two shares have a target in common.

    Each batch is a dict of arrays [B, T]:
        tokens, targets: int32 ids; targets_BT[b, t] follows tokens_BT[b, t] in the same document.
        segments: int32, 1, 2, ... for each document in the row, 0 where the row is padded.
        positions: int32, from 0 in each piece of a document in the row.
        weights: float32, 1 where there is a target, 0 where the row is padded.
    """
    _check(process_index, process_count, batch=batch, length=length)
    rows = _Rows(corpus.train, length, seed).shuffle(seed % 2**32).repeat()
    batches = rows.batch(batch, drop_remainder=True)[
        process_index::process_count
    ]  # endless: nothing is dropped
    return iter(
        batches.to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        )
    )


def held_out_batches(corpus, *, batch, length, process_index=0, process_count=1):
    """All held-out rows once, as a sequence of batches (`len`, iterable again) like those of `train_iterator`.

    Documents come in one fixed shuffled order, so that the first batches are a fair sample. The end is padded, weights
    0, so that every process has the same number of batches.
    """
    _check(process_index, process_count, batch=batch, length=length)
    rows = _Rows(corpus.held_out, length, 0, multiple=batch * process_count)
    return rows.batch(batch)[process_index::process_count]
