"""Chooses the pieces of prompts that one prefill call computes, and packs them.

A call has few shapes: its width is one of the compiled sizes, its rows a power of four.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ladder_jax import decode
from ladder_jax.serve.buckets import round_up

ROWS_FACTOR = 4  # between two compiled numbers of rows


class Piece(NamedTuple):
    """A part of a prompt, in tokens."""

    staging_index: int  # of its request
    start: int  # prompt tokens that are computed already
    length: int
    last: bool  # the prompt ends with it

    @property
    def stop(self) -> int:
        return self.start + self.length


def rows(count: int) -> int:
    """Returns the compiled number of rows for `count` prompts: 1, 4, 16, 64, ..."""
    size = 1
    while size < count:
        size *= ROWS_FACTOR
    return size


def pick_pieces(
    waiting: Sequence[tuple[int, int, int]], sizes: Sequence[int], budget: int
) -> tuple[list[Piece], int]:
    """Picks the next pieces of as many prompts as fit a budget.

    Args:
      waiting: (staging index, tokens computed, tokens in all) of every prompt, in the
        order in which they take part.
      sizes: compiled widths, ascending; the last is the longest piece.
      budget: tokens, padding included. If the first prompt's piece does not fit, it is
        shortened to the largest compiled width that fits.
    Returns (pieces, the width that they are padded to). There are none, and the width
    is 0, if no compiled width fits the budget. There are fewer than fit if more than
    half of the call's rows would be padding.
    """
    pieces: list[Piece] = []
    width = 0
    for index, computed, total in waiting:
        length = min(total - computed, sizes[-1])
        padded = max(width, round_up(sizes, length))
        if pieces and padded * rows(len(pieces) + 1) > budget:
            break
        if not pieces and padded > budget:
            padded = max((size for size in sizes if size <= budget), default=0)
            length = min(length, padded)
            if not length:
                break
        last = computed + length == total
        pieces.append(Piece(index, computed, length, last))
        width = padded
    if 2 * len(pieces) < rows(len(pieces)):
        pieces = pieces[: rows(len(pieces)) // ROWS_FACTOR]
    widths = [round_up(sizes, piece.length) for piece in pieces]
    return pieces, max(widths, default=0)


def call_shapes(sizes: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Returns all (rows, width) that `pick_pieces` can return for a call."""
    counts = sorted({rows(count) for count in range(1, budget + 1)})
    return [
        (count, width)
        for width in sizes
        for count in counts
        if count == 1 or count * width <= budget
    ]


def pack(
    pieces: Sequence[Piece],
    width: int,
    seen: int,
    prompts: Sequence[np.ndarray],
    states: Sequence[decode.SlotState],
    places: int,
    padding_id: int,
) -> decode.Prompts:
    """Packs pieces into the arguments of a prefill call, NumPy arrays.

    Args:
      pieces: at least one; the call has `rows(len(pieces))` rows, the rest is padding.
      width: tokens that every piece is padded to.
      seen: how many tokens of a cache row the call reads and writes.
      prompts: the whole prompt (int32) of every piece.
      states: the decode.SlotState [1] of every piece's request.
      places: how many there are in staging; it is the staging index of a padding row.
      padding_id: pads a prompt; an id outside the vocabulary.
    """
    count = rows(len(pieces))
    # Typed Any: the fields of Prompts are declared as device arrays.
    tokens: Any = np.zeros((count, width), np.int32)
    start: Any = np.zeros(count, np.int32)
    length: Any = np.zeros(count, np.int32)
    staging_index: Any = np.full(count, places, np.int32)
    last: Any = np.zeros(count, bool)
    whole: Any = np.full((count, seen), padding_id, np.int32)
    for i, (piece, prompt) in enumerate(zip(pieces, prompts)):
        tokens[i, : piece.length] = prompt[piece.start : piece.stop]
        staging_index[i] = piece.staging_index
        start[i], length[i], last[i] = piece.start, piece.length, piece.last
        if piece.last:
            whole[i, : len(prompt)] = prompt

    def stack(*leaves: Any) -> np.ndarray:
        padding = [leaves[0]] * (count - len(leaves))
        return np.concatenate([*leaves, *padding])

    return decode.Prompts(
        tokens=tokens,
        start=start,
        length=length,
        staging_index=staging_index,
        last=last,
        prompt=whole,
        state=jax.tree.map(stack, *states),
    )
