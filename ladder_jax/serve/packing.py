"""Which pieces of which prompts one prefill call computes, and the call's arguments. Shapes come in few sizes."""

from typing import NamedTuple

import jax
import numpy as np

from ladder_jax import decode
from ladder_jax.serve.buckets import round_up


class Piece(NamedTuple):
    """A part of a prompt."""

    staging_index: int  # of its request
    start: int  # tokens of the prompt that are computed already
    length: int
    last: bool  # the prompt ends with it

    @property
    def stop(self):
        return self.start + self.length


def rows(count):
    """The compiled number of prompts for `count` of them: powers of four."""
    return 4 ** (max(count - 1, 0).bit_length() + 1 >> 1)


def pick_pieces(waiting, sizes, budget):
    """The next pieces of as many prompts as fit `budget` tokens, padding included: ([Piece], their padded width).

    Args:
      waiting: (place, tokens computed, tokens in all) of every prompt, in order.
      sizes: compiled widths, ascending; the last is the longest piece.
      budget: tokens. Where not even one prompt's piece fits, it gets a shorter one, if a compiled width is as short.
        Where more than half of a call's rows would be padding, it takes fewer prompts.
    """
    chosen, width = [], 0
    for place, done, total in waiting:
        length = min(total - done, sizes[-1])
        padded = max(width, round_up(sizes, length))
        if chosen and padded * rows(len(chosen) + 1) > budget:
            break
        if not chosen and padded > budget:
            length = min(
                length, max((size for size in sizes if size <= budget), default=0)
            )
            padded = round_up(sizes, length)
            if not length:
                break
        chosen.append(Piece(place, done, length, done + length == total))
        width = padded
    if 2 * len(chosen) < rows(len(chosen)):
        chosen = chosen[: rows(len(chosen)) // 4]
    return chosen, max((round_up(sizes, piece.length) for piece in chosen), default=0)


def call_shapes(sizes, budget):
    """All (rows, width) that `pick_pieces` can come to."""
    counts = sorted({rows(count) for count in range(1, budget + 1)})
    return [
        (count, width)
        for width in sizes
        for count in counts
        if count == 1 or count * width <= budget
    ]


def pack(chosen, width, seen, prompts, turns, places, nothing):
    """The decode.Prompts of these pieces, rows of padding included.

    Args:
      width: tokens a piece is padded to.
      seen: tokens of the cache that the call looks at.
      prompts: of every piece, the whole prompt (int32 array).
      turns: of every piece, its request's decode.SlotState, one row each.
      places: how many there are in staging, which is the place of a row of padding.
      nothing: the id that pads a prompt: one that does not exist.
    """
    count = rows(len(chosen))
    tokens = np.zeros((count, width), np.int32)
    whole = np.full((count, seen), nothing, np.int32)
    start, length, place, last = (
        np.zeros(count, kind) for kind in (np.int32, np.int32, np.int32, bool)
    )
    place[:] = places
    for i, (piece, prompt) in enumerate(zip(chosen, prompts)):
        tokens[i, : piece.length] = prompt[piece.start : piece.stop]
        place[i], start[i], length[i], last[i] = piece
        if piece.last:
            whole[i, : len(prompt)] = prompt
    row = jax.tree.map(
        lambda *xs: np.concatenate([*xs, *[xs[0]] * (count - len(xs))]), *turns
    )
    return decode.Prompts(tokens, start, length, place, last, whole, row)
