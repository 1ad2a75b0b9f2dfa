"""Makes XLA compute while reductions run.

XLA sends a message asynchronously only if it finds compute to put between the start and
the end of the send, and by default it often finds none. This file, and no other, gives
XLA's scheduler hints: `lax.optimization_barrier` ties the merge of a message to a
matrix product, so that XLA computes the product before it waits for the message.

The hints (docs/overlap.md, "What each hint buys", has the gain of each):
- `AsyncReduction.progress`: a round of the forward pass ends after a product.
- `BackwardReduction`: the reduction of a cotangent runs beside the block that the
  backward pass computes next, across the layer scan's boundary too.
- `BackwardReduction.progress`: a round of it ends after a product of that block.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ladder_jax.residual.reductions import (
    PRODUCTS,
    Pending,
    Policy,
    program_for,
    with_gradient_of,
)


class AsyncReduction:
    """The reduction of one partial, while the block that runs beside it is traced."""

    def __init__(self, value: jax.Array, reduction: str | Policy) -> None:
        """Sends the first round's messages."""
        self.partial = value
        self._program = program_for(reduction, value)
        self._pending = self._program.begin(lax.stop_gradient(value))
        self._rounds_ended = 0
        self._products_done = 0  # of the block beside which it runs
        self._ties_last = isinstance(reduction, Policy) and reduction.ties_last(value)

    def progress(self, product: Any) -> Any:
        """Ends a round after `product` (arrays) is computed. Returns `product`.

        If there are fewer rounds than products, the block's last products end them.
        """
        self._products_done += 1
        rounds = len(self._program.rounds)
        rounds_left = rounds - self._rounds_ended
        products_left = PRODUCTS - self._products_done
        # XLA itself places the end of the last of several rounds well: where the sum is
        # read. It would end a single round right after its start, and on some chips the
        # last round of a message that is so short that XLA estimates no time for it.
        is_only_round = rounds == 1
        rounds_for_xla = 0 if is_only_round or self._ties_last else 1
        if rounds_left <= max(products_left, rounds_for_xla):
            return product
        pending, tied_product = lax.optimization_barrier((self._pending, product))
        # No derivative may pass through the state: the barrier has a derivative rule.
        self._end_round(lax.stop_gradient(pending))
        # With a single round, the next product need not wait for its message.
        return product if is_only_round else tied_product

    def wait(self) -> jax.Array:
        """Ends the rounds that are left. Returns the sum, named "reduced" for remat."""
        while self._rounds_ended < len(self._program.rounds):
            self._end_round(self._pending)
        total = self._program.finish(self._pending.state)
        return checkpoint_name(with_gradient_of(total, self.partial), "reduced")

    def _end_round(self, pending: Pending) -> None:
        self._pending = self._program.end_round(self._rounds_ended, pending)
        self._rounds_ended += 1


class BackwardReduction:
    """Sums the cotangent of the next block's input during this block's backward pass.

    This block's backward pass does not need that sum if the next block reads a stale
    stream. JAX differentiates the operations of the forward pass in reverse order, so
    the forward pass must call the end of the reduction first and its start last:

        calls in the forward pass, left to right:
          create      enter     product 1    product 2    next_input
        the backward pass, right to left:
          sum <-- end round 2 <-- end round 1 <-- end round 0 <-- send round 0

    The forward pass hands a token of zeros from call to call and never reads it. The
    token's cotangent is the state of the reduction (`Pending`): the backward pass hands
    it from right to left.
    """

    def __init__(self, sources: Sequence[jax.Array], reduction: str | Policy) -> None:
        """Places the end of the reduction in the backward pass.

        Args:
          sources: the terms whose sum the next block reads; each gets the summed
            cotangent.
          reduction: a name in REDUCTIONS, or a Policy.
        """
        first, *_ = sources
        self._like = jax.ShapeDtypeStruct(first.shape, first.dtype)
        self._program = program_for(reduction, self._like)
        self._in_order = isinstance(reduction, Policy) and reduction.in_order
        self._states = self._pending_shapes()
        rounds, count = len(self._program.rounds), len(sources)
        # How many rounds the backward pass has ended when it comes to this call. Each
        # product ends one (`progress`); the rounds beyond PRODUCTS end here.
        rounds_before = self._rounds_before = min(rounds, PRODUCTS)

        def forward(sources: tuple[jax.Array, ...]) -> Pending:
            return _zeros(self._states[rounds_before])

        def backward(pending: Pending) -> tuple[tuple[jax.Array, ...]]:
            for number in range(rounds_before, rounds):
                pending = self._program.end_round(number, pending)
            total = self._program.finish(pending.state)
            return ((total,) * count,)

        self._token = _with_backward(forward, backward, tuple(sources))

    def progress(self, operands: Any) -> Any:
        """Makes the backward pass end a round once it has `operands`' cotangents.

        Returns `operands`. If there are fewer rounds than products, the last products
        of the backward pass end them.
        """
        if self._rounds_before == 0:
            return operands
        self._rounds_before -= 1
        number = self._rounds_before
        is_last = number == len(self._program.rounds) - 1
        # The next product need not wait for the last round, unless XLA would then
        # compute that product first (Policy.in_order).
        next_product_waits = self._in_order or not is_last

        def forward(token: Pending, operands: Any) -> tuple[Pending, Any]:
            return _zeros(self._states[number]), operands

        def backward(cotangents: tuple[Pending, Any]) -> tuple[Pending, Any]:
            _, free_cotangents = cotangents
            pending, tied_cotangents = lax.optimization_barrier(cotangents)
            pending = self._program.end_round(number, pending)
            return pending, tied_cotangents if next_product_waits else free_cotangents

        self._token, operands = _with_backward(forward, backward, self._token, operands)
        return operands

    def next_input(self) -> jax.Array:
        """Zeros whose cotangent the reduction sums; the backward pass starts it here.

        The next block passes them to `with_gradient_of` beside its input.
        """
        # Rounds for which the block did not call `progress`.
        rounds_left = self._rounds_before

        def forward(token: Pending) -> jax.Array:
            return _zeros(self._like)

        def backward(cotangent: jax.Array) -> tuple[Pending]:
            pending = self._program.begin(cotangent)
            for number in range(rounds_left):
                pending = self._program.end_round(number, pending)
            return (pending,)

        return _with_backward(forward, backward, self._token)

    def _pending_shapes(self) -> list[Pending]:
        """The shapes of the reduction's state after 0, 1, ... rounds have ended."""

        def states(value: jax.Array) -> list[Pending]:
            pending = [self._program.begin(value)]
            for number in range(len(self._program.rounds)):
                pending.append(self._program.end_round(number, pending[-1]))
            return pending

        return jax.eval_shape(states, self._like)


class Overlap(NamedTuple):
    """The reductions that run beside one block."""

    forward: AsyncReduction | None  # of an earlier block's partial
    backward: BackwardReduction | None  # of the cotangent of the next block's input

    def enter(self, x: Any) -> Any:
        """Marks the operand of the block's first products. Returns it."""
        return x if self.backward is None else self.backward.progress(x)

    def progress(self, x: Any, saved: bool = True) -> Any:
        """Marks the point between two products of a block: a round may end here.

        A round of the forward pass ends after `x` is computed, and a round of the
        backward pass after `x`'s cotangent is. (MPI calls it progress of a
        non-blocking collective: Hoefler, Lumsdaine, Rehm, SC 2007.)

        Args:
          x: the result of the first of the two products, one array or several.
          saved: whether a remat that saves products saves `x`.

        Returns:
          `x`.
        """
        return self.leave(self.enter(x), saved)

    def leave(self, x: Any, saved: bool = True) -> Any:
        """Marks the result of the block's last product. Returns it."""
        x = x if self.forward is None else self.forward.progress(x)
        return checkpoint_name(x, "product") if saved else x


class OverlappedSum:
    """A sum that XLA computes beside a block (sequence.py), and the compute after it.

    What depends on the sum starts after the second of the block's products, so that XLA
    computes two products beside the messages, and the last one beside the next. JAX
    differentiates through it.
    """

    def __init__(self, total: jax.Array) -> None:
        self.total = total
        self._products_done = 0

    def progress(self, x: Any, saved: bool = True) -> Any:
        """Marks the point between two products of the block: see Overlap.progress."""
        self._products_done += 1
        if self._products_done == PRODUCTS - 1:
            self.total, _ = lax.optimization_barrier((self.total, x))
        return checkpoint_name(x, "product") if saved else x


def _with_backward(
    forward: Callable[..., Any], backward: Callable[..., Any], *args: Any
) -> Any:
    """`forward(*args)`; `backward` maps its cotangent to the cotangents of `args`."""
    function = jax.custom_vjp(forward)
    function.defvjp(
        lambda *args: (forward(*args), None),
        lambda _, cotangents: backward(cotangents),
    )
    return function(*args)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
