"""The few sizes that programs are compiled for, and which of them to take."""


def bucket_sizes(least, most):
    """Powers of two from `least` up, and `most` itself, which is the last."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def round_up(sizes, needed):
    """The smallest of `sizes` (ascending) that is at least `needed`, else the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def between(sizes, start, stop):
    """Those of `sizes` (ascending) that come after `start` on the way to `stop`, up or down."""
    i, j = sizes.index(start), sizes.index(stop)
    return sizes[i + 1 : j + 1] if i < j else sizes[j:i][::-1]
