"""The residual stream between two blocks, and how a block reads it.

The stream is a pytree of arrays that can cross a layer scan's boundary. A partial is
still to be reduced when it does: the reduction starts with the next block and runs
beside it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax import sharding
from ladder_jax.residual.overlap import AsyncReduction, BackwardReduction
from ladder_jax.residual.reductions import Policy


class Stream(NamedTuple):
    """The residual stream between two blocks; arrays are [B, T, D]."""

    total: jax.Array | None = None  # the sum of what all later blocks read; None: zero
    sums: tuple[jax.Array, ...] = ()  # reduced, too new for some blocks; oldest first
    partial: jax.Array | None = None  # the newest block's, not yet reduced
    # Zeros. Their cotangent is that of the next block's input, not yet reduced.
    token: jax.Array | None = None

    def read(self, reduction: str | Policy) -> jax.Array:
        """The sum of all that was written, which a block with delay 0 reads."""
        total, _, _ = self.split(0, reduction)
        return total

    def split(
        self, delay: int, reduction: str | Policy
    ) -> tuple[jax.Array, tuple[jax.Array, ...], AsyncReduction | None]:
        """Splits the stream into what a block with this delay reads and the rest.

        Returns:
          The sum that the block reads, the sums that are too new for it, and the
          reduction of the newest partial if that is too new, too: it is started here.
        """
        sums, newest = self.sums, None
        if self.partial is not None:
            newest = AsyncReduction(self.partial, reduction)
            if not delay:
                sums, newest = (*sums, newest.wait()), None
        unread = delay - (newest is not None)
        due = max(len(sums) - unread, 0)
        return _add(self.total, *sums[:due]), sums[due:], newest

    def as_carry(self, count: int, delay: int, reduction: str | Policy) -> "Stream":
        """The same stream with all fields set and `count` sums, for a scan to carry.

        Sums beyond that number are added to the total; missing arrays become zeros.

        Args:
          count: see `carried_sums`.
          delay: the delay of the next block.
          reduction: a name in REDUCTIONS, or a Policy.
        """
        surplus = max(len(self.sums) - count, 0)
        total, sums = _add(self.total, *self.sums[:surplus]), self.sums[surplus:]
        like: Any = self.partial if total is None else total
        zeros = jnp.zeros_like(like)
        total = zeros if total is None else total
        partial = zeros if self.partial is None else self.partial
        sums = (zeros,) * (count - len(sums)) + sums
        token = self.token
        if token is None:
            backward = backward_reduction(total, sums, delay, reduction)
            token = None if backward is None else backward.next_input()
        return Stream(total, sums, partial, token)


def backward_reduction(
    total: jax.Array, newer: tuple[jax.Array, ...], delay: int, reduction: str | Policy
) -> BackwardReduction | None:
    """The reduction of the next block's input's cotangent, to run beside this block.

    Args:
      total, newer: the terms of the stream, without this block's own partial.
      delay: the next block's delay: it does not read this block's partial and the
        `delay - 1` terms before it.
      reduction: a name in REDUCTIONS, or a Policy.

    Returns:
      None if the delay is 0: this block's backward pass needs that cotangent at once.
    """
    if not delay or sharding.axis_size(sharding.TENSOR) == 1:
        return None
    due = max(len(newer) - (delay - 1), 0)
    return BackwardReduction((total, *newer[:due]), reduction)


def _add(total: jax.Array | None, *sums: jax.Array) -> Any:
    """The sum of all; None, which means zero, if there is nothing."""
    for value in sums:
        total = value if total is None else total + value
    return total
