"""Ways to sum a partial over the tensor axis, in rounds that other work can run between.

A reduction is a state, a list of rounds and a finish. A round sends something of the state to other shards and merges
what arrives. XLA starts and ends a send (`ppermute`) apart from each other on TPU, and runs what stands between; the
program makes sure that something does: `AsyncReduction.behind` ties the merge to a matrix product of the block that runs
meanwhile, so that the product is computed while the message travels. Shards end with bit-identical sums.

Derivatives do not pass through the rounds: a sum's cotangent is its partials' (see sharding.py), whatever computed it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax.sharding import TENSOR, axis_size, gray

PRODUCTS = 3  # that a block passes through `AsyncReduction.behind` (model.py)
SUBLANES, LANES = (
    8,
    128,
)  # of a TPU's registers: arrays cut at multiples of them are not moved


class Round(NamedTuple):
    """One exchange: `merge(state, send(state))` is the next state."""

    send: Callable[[Any], Any]
    merge: Callable[[Any, Any], Any]


def psum(value):
    """XLA's own all-reduce: one round, in whatever way the compiler thinks best."""
    return (
        value,
        [Round(lambda x: lax.psum(x, TENSOR), lambda _, total: total)],
        lambda total: total,
    )


def one_shot(value):
    """Every shard gets all partials and sums them: the lowest latency, n - 1 times the bytes. One rounding."""
    total = lambda _, parts: jnp.sum(parts, axis=0, dtype=jnp.float32).astype(
        value.dtype
    )
    return (
        value,
        [Round(lambda x: lax.all_gather(x, TENSOR), total)],
        lambda total: total,
    )


def recursive_doubling(value):
    """log2 n exchanges of the whole message, each with the shard whose Gray code differs in one bit (sharding.gray).

    (Thakur et al. 2005, section 4, whose partners differ in a bit of the index.) The highest bit goes first: its
    partners are the farthest apart, and a block's first products are the longest to run behind. Where n is no power of
    two, the shards beyond the largest one first hand over their partials, and get the sum last.
    """
    n = axis_size(TENSOR)
    core = 1 << (n.bit_length() - 1)
    add = lambda x, other: x + other  # what has no sender arrives as zeros
    rounds = [Round(_permute(exchange(core, bit)), add) for bit in _powers(core)[::-1]]
    if n > core:
        fold = [(i, i - core) for i in range(core, n)]
        take = lambda x, other: jnp.where(lax.axis_index(TENSOR) < core, x, other)
        rounds = [
            Round(_permute(fold), add),
            *rounds,
            Round(_permute([(b, a) for a, b in fold]), take),
        ]
    return value, rounds, lambda total: total


def halving_doubling(value):
    """Reduce-scatter by recursive halving, then all-gather by doubling: 2 (n - 1) / n of the bytes in 2 log2 n rounds.

    (Rabenseifner 2004.) Halves go to the nearest, eighths to the farthest. For a power of two; other sizes go round
    the ring.
    """
    n = axis_size(TENSOR)
    if n & (n - 1):
        return ring(value)
    bits = _powers(n)

    def halve(k, summing):
        """Bit k of a shard's Gray code says which half of the pieces that are left is its own: it ends with one piece
        of the sum and, backwards, with all."""
        length = n >> (k + 1)
        mine = lambda k: (gray(lax.axis_index(TENSOR)) & bits[k] != 0) * (n >> (k + 1))
        start = sum(map(mine, range(k)), 0)
        keep, give = start + mine(k), start + length - mine(k)
        part = lambda x, place: lax.dynamic_slice_in_dim(x, place, length, axis=0)
        to = _permute(exchange(n, bits[k]))
        if summing:
            return Round(
                lambda x: to(part(x, give)),
                lambda x, other: lax.dynamic_update_slice_in_dim(
                    x, part(x, keep) + other, keep, axis=0
                ),
            )
        return Round(
            lambda x: to(part(x, keep)),
            lambda x, other: lax.dynamic_update_slice_in_dim(x, other, give, axis=0),
        )

    there = range(len(bits))
    rounds = [*(halve(k, True) for k in there), *(halve(k, False) for k in there[::-1])]
    return _pieces(value, n), rounds, partial(_whole, like=value)


def direct(value):
    """Reduce-scatter and all-gather in two rounds of n - 1 messages at once, 2 (n - 1) / n of the bytes in all.

    The fewest rounds at the fewest bytes; its messages cross each other's links. One rounding: pieces are summed in
    float32, each on the shard where it ends.
    """
    n = axis_size(TENSOR)
    away = range(1, n)
    to = [_permute([(i, (i + s) % n) for i in range(n)]) for s in range(n)]

    def scatter(pieces):
        return [to[s](_piece(pieces, (lax.axis_index(TENSOR) + s) % n)) for s in away]

    def total(pieces, others):
        parts = [_piece(pieces, lax.axis_index(TENSOR)), *others]
        return sum(part.astype(jnp.float32) for part in parts).astype(value.dtype)

    def join(piece, others):  # what comes from s shards back is piece i - s
        place = (lax.axis_index(TENSOR) - jnp.arange(n)) % n
        return jnp.concatenate([piece, *others])[place]

    rounds = [
        Round(scatter, total),
        Round(lambda piece: [to[s](piece) for s in away], join),
    ]
    return _pieces(value, n), rounds, partial(_whole, like=value)


def ring(value):
    """Reduce-scatter and all-gather round a ring, both ways at once: 2 (n - 1) rounds of 1 / n of the bytes."""
    n = axis_size(TENSOR)
    pieces = _pieces(value, 2 * n)
    ways = [
        (+1, [(i, (i + 1) % n) for i in range(n)]),
        (-1, [(i, (i - 1) % n) for i in range(n)]),
    ]

    def both(step, summing):
        def send(states):
            return tuple(
                _permute(pairs)(_piece(x, (lax.axis_index(TENSOR) - way * step) % n))
                for x, (way, pairs) in zip(states, ways)
            )

        def merge(states, others):
            made = []
            for x, other, (way, _) in zip(states, others, ways):
                place = (lax.axis_index(TENSOR) - way * (step + 1)) % n
                new = _piece(x, place) + other if summing else other
                made.append(lax.dynamic_update_slice_in_dim(x, new, place, axis=0))
            return tuple(made)

        return Round(send, merge)

    # after n - 1 sums, shard i holds the whole sum of piece i + 1 (or i - 1, the other way round)
    rounds = [both(step, True) for step in range(n - 1)] + [
        both(step - 1, False) for step in range(n - 1)
    ]
    return (
        (pieces[:n], pieces[n:]),
        rounds,
        lambda states: _whole(jnp.concatenate(states), value),
    )


REDUCTIONS = {
    "psum": psum,
    "one-shot": one_shot,
    "recursive-doubling": recursive_doubling,
    "halving-doubling": halving_doubling,
    "direct": direct,
    "ring": ring,
}


def _permute(pairs):
    return lambda x: lax.ppermute(x, TENSOR, pairs)


def exchange(n, bit):
    """The pairs of shards, of n, whose Gray codes differ in `bit`: their indices differ in all bits up to it."""
    return [(i ^ (2 * bit - 1), i) for i in range(n)]


def _powers(n):
    return [1 << k for k in range(n.bit_length() - 1)]


def _piece(pieces, index):
    return lax.dynamic_slice_in_dim(pieces, index, 1, axis=0)


def _cut(value, count):
    """Whether rows or columns are cut into `count` pieces, at multiples of a TPU's tiles if that can be: "rows" are not
    even moved then. "" where neither divides."""
    columns = value.shape[-1] if value.ndim else 1
    rows = value.size // columns
    for tile in ((SUBLANES, LANES), (1, 1)):
        for name, length, unit in zip(("rows", "columns"), (rows, columns), tile):
            if length and length % (count * unit) == 0:
                return name
    return ""


def _pieces(value, count):
    """[count, rows, columns]: `value` cut into pieces of one size, padded with zeros where it has to be."""
    columns = value.shape[-1] if value.ndim else 1
    cut = _cut(value, count)
    if cut == "rows":
        return value.reshape(count, -1, columns)
    if cut == "columns":
        return value.reshape(-1, count, columns // count).swapaxes(0, 1)
    return jnp.pad(value.reshape(-1), (0, -value.size % count)).reshape(count, 1, -1)


def _whole(pieces, like):
    """What `_pieces` has cut, in the shape of `like`."""
    if _cut(like, pieces.shape[0]) == "columns":
        pieces = pieces.swapaxes(0, 1)
    return pieces.reshape(-1)[: like.size].reshape(like.shape)


class AsyncReduction:
    """A partial on its way to becoming a sum, while the program is traced.

    `reduction` is a name in REDUCTIONS, or a function of the partial that gives one (choice.auto).
    """

    def __init__(self, value, reduction):
        self.partial = value
        name = reduction(value) if callable(reduction) else reduction  # see choice.py
        self._state, self._rounds, self._finish = REDUCTIONS[name](
            lax.stop_gradient(value)
        )
        self._rounds = list(self._rounds) if axis_size(TENSOR) > 1 else []
        self._untied = int(len(self._rounds) > 1)
        self._arriving, self._products = None, 0
        self._send()

    def _send(self):
        if self._rounds:
            self._arriving = self._rounds[0].send(self._state)

    def _merge(self):
        self._state = self._rounds.pop(0).merge(self._state, self._arriving)
        self._send()

    def behind(self, product):
        """Lets a round end once `product`, a matrix product's result, is there. Returns the product.

        Where there are fewer rounds than products, the last products end them. XLA ends the last of several rounds best
        where the sum is read; an only round it would start there, too.
        """
        self._products += 1
        if len(self._rounds) > max(PRODUCTS - self._products, self._untied):
            tied = (self._state, self._arriving, product)
            state, arriving, after = lax.optimization_barrier(
                tied
            )  # whose rule would differentiate the state
            self._state, self._arriving = lax.stop_gradient((state, arriving))
            if self._untied:  # what comes next need not wait for an only round
                product = after
            self._merge()
        return product

    def wait(self):
        """The sum."""
        while self._rounds:
            self._merge()
        return (
            _arrived(self.partial, self._finish(self._state))
            if axis_size(TENSOR) > 1
            else self.partial
        )

    @property
    def done(self):
        """Whether no round is left."""
        return not self._rounds


class BackwardReduction:
    """The sum of a stream's cotangent, laid out where the forward pass is traced.

    A block's input is a sum of `sources`. Its cotangents are partials, and their reduction may run behind the backward
    pass of the block before, which does not need them where the input is stale. The forward pass passes the same places
    in the opposite order: it ends the reduction where that block starts, passes the block's products, and starts it
    where the block ends. What stands for the reduction in the forward pass is zeros, of which nothing is computed; the
    cotangent of these zeros is the reduction's state.
    """

    def __init__(self, sources, reduction):
        self.like = jax.ShapeDtypeStruct(sources[0].shape, sources[0].dtype)
        self.name = reduction(sources[0]) if callable(reduction) else reduction
        self.in_order = getattr(reduction, "in_order", False)  # see chips.Chip
        self.stages = jax.eval_shape(self._all, self.like)
        self.stage = self.tied = min(
            len(self.stages) - 1, PRODUCTS
        )  # rounds that are to end behind a product
        self.products = 0

        def back(stage):
            for k in range(self.tied, len(self.stages) - 1):
                stage = self._next(k, stage)
            total = self._built()[2](stage[0])
            return ((total,) * len(sources),)

        self.token = _backward(back)(
            lambda sources: _zeros(self.stages[self.tied]), sources
        )

    def behind(self, operands):
        """Lets a round end once the cotangents of `operands`, a product's, are there. Returns the operands."""
        self.products += 1
        k = (
            self.tied - self.products
        )  # where there are fewer rounds, the last ones of the backward pass end them
        if k < 0:
            return operands

        def back(cotangents):
            stage, products = lax.optimization_barrier(cotangents)
            # what comes next need not wait for the last round, unless XLA would then put it first
            return self._next(k, stage), products if self.in_order or k + 2 < len(
                self.stages
            ) else cotangents[1]

        self.token, operands = _backward(back)(
            lambda token, operands: (_zeros(self.stages[k]), operands),
            self.token,
            operands,
        )
        self.stage = k
        return operands

    def start(self):
        """What the next block's input is to be met with (see `with_gradient_of`)."""

        def back(cotangent):
            stage = self._first(cotangent)
            for k in range(self.stage):  # behind which no product was
                stage = self._next(k, stage)
            return (stage,)

        return _backward(back)(lambda token: _zeros(self.like), self.token)

    def _built(self):
        return REDUCTIONS[self.name](_zeros(self.like))

    def _first(self, value):
        state, rounds, _ = REDUCTIONS[self.name](value)
        return state, rounds[0].send(state)

    def _next(self, k, stage):
        rounds = self._built()[1]
        state = rounds[k].merge(*stage)
        return state, rounds[k + 1].send(state) if k + 1 < len(rounds) else None

    def _all(self, value):
        stages = [self._first(value)]
        for k in range(len(self._built()[1])):
            stages.append(self._next(k, stages[-1]))
        return stages


def with_gradient_of(value, ahead):
    """`value`, shared by all tensor shards, whose cotangents, partials, go where `ahead` comes from (BackwardReduction)."""
    return _backward(lambda cotangent: (None, cotangent))(
        lambda value, ahead: value, value, ahead
    )


def _backward(back):
    """Makes a call of a function with the derivative rule `back`: cotangents of its result -> of its arguments."""

    def call(function, *arguments):
        made = jax.custom_vjp(function)
        made.defvjp(
            lambda *arguments: (function(*arguments), None),
            lambda _, cotangents: back(cotangents),
        )
        return made(*arguments)

    return call


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@jax.custom_vjp
def _arrived(value, total):
    return total


_arrived.defvjp(
    lambda value, total: (total, None),
    lambda _, cotangent: (cotangent, jnp.zeros_like(cotangent)),
)


def reduce(value, reduction="psum"):
    """The sum of a partial over the tensor axis, at once. Any shape; the cotangent passes through."""
    return AsyncReduction(value, reduction).wait()


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def copy_to_tensor_axis(value, reduction="psum"):
    """`value`, shared by all tensor shards, made ready for column-parallel work, whose cotangents are partials."""
    return value


def _replicate_backward(reduction, _, cotangent):
    return (reduce(cotangent, reduction),)


copy_to_tensor_axis.defvjp(lambda value, reduction: (value, None), _replicate_backward)
