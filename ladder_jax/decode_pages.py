"""Gives pages to slots and to prompts, and takes them back, in the decode programs.

The host does not know which pages a request has: the device decides. A prompt gets its
pages with its first piece, and a slot gets the next page when its tokens have filled
the last one. If none is free then, the youngest request loses its slot and its pages
(it is **preempted**); the host queues it again with the tokens that it has generated.

W slots, B rows, M entries of a table, P pages, S tokens of a page, E pages of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ladder_jax import pages
from ladder_jax.decode_state import NO_REQUEST, DecodeState, Prompts, Slots, SlotState

OLDEST = -(2**31)  # an admission order below that of every request


class Growth(NamedTuple):
    """What happened to the slots when they asked for pages, bool [W]."""

    runs: jax.Array  # the slot has room for its next token
    preempted: jax.Array  # it has lost its request


def grow(state: DecodeState) -> tuple[DecodeState, Growth]:
    """Gives a page to every active slot whose next token needs one.

    If too few are free, the youngest active request is preempted, and the slots without
    a page wait for the next iteration. So the oldest request always gets on.
    """
    pool, slots = state.pool, state.slots.state
    assert pool is not None
    S = page_size(pool)
    table_WM = slots.table
    entry_W1 = (slots.position // S)[:, None]
    page_W = jnp.take_along_axis(table_WM, entry_W1, axis=1, mode="clip")[:, 0]
    needs_W = slots.active & (page_W == pages.NO_PAGE)
    new_W, lacks_W, users_P = pages.allocate(pool.users, needs_W)
    is_entry_WM = jnp.arange(table_WM.shape[1]) == entry_W1
    has_new_WM = is_entry_WM & (new_W != pages.NO_PAGE)[:, None]
    table_WM = jnp.where(has_new_WM, new_W[:, None], table_WM)

    youngest = jnp.argmax(jnp.where(slots.active, slots.admission_order, OLDEST))
    is_youngest_W = jnp.arange(slots.active.size) == youngest
    preempted_W = is_youngest_W & lacks_W.any()
    growth = Growth(slots.active & ~lacks_W & ~preempted_W, preempted_W)
    slots = slots._replace(table=table_WM)
    state = _with_slots(state, slots, pool._replace(users=users_P))
    return release_slots(state, preempted_W), growth


def grow_for_drafts(
    state: DecodeState, drafted_W: jax.Array, most: int
) -> tuple[DecodeState, jax.Array]:
    """Gives pages to the drafted tokens of slots, if there are enough.

    It leaves a free page for every active slot, so that no request loses its slot for
    another one's draft. Returns (state, how many drafted tokens a slot has room for).

    drafted_W: int32, the drafted tokens of the slots, at the most `most`.
    """
    pool, slots = state.pool, state.slots.state
    assert pool is not None
    S = page_size(pool)
    table_WM, position_W1 = slots.table, slots.position[:, None]
    entry_WE = position_W1 // S + 1 + jnp.arange(-(-most // S))
    page_WE = jnp.take_along_axis(table_WM, entry_WE, axis=1, mode="clip")
    needs_WE = entry_WE <= (position_W1 + drafted_W[:, None]) // S
    needs_WE &= page_WE == pages.NO_PAGE
    spare = (pool.users == 0).sum() - slots.active.sum()
    needs_WE &= needs_WE.sum() <= spare
    new_WE, _, users_P = pages.allocate(pool.users, needs_WE)
    entry_WE = jnp.where(needs_WE, entry_WE, table_WM.shape[1])
    rows_W1 = jnp.arange(len(table_WM))[:, None]
    table_WM = table_WM.at[rows_W1, entry_WE].set(new_WE, mode="drop")
    room_W = (table_WM != pages.NO_PAGE).sum(axis=1) * S - 1 - slots.position
    slots = slots._replace(table=table_WM)
    state = _with_slots(state, slots, pool._replace(users=users_P))
    return state, jnp.minimum(drafted_W, room_W).clip(0)


def release_slots(state: DecodeState, released_W: jax.Array) -> DecodeState:
    """Empties these slots and frees their pages."""
    assert state.pool is not None
    slots, users_P = _release(state.slots.state, state.pool.users, released_W)
    slots = slots._replace(active=slots.active & ~released_W)
    return _with_slots(state, slots, state.pool._replace(users=users_P))


def release_staging(staging: Slots, released_R: jax.Array | bool = False) -> Slots:
    """Frees the pages of these rows of staging, and of the rows without a request.

    staging: with the pool. Its rows without a request have pages if the first token of
      their last request has ended it.
    """
    pool = staging.kv
    has_none_R = staging.state.request == NO_REQUEST
    rows, users_P = _release(staging.state, pool.users, has_none_R | released_R)
    return Slots(rows, pool._replace(users=users_P))


def _release(
    rows: SlotState, users_P: jax.Array, released_B: jax.Array
) -> tuple[SlotState, jax.Array]:
    users_P, table_BM = pages.release(users_P, rows.table, released_B)
    request_B = jnp.where(released_B, NO_REQUEST, rows.request)
    return rows._replace(table=table_BM, request=request_B), users_P


def _with_slots(state: DecodeState, slots: SlotState, pool: pages.Pool) -> DecodeState:
    return state._replace(slots=Slots(slots, None), pool=pool)


def page_size(pool: pages.Pool) -> int:
    """Returns S."""
    kv = pool.kv[0] if isinstance(pool.kv, list) else pool.kv
    return pages.page_size(kv)


# ---------------------------------------------------------------- prefill


def prompt_tables(
    pool: pages.Pool, staging: SlotState, prompts: Prompts
) -> tuple[jax.Array, jax.Array, pages.Pool]:
    """Gives pages to prompts for all their tokens.

    Returns (their tables [B, M], bool [B]: whether a prompt lacks a page, pool). The
    host starts no prompt for which there may be too few pages.
    """
    R = staging.request.size
    is_prompt_B = prompts.staging_index < R
    table_BM = staging.table[prompts.staging_index.clip(0, R - 1)]
    table_BM = jnp.where(is_prompt_B[:, None], table_BM, pages.NO_PAGE)
    entry_M = jnp.arange(table_BM.shape[1])
    is_needed_BM = entry_M * page_size(pool) < prompts.size[:, None]
    is_needed_BM &= is_prompt_B[:, None] & (table_BM == pages.NO_PAGE)
    new_BM, lacks_BM, users_P = pages.allocate(pool.users, is_needed_BM)
    table_BM = jnp.where(is_needed_BM, new_BM, table_BM)
    return table_BM, lacks_BM.any(axis=1), pool._replace(users=users_P)


# ---------------------------------------------------------------- shared prefixes


def hold_block(
    staging: Slots, index: jax.Array, start: jax.Array, size: int
) -> tuple[Slots, jax.Array]:
    """Adds a user to the pages with `size` tokens from `start` on of a staging row.

    Returns (staging, the pages [E]). `staging` has the pool.
    """
    pool, S = staging.kv, page_size(staging.kv)
    entries_E = start // S + jnp.arange(size // S)
    pages_E = staging.state.table[index, entries_E]
    users_P = pool.users.at[pages_E].add(1, mode="drop")
    return staging._replace(kv=pool._replace(users=users_P)), pages_E


def share_block(
    staging: Slots,
    index: jax.Array,
    start: jax.Array,
    pages_E: jax.Array,
    request: jax.Array,
) -> Slots:
    """Gives the pages of a block to a staging row, which this request has now."""
    staging = release_staging(staging)
    rows, pool = staging
    entries_E = start // page_size(pool) + jnp.arange(pages_E.size)
    rows = rows._replace(
        table=rows.table.at[index, entries_E].set(pages_E, mode="drop"),
        request=rows.request.at[index].set(request),
    )
    users_P = pool.users.at[pages_E].add(1, mode="drop")
    return Slots(rows, pool._replace(users=users_P))


def drop_block(staging: Slots, pages_E: jax.Array) -> Slots:
    """Removes a user from the pages of a block: the prefix cache forgets it."""
    pool = staging.kv
    users_P = pool.users.at[pages_E].add(-1, mode="drop")
    return staging._replace(kv=pool._replace(users=users_P))
