"""Ways to sum a partial over the tensor axis, as rounds of messages.

A reduction is a `Program`: a start, a list of rounds and a finish. In a round each
shard sends part of its state to other shards and merges the message that it receives.
Compute can run between the two: overlap.py decides when a round ends. All shards end
with bit-identical sums.

Derivatives do not pass through the rounds. The cotangent of the sum is the cotangent of
every shard's partial (see sharding.py), whichever reduction computed the sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax.sharding import TENSOR, axis_size, gray

# A round can end after each of the three matrix-product steps of a block (model.py):
# QKV, attention, output; or gate, activation, down.
PRODUCTS = 3
# A TPU stores arrays in tiles of 8 x 128 values. Where pieces consist of whole tiles,
# XLA cuts an array without a copy.
SUBLANES, LANES = 8, 128

# An array, or a description of one: a reduction reads its shape and dtype alone.
Like = jax.Array | jax.ShapeDtypeStruct


class Round(NamedTuple):
    """One exchange of messages: the next state is `merge(state, send(state))`."""

    send: Callable[[Any], Any]
    merge: Callable[[Any, Any], Any]


class Pending(NamedTuple):
    """The state of a reduction in progress on one shard."""

    state: Any
    message: Any  # the message to this shard in the current round; None: no round left


class Program(NamedTuple):
    """A reduction of values of one shape and dtype."""

    start: Callable[[jax.Array], Any]  # a partial -> the state before the first round
    rounds: list[Round]
    finish: Callable[[Any], jax.Array]  # the state after the last round -> the sum

    def begin(self, value: jax.Array) -> Pending:
        """Sends the first round's messages."""
        return self._send(0, self.start(value))

    def end_round(self, number: int, pending: Pending) -> Pending:
        """Merges the messages of round `number` and sends those of the next round."""
        state = self.rounds[number].merge(pending.state, pending.message)
        return self._send(number + 1, state)

    def _send(self, number: int, state: Any) -> Pending:
        if number == len(self.rounds):
            return Pending(state, None)
        return Pending(state, self.rounds[number].send(state))


class Policy(NamedTuple):
    """A reduction for each message (see choose.auto_reduction)."""

    name_for: Callable[[Like], str]  # a message -> a name in REDUCTIONS
    # Whether XLA must keep the blocks of the backward pass in order. If it swapped
    # them, a reduction would have no compute beside it (chips.Chip.in_order).
    in_order: bool = False
    # Messages of at most so many rows end their last round after a product, too
    # (chips.Chip.tied_rows).
    tied_rows: int = 0

    def ties_last(self, value: Like) -> bool:
        """Whether the last of several rounds of a message ends after a product."""
        rows = value.size // value.shape[-1] if value.ndim else 1
        return rows <= self.tied_rows


def name_for(reduction: str | Policy, value: Like) -> str:
    """The name in REDUCTIONS of the reduction for a message like `value`."""
    return reduction if isinstance(reduction, str) else reduction.name_for(value)


def program_for(reduction: str | Policy, like: Like) -> Program:
    """The `Program` for messages of `like`'s shape and dtype; one shard: no rounds."""
    if axis_size(TENSOR) == 1:
        return Program(_identity, [], _identity)
    return REDUCTIONS[name_for(reduction, like)](like)


def reduce(value: jax.Array, reduction: str | Policy) -> jax.Array:
    """The sum of a partial over the tensor axis, computed at once.

    Args:
      value: this shard's partial, of any shape.
      reduction: a name in REDUCTIONS, or a Policy.

    Returns:
      The sum, the same bits on every shard. Its cotangent passes through unchanged.
    """
    program = program_for(reduction, value)
    pending = program.begin(lax.stop_gradient(value))
    for number in range(len(program.rounds)):
        pending = program.end_round(number, pending)
    return with_gradient_of(program.finish(pending.state), value)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def copy_to_tensor_axis(value: jax.Array, reduction: str | Policy) -> jax.Array:
    """Identity, for a value that column-parallel products read on every tensor shard.

    Each shard's cotangent is a partial; the backward pass sums them with `reduction`
    (Megatron's f, arXiv 1909.08053, section 3).
    """
    return value


def _copy_forward(value: jax.Array, reduction: str | Policy) -> tuple[jax.Array, None]:
    return value, None


def _copy_backward(
    reduction: str | Policy, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    return (reduce(cotangent, reduction),)


copy_to_tensor_axis.defvjp(_copy_forward, _copy_backward)


@jax.custom_vjp
def with_gradient_of(value: jax.Array, source: jax.Array) -> jax.Array:
    """Returns `value`, and in the backward pass gives its cotangent to `source`.

    `value` itself gets no cotangent. Both have the same shape.
    """
    return value


def _gradient_forward(value: jax.Array, source: jax.Array) -> tuple[jax.Array, None]:
    return value, None


def _gradient_backward(_: None, cotangent: jax.Array) -> tuple[None, jax.Array]:
    return None, cotangent


with_gradient_of.defvjp(_gradient_forward, _gradient_backward)


# ---------------------------------------------------------------- the algorithms


def psum(like: Like) -> Program:
    """XLA's own all-reduce, in one round; XLA chooses its algorithm."""
    all_reduce = Round(lambda x: lax.psum(x, TENSOR), _take_message)
    return Program(_identity, [all_reduce], _identity)


def one_shot(like: Like) -> Program:
    """Every shard gathers all partials and sums them in float32, in one round.

    It has the lowest latency, rounds the sum once, and sends n - 1 times the bytes.
    """
    dtype = like.dtype

    def total(_: jax.Array, parts: jax.Array) -> jax.Array:
        return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(dtype)

    gather_and_sum = Round(lambda x: lax.all_gather(x, TENSOR), total)
    return Program(_identity, [gather_and_sum], _identity)


def recursive_doubling(like: Like) -> Program:
    """log2 n exchanges of the whole message (Thakur et al. 2005, section 4).

    Two shards that exchange differ in one bit of their Gray codes (sharding.gray); in
    the paper, in one bit of their indices. The highest bit comes first: its shards are
    farthest apart, and the first products of a block take longest.

    If n is no power of two, only the first `core` shards exchange, the largest power of
    two. Each other shard sends them its partial in a round before, and receives the sum
    in a round after.
    """
    n = axis_size(TENSOR)
    core = 1 << (n.bit_length() - 1)

    def add(x: jax.Array, message: jax.Array) -> jax.Array:
        return x + message  # a shard without a sender receives zeros

    def replace(x: jax.Array, message: jax.Array) -> jax.Array:
        return jnp.where(lax.axis_index(TENSOR) < core, x, message)

    highest_first = reversed(_bits(core))
    rounds = [Round(_permute(exchange(core, bit)), add) for bit in highest_first]
    if n > core:
        into_core = [(i, i - core) for i in range(core, n)]
        out_of_core = [(target, source) for source, target in into_core]
        first = Round(_permute(into_core), add)
        last = Round(_permute(out_of_core), replace)
        rounds = [first, *rounds, last]
    return Program(_identity, rounds, _identity)


def halving_doubling(like: Like) -> Program:
    """Reduce-scatter by recursive halving, then all-gather (Rabenseifner 2004).

    It sends 2 (n - 1) / n of the bytes in 2 log2 n rounds. If n is no power of two,
    it is `ring`. With n = 8, shard 0 sums and sends these of the 8 pieces; the largest
    part goes to the nearest shard:

        step 0   sums 0 1 2 3   sends 4 5 6 7
        step 1   sums 0 1       sends 2 3
        step 2   sums 0         sends 1
    """
    n = axis_size(TENSOR)
    if n & (n - 1):
        return ring(like)
    bits = _bits(n)

    def upper(k: int) -> jax.Array:
        """Whether the shard keeps the upper half in step k: bit k of its Gray code."""
        return gray(lax.axis_index(TENSOR)) & bits[k] != 0

    def split(k: int) -> tuple[int, Any, Any]:
        """Step k: the pieces in a half, and where the own and the other half start."""
        half = n >> (k + 1)
        start = sum((upper(j) * (n >> (j + 1)) for j in range(k)), 0)
        return half, start + upper(k) * half, start + half - upper(k) * half

    def halve(k: int) -> Round:
        """Sends the other half to the partner, and adds the message to the own half."""

        def send(x: jax.Array) -> jax.Array:
            half, _, other = split(k)
            return permute(lax.dynamic_slice_in_dim(x, other, half, axis=0))

        def merge(x: jax.Array, message: jax.Array) -> jax.Array:
            half, own, _ = split(k)
            total = lax.dynamic_slice_in_dim(x, own, half, axis=0) + message
            return lax.dynamic_update_slice_in_dim(x, total, own, axis=0)

        permute = _permute(exchange(n, bits[k]))
        return Round(send, merge)

    def double(k: int) -> Round:
        """Sends the own half to the partner, and stores the other half."""

        def send(x: jax.Array) -> jax.Array:
            half, own, _ = split(k)
            return permute(lax.dynamic_slice_in_dim(x, own, half, axis=0))

        def merge(x: jax.Array, message: jax.Array) -> jax.Array:
            _, _, other = split(k)
            return lax.dynamic_update_slice_in_dim(x, message, other, axis=0)

        permute = _permute(exchange(n, bits[k]))
        return Round(send, merge)

    steps = range(len(bits))
    rounds = [halve(k) for k in steps] + [double(k) for k in reversed(steps)]
    return Program(partial(_pieces, count=n), rounds, _whole(like))


def direct(like: Like) -> Program:
    """Reduce-scatter and all-gather, each in one round of n - 1 messages.

    It sends 2 (n - 1) / n of the bytes, the fewest possible, in the fewest rounds. Its
    messages share links. Each shard sums its piece in float32 and rounds once.
    """
    n, dtype = axis_size(TENSOR), like.dtype
    distances = range(1, n)
    # shift[s](x) sends x to the shard at distance s.
    shift = [_permute([(i, (i + s) % n) for i in range(n)]) for s in range(n)]

    def scatter(pieces: jax.Array) -> list[jax.Array]:
        index = lax.axis_index(TENSOR)
        return [shift[s](_piece(pieces, (index + s) % n)) for s in distances]

    def total(pieces: jax.Array, messages: list[jax.Array]) -> jax.Array:
        sum32 = _piece(pieces, lax.axis_index(TENSOR)).astype(jnp.float32)
        for message in messages:
            sum32 += message.astype(jnp.float32)
        return sum32.astype(dtype)

    def gather(piece: jax.Array) -> list[jax.Array]:
        return [shift[s](piece) for s in distances]

    def join(piece: jax.Array, messages: list[jax.Array]) -> jax.Array:
        # Entry s came from shard index - s, which sums the piece of that number; so
        # piece p is entry index - p.
        entry = (lax.axis_index(TENSOR) - jnp.arange(n)) % n
        return jnp.concatenate([piece, *messages])[entry]

    rounds = [Round(scatter, total), Round(gather, join)]
    return Program(partial(_pieces, count=n), rounds, _whole(like))


def ring(like: Like) -> Program:
    """Reduce-scatter and all-gather around a ring, half of the message each way.

    It takes 2 (n - 1) rounds, each of 1 / n of the bytes.
    """
    n = axis_size(TENSOR)
    to_next = _permute([(i, (i + 1) % n) for i in range(n)])
    to_previous = _permute([(i, (i - 1) % n) for i in range(n)])
    directions = [(+1, to_next), (-1, to_previous)]
    Halves = tuple[jax.Array, ...]  # of the message, n pieces each: one a direction

    def pass_on(step: int, add: bool) -> Round:
        """Sends a piece to each neighbour, which adds it to its own or stores it."""

        def send(halves: Halves) -> Halves:
            index = lax.axis_index(TENSOR)
            return tuple(
                permute(_piece(x, (index - direction * step) % n))
                for x, (direction, permute) in zip(halves, directions)
            )

        def merge(halves: Halves, messages: Halves) -> Halves:
            merged = []
            for x, message, (direction, _) in zip(halves, messages, directions):
                place = (lax.axis_index(TENSOR) - direction * (step + 1)) % n
                new = _piece(x, place) + message if add else message
                merged.append(lax.dynamic_update_slice_in_dim(x, new, place, axis=0))
            return tuple(merged)

        return Round(send, merge)

    def start(value: jax.Array) -> Halves:
        pieces = _pieces(value, 2 * n)
        return pieces[:n], pieces[n:]

    whole = _whole(like)

    def finish(halves: Halves) -> jax.Array:
        return whole(jnp.concatenate(halves))

    # After n - 1 sums, shard i has the sum of piece i + 1 (i - 1 the other way).
    sums = [pass_on(step, add=True) for step in range(n - 1)]
    copies = [pass_on(step - 1, add=False) for step in range(n - 1)]
    return Program(start, sums + copies, finish)


REDUCTIONS: dict[str, Callable[[Like], Program]] = {
    "psum": psum,
    "one-shot": one_shot,
    "recursive-doubling": recursive_doubling,
    "halving-doubling": halving_doubling,
    "direct": direct,
    "ring": ring,
}


def exchange(n: int, bit: int) -> list[tuple[int, int]]:
    """(source, target) for all of n shards whose Gray codes differ in `bit` alone.

    The indices of such shards differ in this bit and in all lower bits.
    """
    flipped_bits = 2 * bit - 1
    return [(i ^ flipped_bits, i) for i in range(n)]


def _identity(value: Any) -> Any:
    return value


def _take_message(_: Any, message: Any) -> Any:
    return message


def _permute(pairs: list[tuple[int, int]]) -> Callable[[jax.Array], jax.Array]:
    """A function that sends an array from source to target for each of `pairs`."""
    return lambda x: lax.ppermute(x, TENSOR, pairs)


def _bits(n: int) -> list[int]:
    """The bits of the indices below n, a power of two: 8 -> [1, 2, 4]."""
    return [1 << k for k in range(n.bit_length() - 1)]


def _piece(pieces: jax.Array, index: Any) -> jax.Array:
    return lax.dynamic_slice_in_dim(pieces, index, 1, axis=0)


def _columns(like: Like) -> int:
    """The size of the last dimension; 1 for a scalar."""
    return like.shape[-1] if like.ndim else 1


def _cut(like: Like, count: int) -> str:
    """The dimension to cut into `count` pieces: "rows", "columns", or "" for neither.

    It prefers pieces of whole TPU tiles, then any equal pieces. It returns "" where
    `count` divides neither dimension.
    """
    columns = _columns(like)
    rows = like.size // columns
    for sublanes, lanes in ((SUBLANES, LANES), (1, 1)):
        if rows and rows % (count * sublanes) == 0:
            return "rows"
        if columns and columns % (count * lanes) == 0:
            return "columns"
    return ""


def _pieces(value: jax.Array, count: int) -> jax.Array:
    """`value` in equal pieces [count, rows, columns], padded where `_cut` is ""."""
    columns = _columns(value)
    cut = _cut(value, count)
    if cut == "rows":
        return value.reshape(count, -1, columns)
    if cut == "columns":
        return value.reshape(-1, count, columns // count).swapaxes(0, 1)
    padded = jnp.pad(value.reshape(-1), (0, -value.size % count))
    return padded.reshape(count, 1, -1)


def _whole(like: Like) -> Callable[[jax.Array], jax.Array]:
    """The inverse of `_pieces` for values like `like`."""
    like = jax.ShapeDtypeStruct(like.shape, like.dtype)

    def whole(pieces: jax.Array) -> jax.Array:
        if _cut(like, pieces.shape[0]) == "columns":
            pieces = pieces.swapaxes(0, 1)
        return pieces.reshape(-1)[: like.size].reshape(like.shape)

    return whole
