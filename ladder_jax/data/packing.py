"""Packed rows of whole conversations: none goes on in another row.

A conversation begins in its row, so every answer sees all that came before it. Rows are
filled by best fit: the longest conversation first, each into the fullest row that has
room. What is left at the end of a row is padding.

Which lengths share a row is the same in each epoch; which conversations of a length
these are, and the order of rows, is not. So a row is a function of its number, as in
`batches`.

Dims: T length of a row, D documents.
"""

import bisect
import functools

import grain
import numpy as np

from ladder_jax.data.corpus import Side

Row = dict[str, np.ndarray]


def empty_row(length: int, pad: int) -> Row:
    """Returns a row [T] of padding; `train_iterator` says what its arrays are."""
    return {
        "tokens": np.full(length, pad, np.int32),
        "targets": np.full(length, pad, np.int32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
    }


def add_piece(row: Row, column: int, side: Side, start: int, size: int) -> None:
    """Writes `size` targets of a document into a row, as its next segment.

    Args:
      row: changed in place.
      column: where the piece begins.
      side: the documents.
      start: the position in `side.ids` of the token before the first target.
      size: the number of targets.
    """
    columns = slice(column, column + size)
    ids = side.ids[start : start + size + 1]
    segment = row["segments"][column - 1] + 1 if column else 1
    row["tokens"][columns] = ids[:-1]
    row["targets"][columns] = ids[1:]
    row["segments"][columns] = segment
    row["positions"][columns] = np.arange(size)
    counted = slice(start + 1, start + 1 + size)
    row["weights"][columns] = 1 if side.counted is None else side.counted[counted]


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Returns the number of the row of each size, from 0.

    Args:
      sizes: in falling order, none more than `length`.
      length: the room of a row.
    """
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room that have rows, in rising order
    row_of = np.empty(len(sizes), np.int64)
    count = 0
    for i, size in enumerate(sizes.tolist()):
        position = bisect.bisect_left(rooms, size)
        if position == len(rooms):
            row, room = count, length
            count += 1
        else:
            room = rooms[position]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms.pop(position)
        row_of[i] = row
        left = room - size
        if left:
            waiting = rows_by_room.setdefault(left, [])
            if not waiting:
                bisect.insort(rooms, left)
            waiting.append(row)
    return row_of


class WholeRows(grain.MapDataset):
    """Rows of whole conversations of a side; each epoch has other ones together.

    `len` is one epoch; row `len + i` is row i of the second epoch, and so on.

    Args:
      side: the conversations. Those longer than a row are cut, see `Side.cut`.
      length: T.
      seed: of the order.
      multiple: an epoch has a multiple of this many rows; the last ones are padding.
    """

    def __init__(self, side: Side, length: int, seed: int, multiple: int = 1) -> None:
        super().__init__()
        self._side, _ = side.cut(length)
        self._length, self._seed = length, seed
        sizes_D = np.sort(self._side.targets_D)[::-1]
        row_of_D = best_fit(sizes_D, length)
        self._used = int(row_of_D.max(initial=-1)) + 1
        self._rows = -(-self._used // multiple) * multiple
        # By row: the ranks by length of the conversations in it.
        self._ranks_D = np.argsort(row_of_D, kind="stable")
        self._first = np.searchsorted(row_of_D[self._ranks_D], range(self._used + 1))
        # Two epochs: the one that is read, and the next one, which is prefetched.
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        return self._rows

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (the conversation of each rank, the rows in order) of an epoch."""
        bits = np.random.PCG64([self._seed, epoch])
        random_D = bits.random_raw(len(self._side.starts_D))
        order_D = np.lexsort((random_D, -self._side.targets_D))
        return order_D, np.argsort(bits.random_raw(self._used), kind="stable")

    def __getitem__(self, index: int | slice) -> Row | grain.MapDataset:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, number = divmod(index, self._rows)
        side = self._side
        row = empty_row(self._length, side.pad)
        if number >= self._used:
            return row
        order_D, rows = self._order(epoch)
        first = rows[number]
        ranks = self._ranks_D[self._first[first] : self._first[first + 1]]
        column = 0
        for document in order_D[ranks]:
            size = int(side.targets_D[document])
            add_piece(row, column, side, int(side.starts_D[document]), size)
            column += size
        return row
