"""The few sizes that programs are compiled for, in ascending order."""

from collections.abc import Sequence


def bucket_sizes(least: int, most: int) -> list[int]:
    """Returns `least` times powers of two while they are below `most`, then `most`.

    bucket_sizes(16, 100) is [16, 32, 64, 100].
    """
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def with_halves(sizes: Sequence[int], least: int) -> list[int]:
    """Returns the sizes, and the middle between each two neighbours from `least` on.

    with_halves([4, 8, 16, 32], 8) is [4, 8, 12, 16, 24, 32].
    """
    middles = [
        (size + following) // 2
        for size, following in zip(sizes, sizes[1:])
        if size >= least and following - size > 1
    ]
    return sorted([*sizes, *middles])


def round_up(sizes: Sequence[int], needed: int) -> int:
    """Returns the smallest of `sizes` that is at least `needed`, else the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def between(sizes: Sequence[int], start: int, stop: int) -> list[int]:
    """Returns the sizes after `start` up to and including `stop`, in that order.

    The order is descending if `stop` is the smaller one. Both must be in `sizes`.
    between([16, 32, 64], 64, 16) is [32, 16].
    """
    i, j = sizes.index(start), sizes.index(stop)
    if i < j:
        return list(sizes[i + 1 : j + 1])
    return list(reversed(sizes[j:i]))
