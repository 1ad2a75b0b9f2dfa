"""The residual stream between two blocks, and how a block reads it.

The stream is a pytree of arrays that a layer scan can carry. The newest partial is
carried unreduced: its reduction starts with the next block and runs beside it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax import sharding
from ladder_jax.residual.overlap import AsyncReduction, BackwardReduction
from ladder_jax.residual.reductions import Policy


class Stream(NamedTuple):
    """The residual stream between two blocks; arrays are [B, T, D]."""

    # The sum of the terms that every later block reads; None stands for zero.
    total: jax.Array | None = None
    # Reduced partials, oldest first, that a later block may not read yet.
    sums: tuple[jax.Array, ...] = ()
    # The newest block's partial, not yet reduced.
    partial: jax.Array | None = None
    # Zeros. The backward pass passes the unreduced cotangent of the next block's input
    # as the cotangent of this array.
    token: jax.Array | None = None

    def read(self, reduction: str | Policy) -> jax.Array:
        """The sum of all terms, which a block with delay 0 reads."""
        total, _, _ = self.split(0, reduction)
        return total

    def split(
        self, delay: int, reduction: str | Policy
    ) -> tuple[jax.Array, tuple[jax.Array, ...], AsyncReduction | None]:
        """Splits the stream into what a block with this delay reads and the rest.

        It starts the reduction of the newest partial.

        Returns:
          The sum that the block reads, the sums that are too new for it, and the
          pending reduction; None if there is none, or if the block reads its sum.
        """
        if self.partial is None:
            readable, unread = split_newest(self.sums, delay)
            return add(self.total, *readable), unread, None
        pending = AsyncReduction(self.partial, reduction)
        if delay == 0:
            return add(self.total, *self.sums, pending.wait()), (), None
        # The pending reduction is one of the `delay` terms that the block skips.
        readable, unread = split_newest(self.sums, delay - 1)
        return add(self.total, *readable), unread, pending

    def as_carry(self, count: int, delay: int, reduction: str | Policy) -> "Stream":
        """The same stream in the one structure that all iterations of a scan carry.

        All fields are set, and there are `count` sums: older sums are added to the
        total, and missing arrays become zeros.

        Args:
          count: see forms.carried_sums.
          delay: the delay of the next block.
          reduction: a name in REDUCTIONS, or a Policy.
        """
        older, sums = split_newest(self.sums, count)
        total = add(self.total, *older)
        like: Any = self.partial if total is None else total  # one of them is set
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
    """Sums the cotangent of the next block's input beside this block's backward pass.

    Args:
      total, newer: the terms of the stream, without this block's own partial.
      delay: the next block's delay. The next block skips this block's partial and the
        `delay - 1` terms before it.
      reduction: a name in REDUCTIONS, or a Policy.

    Returns:
      None if the delay is 0: this block's backward pass needs that cotangent at once.
    """
    if not delay or sharding.axis_size(sharding.TENSOR) == 1:
        return None
    readable, _ = split_newest(newer, delay - 1)
    return BackwardReduction((total, *readable), reduction)


def split_newest(
    terms: tuple[jax.Array, ...], count: int
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Splits off the newest `count` terms, or all if there are fewer."""
    split = max(len(terms) - count, 0)
    return terms[:split], terms[split:]


def add(total: jax.Array | None, *sums: jax.Array) -> Any:
    """The sum of the arguments; None, which stands for zero, if there are none."""
    for value in sums:
        total = value if total is None else total + value
    return total
