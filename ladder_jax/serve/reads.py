"""Counts the cached tokens that attention reads in a decode step: rows against pages.

Rows of a state are as long as the longest request needs, and attention reads all of
them. With pages it reads the pages that hold a token of a live request, to their end.
Multiply by the bytes of a token's keys and values for the bytes that HBM must move.
"""

from collections.abc import Sequence

import numpy as np


def in_rows(width: int, length: int) -> int:
    """Tokens that a step reads of `width` rows with memory for `length` tokens each."""
    return width * length


def in_pages(
    lengths: Sequence[int] | np.ndarray, page_size: int, pairs: int = 1
) -> int:
    """Tokens that a step reads of the pages of live requests.

    Args:
      lengths: tokens of each live request.
      page_size: tokens of a page.
      pairs: the (row, page) pairs that an iteration of attention's last loop reads
        (pages.FEW); its last iteration reads as many as the others. 1: without padding.
    """
    used = int(np.sum(-(-np.asarray(lengths, int) // page_size)))
    return -(-used // pairs) * pairs * page_size
