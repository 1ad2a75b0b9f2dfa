"""Batches of packed token rows of a corpus, endless for training, once for evaluation.

The documents of a side are laid end to end and cut every T targets. A document of n
text tokens has n + 1 targets (its tokens, then eos). Each target comes once an epoch,
and no row but the last of an epoch is padded:

    documents   bos a b eos | bos c eos
    targets         a b eos |     c eos
    T = 2       row 0: a b    row 1: eos c    row 2: eos, padding

Conversations are not cut, see `packing`.

A row is a function of its number: the order of the documents in an epoch is a seeded
permutation, and so is the order of rows. So the state of an iterator is the number of
batches it has returned, which is the same in every process: a run goes on with the same
rows in the same order on any number of processes. To restore it takes no time, and
memory does not grow with steps.

Dims: B batch of this process, T length of a row, D documents.
"""

import functools

import grain
import numpy as np

from ladder_jax.config import ConfigError, require
from ladder_jax.data.corpus import Corpus, Side
from ladder_jax.data.packing import WholeRows, add_piece, empty_row

# The order of an epoch stores the number of targets before each so-many-th document.
_BLOCK = 64
# Grain shuffles the rows of an epoch by 32-bit numbers.
_MAX_ROWS = 2**32

Batch = dict[str, np.ndarray]


class Rows(grain.MapDataset):
    """The packed rows of a side; each epoch has the documents in another order.

    `len` is one epoch; row `len + i` is row i of the second epoch, and so on.

    Args:
      side: the documents.
      length: T.
      seed: of the order of documents.
      multiple: an epoch has a multiple of this many rows; the last ones are padding.
    """

    def __init__(self, side: Side, length: int, seed: int, multiple: int = 1) -> None:
        super().__init__()
        self._side, self._length, self._seed = side, length, seed
        self._rows = -(-side.tokens // (length * multiple)) * multiple
        # Two epochs: the one that is read, and the next one, which is prefetched.
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        return self._rows

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (the documents of an epoch in order, where the targets of some stop).

        The second array has the number of targets before each _BLOCK-th document: those
        of all would take twice the memory of the order.
        """
        count = len(self._side.starts_D)
        raw_D = np.random.PCG64([self._seed, epoch]).random_raw(count)
        order_D = np.argsort(raw_D, kind="stable")
        del raw_D
        if count <= 2**32:
            order_D = order_D.astype(np.uint32)
        sizes = [np.zeros(1, np.int64)]
        many = _BLOCK << 16
        for start in range(0, count, many):
            targets = self._targets(order_D, start, many)
            sizes.append(np.add.reduceat(targets, range(0, len(targets), _BLOCK)))
        return order_D, np.cumsum(np.concatenate(sizes))[:-1]

    def _targets(self, order_D: np.ndarray, start: int, count: int) -> np.ndarray:
        """Returns the targets of each of `count` documents, from the start-th on."""
        return self._side.targets_D[order_D[start : start + count]].astype(np.int64)

    def _find(
        self, order_D: np.ndarray, befores: np.ndarray, target: int
    ) -> tuple[int, int]:
        """Returns (which document in order has a target, how many are before it)."""
        block = int(np.searchsorted(befores, target, side="right")) - 1
        stops = befores[block] + np.cumsum(
            self._targets(order_D, block * _BLOCK, _BLOCK)
        )
        i = int(np.searchsorted(stops, target, side="right"))
        before = befores[block] if i == 0 else stops[i - 1]
        return block * _BLOCK + i, int(before)

    def __getitem__(self, index: int | slice) -> Batch | grain.MapDataset:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, self._rows)
        row_start = row * self._length  # in targets of the epoch
        order_D, befores = self._order(epoch)
        side, length = self._side, self._length
        row_T = empty_row(length, side.pad)
        column = 0
        i, before = self._find(order_D, befores, row_start)
        while column < length and i < len(order_D):
            document = order_D[i]
            targets = int(side.targets_D[document])
            # How many targets of the document are in earlier rows.
            begin = row_start + column - before
            size = min(targets - begin, length - column)
            start = int(side.starts_D[document]) + begin
            add_piece(row_T, column, side, start, size)
            column += size
            before += targets
            i += 1
        return row_T


def _rows_of(side: Side, length: int, seed: int, multiple: int = 1) -> Rows | WholeRows:
    """Returns the rows of texts or of conversations; see both classes."""
    kind = Rows if side.counted is None else WholeRows
    return kind(side, length, seed, multiple)


def _check_share(
    batch: int, length: int, process_index: int, process_count: int
) -> None:
    """Raises ConfigError unless the arguments of an iterator are in range."""
    require(process_count >= 1, "process_count", process_count, "1 or more")
    require(batch >= 1, "batch", batch, "1 or more")
    require(length >= 1, "length", length, "1 or more")
    require(
        0 <= process_index < process_count,
        "process_index",
        process_index,
        f"from 0 to {process_count - 1}",
    )


def train_iterator(
    corpus: Corpus,
    *,
    batch: int,
    length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns an endless iterator over batches of training rows.

    It is an iterator of Grain. Its get_state is {"next_index": batches returned}, equal
    in all processes; set_state restores it in any number of them. Each batch is a dict
    of arrays [B, T]:

    - tokens, targets: int32 ids; targets_BT[b, t] follows tokens_BT[b, t] in the same
      document.
    - segments: int32; 1, 2, ... for each document in the row, 0 in padding.
    - positions: int32; from 0 in each piece of a document in the row.
    - weights: float32; 1 where a target counts, 0 in padding and where a conversation
      has a target that does not count.

    Args:
      corpus: from `corpus.prepare`.
      batch: B, rows of this process.
      length: T.
      seed: of the order of documents and rows, which is new each epoch.
      process_index: which share of every step's rows this process gets. Processes that
        hold the same rows (tensor parallelism across hosts) must give the same index.
      process_count: how many shares a step has. The shares of one step, joined in
        order, are the batch that one process would get alone: within an epoch no two
        shares have a target in common.

    Raises:
      ConfigError: if an argument is out of range.
    """
    _check_share(batch, length, process_index, process_count)
    rows = _rows_of(corpus.train, length, seed)
    if len(rows) > _MAX_ROWS:
        raise ConfigError(
            f"length={length} is not accepted: it cuts the {corpus.train.tokens} "
            f"training tokens into {len(rows)} rows, more than {_MAX_ROWS}"
        )
    # `drop_remainder` drops no rows: the repeated rows are endless.
    repeated = rows.shuffle(seed % 2**32).repeat()
    batches = repeated.batch(batch, drop_remainder=True)[process_index::process_count]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(batches.to_iter_dataset(options))


def held_out_batches(
    corpus: Corpus,
    *,
    batch: int,
    length: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Returns all held-out rows once, as a sequence of batches.

    The batches are like those of `train_iterator`. The sequence has a `len` and can be
    iterated again. Documents come in one fixed shuffled order, so that the first
    batches are a fair sample. The last batches have rows of padding, with weights 0, so
    that every process has the same number of batches.

    Args and raises: as in `train_iterator`.
    """
    _check_share(batch, length, process_index, process_count)
    rows = _rows_of(corpus.held_out, length, 0, multiple=batch * process_count)
    return rows.batch(batch)[process_index::process_count]
