"""Chooses the pieces of prompts that one prefill call computes, and packs them.

A call has one of few shapes: its width is a compiled size, and its number of rows a
power of four.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ladder_jax import decode_state
from ladder_jax.serve.buckets import round_up

ROWS_FACTOR = 4  # each compiled number of rows is this many times the one before


class Piece(NamedTuple):
    """A part of a prompt, in tokens."""

    staging_index: int  # the staging row of its request
    start: int  # how many prompt tokens have been computed before
    length: int
    last: bool  # the prompt ends with it

    @property
    def stop(self) -> int:
        """How many prompt tokens have been computed after this piece."""
        return self.start + self.length


class Prompt(NamedTuple):
    """What a request has prefill compute."""

    tokens: np.ndarray  # int32
    # How many tokens at their end it has generated, before it lost its slot.
    generated: int = 0


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
      waiting: (staging index, tokens computed so far, tokens in total) of every
        prompt; the first ones are computed first.
      sizes: compiled widths, ascending; the last is the longest piece.
      budget: tokens, padding included. If the first prompt's piece does not fit, it is
        shortened to the largest compiled width that fits.
    Returns (pieces, the width that they are padded to). If no compiled width fits the
    budget, there are no pieces, and the width is 0. If more than half of the call's
    rows would be padding, it takes fewer pieces, so that no row is.
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
    call_rows = rows(len(pieces))
    if 2 * len(pieces) < call_rows:  # for example 5 to 7 pieces: 4 instead of 16 rows
        pieces = pieces[: call_rows // ROWS_FACTOR]
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
    context: int,
    prompts: Sequence[Prompt],
    states: Sequence[decode_state.SlotState],
    staging_size: int,
    padding_id: int,
) -> decode_state.Prompts:
    """Packs pieces into the arguments of a prefill call, NumPy arrays.

    Args:
      pieces: at least one; the call has `rows(len(pieces))` rows, the rest is padding.
      width: tokens that every piece is padded to.
      context: how many tokens at the beginning of a row the call reads and writes.
      prompts: the whole prompt of every piece.
      states: the decode_state.SlotState [1] of every piece's request.
      staging_size: rows of staging; as a staging index, it marks a row of padding.
      padding_id: pads a prompt; an id outside the vocabulary.
    """
    count = rows(len(pieces))
    # Typed Any: the fields of Prompts are declared as device arrays.
    tokens: Any = np.zeros((count, width), np.int32)
    start: Any = np.zeros(count, np.int32)
    length: Any = np.zeros(count, np.int32)
    staging_index: Any = np.full(count, staging_size, np.int32)
    last: Any = np.zeros(count, bool)
    beginnings: Any = np.full((count, context), padding_id, np.int32)
    size: Any = np.zeros(count, np.int32)
    generated: Any = np.zeros(count, np.int32)
    for i, (piece, (prompt, generated_count)) in enumerate(zip(pieces, prompts)):
        size[i], generated[i] = len(prompt), generated_count
        tokens[i, : piece.length] = prompt[piece.start : piece.stop]
        staging_index[i] = piece.staging_index
        start[i], length[i], last[i] = piece.start, piece.length, piece.last
        beginning = prompt[:context]
        beginnings[i, : len(beginning)] = beginning

    def stack(*leaves: Any) -> np.ndarray:  # copies of the first row are padding
        padding = [leaves[0]] * (count - len(leaves))
        return np.concatenate([*leaves, *padding])

    return decode_state.Prompts(
        tokens=tokens,
        start=start,
        length=length,
        staging_index=staging_index,
        last=last,
        prompt=beginnings,
        state=jax.tree.map(stack, *states),
        size=size,
        generated=generated,
    )
