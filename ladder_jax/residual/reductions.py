"""Ways to sum a partial over the tensor axis, as rounds of messages.

A reduction is a `Program`: a start, a list of rounds and a finish. A round sends a part
of the state to other shards and merges the message that arrives. Compute can run while
a message travels: overlap.py decides where in the program a round ends. All shards end
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
# A TPU's registers hold 8 x 128 values. Pieces cut at multiples of them are not moved.
SUBLANES, LANES = 8, 128

Like = jax.Array | jax.ShapeDtypeStruct  # only shape and dtype are read


class Round(NamedTuple):
    """One exchange of messages: the next state is `merge(state, send(state))`."""

    send: Callable[[Any], Any]
    merge: Callable[[Any, Any], Any]


class Pending(NamedTuple):
    """A reduction between two rounds."""

    state: Any
    message: Any  # on its way to this shard; None after the last round


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
        last = number == len(self.rounds)
        return Pending(state, None if last else self.rounds[number].send(state))


class Policy(NamedTuple):
    """Chooses a reduction for each message (choose.auto_reduction makes one)."""

    name_for: Callable[[Like], str]  # a message -> a name in REDUCTIONS
    # The backward pass computes a block only after the block before it, so that XLA
    # cannot swap them and leave a reduction without compute (chips.Chip.in_order).
    in_order: bool = False


def name_for(reduction: str | Policy, value: Like) -> str:
    """The name in REDUCTIONS that `reduction`, a name or a Policy, gives a message."""
    return reduction if isinstance(reduction, str) else reduction.name_for(value)


def program_for(reduction: str | Policy, like: Like) -> Program:
    """The `Program` that sums messages like `like`; a single shard needs no rounds."""
    if axis_size(TENSOR) == 1:
        return Program(_same, [], _same)
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
    """`value`; its cotangent goes to `source`, of the same shape, instead."""
    return value


def _gradient_forward(value: jax.Array, source: jax.Array) -> tuple[jax.Array, None]:
    return value, None


def _gradient_backward(_: None, cotangent: jax.Array) -> tuple[None, jax.Array]:
    return None, cotangent


with_gradient_of.defvjp(_gradient_forward, _gradient_backward)


# ---------------------------------------------------------------- the algorithms


def psum(like: Like) -> Program:
    """XLA's own all-reduce, in one round; XLA chooses its algorithm."""
    return Program(_same, [Round(lambda x: lax.psum(x, TENSOR), _message)], _same)


def one_shot(like: Like) -> Program:
    """Every shard gathers all partials and sums them in float32.

    It has the lowest latency, sends n - 1 times the bytes, and rounds once.
    """
    dtype = like.dtype

    def total(_: jax.Array, parts: jax.Array) -> jax.Array:
        return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(dtype)

    return Program(_same, [Round(lambda x: lax.all_gather(x, TENSOR), total)], _same)


def recursive_doubling(like: Like) -> Program:
    """log2 n exchanges of the whole message (Thakur et al. 2005, section 4).

    Partners differ in one bit of their Gray codes (sharding.gray); in the paper, in one
    bit of their indices. The highest bit goes first: its partners are the farthest
    apart, and the first products of a block give it the most time. If n is no power of
    two, the shards beyond the largest one first send their partials to other shards,
    and receive the sum in a last round.
    """
    n = axis_size(TENSOR)
    core = 1 << (n.bit_length() - 1)

    def add(x: jax.Array, message: jax.Array) -> jax.Array:
        return x + message  # a shard without a sender receives zeros

    def replace(x: jax.Array, message: jax.Array) -> jax.Array:
        return jnp.where(lax.axis_index(TENSOR) < core, x, message)

    rounds = [Round(_permute(exchange(core, bit)), add) for bit in _bits(core)[::-1]]
    if n > core:
        fold = [(i, i - core) for i in range(core, n)]
        unfold = [(b, a) for a, b in fold]
        first, last = Round(_permute(fold), add), Round(_permute(unfold), replace)
        rounds = [first, *rounds, last]
    return Program(_same, rounds, _same)


def halving_doubling(like: Like) -> Program:
    """Reduce-scatter by recursive halving, then all-gather (Rabenseifner 2004).

    It sends 2 (n - 1) / n of the bytes in 2 log2 n rounds. Halves go to the nearest
    shard, eighths to the farthest. If n is no power of two, `ring` takes its place.
    """
    n = axis_size(TENSOR)
    if n & (n - 1):
        return ring(like)
    bits = _bits(n)

    def offset(k: int) -> jax.Array:
        """Where, in pieces, the half begins that bit k of a shard's Gray code names."""
        half = n >> (k + 1)
        return (gray(lax.axis_index(TENSOR)) & bits[k] != 0) * half

    def bounds(k: int) -> tuple[int, Any, Any]:
        """The pieces that a shard keeps and sends in step k: length, start, start."""
        half = n >> (k + 1)
        start = sum((offset(j) for j in range(k)), 0)
        return half, start + offset(k), start + half - offset(k)

    def halve(k: int) -> Round:
        def send(x: jax.Array) -> jax.Array:
            half, _, sent = bounds(k)
            return permute(lax.dynamic_slice_in_dim(x, sent, half, axis=0))

        def merge(x: jax.Array, message: jax.Array) -> jax.Array:
            half, kept, _ = bounds(k)
            total = lax.dynamic_slice_in_dim(x, kept, half, axis=0) + message
            return lax.dynamic_update_slice_in_dim(x, total, kept, axis=0)

        permute = _permute(exchange(n, bits[k]))
        return Round(send, merge)

    def double(k: int) -> Round:
        def send(x: jax.Array) -> jax.Array:
            half, kept, _ = bounds(k)
            return permute(lax.dynamic_slice_in_dim(x, kept, half, axis=0))

        def merge(x: jax.Array, message: jax.Array) -> jax.Array:
            _, _, sent = bounds(k)
            return lax.dynamic_update_slice_in_dim(x, message, sent, axis=0)

        permute = _permute(exchange(n, bits[k]))
        return Round(send, merge)

    steps = range(len(bits))
    rounds = [halve(k) for k in steps] + [double(k) for k in reversed(steps)]
    return Program(partial(_pieces, count=n), rounds, _whole(like))


def direct(like: Like) -> Program:
    """Reduce-scatter and all-gather, each in one round of n - 1 messages.

    It has the fewest rounds at the fewest bytes, 2 (n - 1) / n in all; its messages
    share links. It rounds once: each shard sums its piece in float32.
    """
    n, dtype = axis_size(TENSOR), like.dtype
    distances = range(1, n)
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
        # The message from the shard at distance s is piece (index - s).
        place = (lax.axis_index(TENSOR) - jnp.arange(n)) % n
        return jnp.concatenate([piece, *messages])[place]

    rounds = [Round(scatter, total), Round(gather, join)]
    return Program(partial(_pieces, count=n), rounds, _whole(like))


def ring(like: Like) -> Program:
    """Reduce-scatter and all-gather round a ring, half of the message each way.

    It takes 2 (n - 1) rounds, each of 1 / n of the bytes.
    """
    n = axis_size(TENSOR)
    clockwise = _permute([(i, (i + 1) % n) for i in range(n)])
    counter = _permute([(i, (i - 1) % n) for i in range(n)])
    ways = [(+1, clockwise), (-1, counter)]
    States = tuple[jax.Array, ...]

    def both(step: int, summing: bool) -> Round:
        """Passes one piece to each neighbour, to be added or to be stored."""

        def send(states: States) -> States:
            index = lax.axis_index(TENSOR)
            return tuple(
                permute(_piece(x, (index - way * step) % n))
                for x, (way, permute) in zip(states, ways)
            )

        def merge(states: States, messages: States) -> States:
            merged = []
            for x, message, (way, _) in zip(states, messages, ways):
                place = (lax.axis_index(TENSOR) - way * (step + 1)) % n
                new = _piece(x, place) + message if summing else message
                merged.append(lax.dynamic_update_slice_in_dim(x, new, place, axis=0))
            return tuple(merged)

        return Round(send, merge)

    def start(value: jax.Array) -> States:
        pieces = _pieces(value, 2 * n)
        return pieces[:n], pieces[n:]

    # After n - 1 sums, shard i has the sum of piece i + 1 (i - 1 the other way).
    sums = [both(step, True) for step in range(n - 1)]
    copies = [both(step - 1, False) for step in range(n - 1)]
    whole = _whole(like)
    return Program(start, sums + copies, lambda states: whole(jnp.concatenate(states)))


REDUCTIONS: dict[str, Callable[[Like], Program]] = {
    "psum": psum,
    "one-shot": one_shot,
    "recursive-doubling": recursive_doubling,
    "halving-doubling": halving_doubling,
    "direct": direct,
    "ring": ring,
}


def exchange(n: int, bit: int) -> list[tuple[int, int]]:
    """The pairs of shards, of n, whose Gray codes differ in `bit`.

    Their indices differ in this bit and in all lower ones.
    """
    return [(i ^ (2 * bit - 1), i) for i in range(n)]


def _same(value: Any) -> Any:
    return value


def _message(_: Any, message: Any) -> Any:
    return message


def _permute(pairs: list[tuple[int, int]]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.ppermute(x, TENSOR, pairs)


def _bits(n: int) -> list[int]:
    return [1 << k for k in range(n.bit_length() - 1)]


def _piece(pieces: jax.Array, index: Any) -> jax.Array:
    return lax.dynamic_slice_in_dim(pieces, index, 1, axis=0)


def _columns(like: Like) -> int:
    return like.shape[-1] if like.ndim else 1


def _cut(like: Like, count: int) -> str:
    """Whether "rows" or "columns" are cut into `count` pieces; "" if neither divides.

    Cuts at multiples of a TPU's tiles come first: such rows are not moved in memory.
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
    """`value` in equal pieces [count, rows, columns], padded with zeros if need be."""
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
