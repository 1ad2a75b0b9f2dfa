"""Changes the compiled shape of a decode state: W slots of S tokens.

The engine keeps the shape close to its load. A change of the number of slots moves the
active requests, see `source_slots`. A change of the length cuts every row at its end,
or pads it there. With pages the length does not change, and no keys and values move: a
request takes the table of its pages along.

B rows. In the shape of a cache: K key-value heads, S cache length, H head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ladder_jax.decode_state import NO_REQUEST, DecodeState, Slots, SlotState
from ladder_jax.pages import NO_PAGE


def source_slots(active_W: jax.Array, width: int) -> jax.Array:
    """Returns [width]: the old slot from which each new slot is copied.

    It is the memory shuffle of Flover (arXiv 2305.13484). With fewer slots than before:

    1. Of all windows of `width` neighbouring slots, the window with the most active
       slots becomes the new slots, so that the fewest requests move. Of several such
       windows, it is the leftmost.
    2. The active slots outside the window move into its free slots, both in ascending
       order.

      old slots     0 1 2 3 4 5 6 7     (W = 8), width 4
      active slots  . A . B C . . D
      window         [A . B C]
      new slots       A D B C
      returned        1 7 3 4

    With more slots than before, all stay. The source of an additional slot is W, which
    is no slot.
    """
    W = active_W.size
    if width >= W:
        return jnp.minimum(jnp.arange(width), W)
    active_before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(active_W)])
    active_inside = active_before[width:] - active_before[: W - width + 1]
    window = jnp.argmax(active_inside) + jnp.arange(width)
    outside_W = active_W.at[window].set(False)
    # The active slots outside the window come first, in ascending order.
    movers_W = jnp.argsort(~outside_W, stable=True)
    is_free = ~active_W[window]
    nth_free = jnp.cumsum(is_free) - 1
    is_filled = is_free & (nth_free < outside_W.sum())
    return jnp.where(is_filled, movers_W[nth_free.clip(0)], window)


def reshape(state: DecodeState, width: int, length: int) -> DecodeState:
    """Returns the state with `width` slots of `length` tokens.

    It deletes arrays of `state`, which must not be used afterwards. The caller makes
    sure that all active requests fit. Keys and values are copied array by array, and
    each old array is deleted at once, so that only one array exists twice.
    """
    slots = state.slots.state
    source = None
    if width != slots.active.size:
        source, slots = _reshape_slots(slots, width)

    def reshape_kv(kv: Any, source: jax.Array | None) -> Any:
        arrays, tree = jax.tree.flatten(kv)
        for i, array in enumerate(arrays):
            if source is not None or length != array.shape[-2]:
                copy_rows = _make_copy_rows(array.sharding, length)
                arrays[i] = copy_rows(array, source)
                array.delete()
        return jax.tree.unflatten(tree, arrays)

    return DecodeState(
        Slots(_resize(slots, length), reshape_kv(state.slots.kv, source)),
        Slots(_resize(state.staging.state, length), reshape_kv(state.staging.kv, None)),
        state.pool,
    )


def _resize(rows: SlotState, length: int) -> SlotState:
    """Returns the rows with room for the ids of `length` tokens, if they keep them."""
    drafting = rows.drafting
    if drafting is None or drafting.tokens.shape[1] == length:
        return rows
    tokens = _make_resize(drafting.tokens.sharding, length)(drafting.tokens)
    return rows._replace(drafting=drafting._replace(tokens=tokens))


@functools.partial(jax.jit, static_argnames="width")
def _reshape_slots(slots: SlotState, width: int) -> tuple[jax.Array, SlotState]:
    """Returns (source_slots [width], the state of `width` slots)."""
    source = source_slots(slots.active, width)
    exists = source < slots.active.size

    def copy(x: jax.Array) -> jax.Array:
        return jnp.take(x, source, axis=0, mode="clip")

    new_slots = jax.tree.map(copy, slots)
    return source, new_slots._replace(
        active=jnp.where(exists, new_slots.active, False),
        request=jnp.where(exists, new_slots.request, NO_REQUEST),
        table=jnp.where(exists[:, None], new_slots.table, NO_PAGE),
    )


@functools.lru_cache(maxsize=256)
def _make_copy_rows(sharding: NamedSharding, length: int) -> Callable[..., jax.Array]:
    """Returns a jitted function that copies rows of keys or values, S = `length`.

    (keys or values [..., B, K, S, H], row numbers or None for all rows) -> copy

    Rows are cut at their end, or padded with zeros there.
    """

    def copy_rows(kv: jax.Array, rows: jax.Array | None) -> jax.Array:
        if rows is not None:
            kv = jnp.take(kv, rows, axis=kv.ndim - 4, mode="clip")
        missing = length - kv.shape[-2]
        if missing <= 0:
            return kv[..., :length, :]
        no_padding = [(0, 0)]
        padding = no_padding * (kv.ndim - 2) + [(0, missing)] + no_padding
        return jnp.pad(kv, padding)

    return jax.jit(copy_rows, out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _make_resize(sharding: NamedSharding, length: int) -> Callable[..., jax.Array]:
    """Returns a jitted function that cuts rows of ids at their end, or pads them."""

    def resize(tokens_BS: jax.Array) -> jax.Array:
        missing = length - tokens_BS.shape[1]
        return jnp.pad(tokens_BS[:, :length], [(0, 0), (0, max(missing, 0))])

    return jax.jit(resize, out_shardings=sharding)
