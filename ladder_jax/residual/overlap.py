"""Makes XLA compute while reductions run: no other file talks to its scheduler.

XLA sends a message asynchronously, but only if it finds compute to put between the
send's start and its end, and by default it often finds none. Here the program says
where each round of a reduction ends: `lax.optimization_barrier` ties the merge of a
message to a matrix product, so that XLA computes the product before it waits.

Hints to XLA, and what each buys (docs/overlap.md, "What each hint buys"):
- `AsyncReduction.progress`: rounds of the forward pass end after a block's products.
- `BackwardReduction`: the reduction of a block's cotangent is carried, unfinished, to
  the block that the backward pass computes next, across the layer scan's boundary too.
- `BackwardReduction.progress`: its rounds end after that block's products.
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
        self._ended = 0  # rounds
        self._products = 0  # products of the block so far

    def progress(self, product: Any) -> Any:
        """Ends a round after `product` (arrays) is computed. Returns `product`.

        If there are fewer rounds than products, the last products end them.
        """
        self._products += 1
        rounds = len(self._program.rounds)
        # XLA ends the last of several rounds best by itself, where the sum is read. It
        # would end an only round right after its start.
        untied = 1 if rounds > 1 else 0
        if rounds - self._ended <= max(PRODUCTS - self._products, untied):
            return product
        pending, after = lax.optimization_barrier((self._pending, product))
        # The barrier has a derivative rule; the state must not take part in it.
        self._end_round(lax.stop_gradient(pending))
        # The next product need not wait for an only round.
        return after if untied else product

    def wait(self) -> jax.Array:
        """Ends the rounds that are left. Returns the sum, named "reduced" for remat."""
        while self._ended < len(self._program.rounds):
            self._end_round(self._pending)
        total = self._program.finish(self._pending.state)
        return checkpoint_name(with_gradient_of(total, self.partial), "reduced")

    def _end_round(self, pending: Pending) -> None:
        self._pending = self._program.end_round(self._ended, pending)
        self._ended += 1


class BackwardReduction:
    """Sums the cotangent of the next block's input during this block's backward pass.

    This block's backward pass does not need that sum if the next block reads a stale
    stream. Autodiff visits the points of the forward trace in reverse order, so that
    the trace registers the end of the reduction first and its start last:

        trace of the forward pass, left to right:
          create      enter     product 1    product 2    next_input
        the backward pass, right to left:
          sum <-- end round 2 <-- end round 1 <-- end round 0 <-- send round 0

    In the forward pass a token of zeros, never read, goes from point to point. Its
    cotangent is the state of the reduction (`Pending`), which goes the other way.
    """

    def __init__(self, sources: Sequence[jax.Array], reduction: str | Policy) -> None:
        """Registers the end of the reduction.

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
        # Rounds that the backward pass ends before it comes to the point of the trace.
        self._rounds_before = min(rounds, PRODUCTS)
        tied = self._rounds_before

        def backward(pending: Pending) -> tuple[tuple[jax.Array, ...]]:
            for number in range(tied, rounds):
                pending = self._program.end_round(number, pending)
            total = self._program.finish(pending.state)
            return ((total,) * count,)

        self._token = _with_backward(
            lambda sources: _zeros(self._states[tied]), backward, tuple(sources)
        )

    def progress(self, operands: Any) -> Any:
        """Ends a round, in the backward pass, after the cotangents of `operands`.

        Returns `operands`. If there are fewer rounds than products, the products that
        the backward pass comes to last end them.
        """
        if not self._rounds_before:
            return operands
        number = self._rounds_before = self._rounds_before - 1
        last = number == len(self._program.rounds) - 1

        def forward(token: Pending, operands: Any) -> tuple[Pending, Any]:
            return _zeros(self._states[number]), operands

        def backward(cotangents: tuple[Pending, Any]) -> tuple[Pending, Any]:
            pending, after = lax.optimization_barrier(cotangents)
            pending = self._program.end_round(number, pending)
            # The next product need not wait for the last round, unless XLA would then
            # compute that product first (Policy.in_order).
            return pending, after if self._in_order or not last else cotangents[1]

        self._token, operands = _with_backward(forward, backward, self._token, operands)
        return operands

    def next_input(self) -> jax.Array:
        """Zeros whose cotangent starts the reduction: see `with_gradient_of`."""
        left = self._rounds_before

        def backward(cotangent: jax.Array) -> tuple[Pending]:
            pending = self._program.begin(cotangent)
            for number in range(left):  # rounds for which the block had no products
                pending = self._program.end_round(number, pending)
            return (pending,)

        return _with_backward(lambda _: _zeros(self._like), backward, self._token)

    def _pending_shapes(self) -> list[Pending]:
        """The shapes of the reduction's state before each round ends and at its end."""

        def states(value: jax.Array) -> list[Pending]:
            pending = [self._program.begin(value)]
            for number in range(len(self._program.rounds)):
                pending.append(self._program.end_round(number, pending[-1]))
            return pending

        return jax.eval_shape(states, self._like)


class Overlap(NamedTuple):
    """The reductions that run beside one block."""

    forward: AsyncReduction | None  # of an earlier block's partial
    backward: BackwardReduction | None  # of the next block's input's cotangent

    def enter(self, x: Any) -> Any:
        """Marks the operand of the block's first products. Returns it."""
        return x if self.backward is None else self.backward.progress(x)

    def progress(self, x: Any, saved: bool = True) -> Any:
        """Marks the point between two products of a block: a round may end here.

        A round of the forward pass ends after `x` is computed, and a round of the
        backward pass after `x`'s cotangent is. (MPI calls it progress of a
        non-blocking collective: Hoefler, Lumsdaine, Rehm, SC 2007.)

        Args:
          x: what the first of the two products gave: arrays.
          saved: whether a remat that saves products saves `x`.

        Returns:
          `x`.
        """
        return self.leave(self.enter(x), saved)

    def leave(self, x: Any, saved: bool = True) -> Any:
        """Marks the result of the block's last product. Returns it."""
        x = x if self.forward is None else self.forward.progress(x)
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
