"""One iteration of the decode loop: admission, a forward pass, sampling, events.

decode.py says what an iteration does, and runs it in a loop.

W slots, R staging rows, B rows, T new tokens of a row, D drafted tokens, V vocabulary,
E entries of a list.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ladder_jax import (
    decode_pages,
    pages,
    sampling,
    sharding,
    speculation,
)
from ladder_jax.decode_state import (
    IDLE,
    LENGTH,
    NO_REQUEST,
    NOT_WAITING,
    PREEMPTED,
    STOP,
    TOKEN,
    DecodeSpec,
    DecodeState,
    Events,
    Slots,
    SlotState,
)
from ladder_jax.hardware import chips
from ladder_jax.model import Transformer, Unstacked, hidden, logits

# On TPU and CPU, XLA runs a branch, or a loop of unknown trip count, wholly on the
# device. On GPU it copies the predicate to the host in every iteration and waits for
# it. Programs with `fixed_trip_count` have neither: K iterations always run, and every
# iteration tries this many admissions. Writes that have nothing to do fall outside
# their arrays, and JAX drops them.
ADMISSIONS_PER_STEP = 2


# ---------------------------------------------------------------- one iteration


def any_waiting(state: DecodeState) -> jax.Array:
    """Returns a bool scalar: whether a request waits in staging."""
    return state.staging.state.admission_order.min() < NOT_WAITING


def admit(state: DecodeState) -> DecodeState:
    """Moves the waiting request with the lowest admission order into a free slot.

    It takes the first free slot. The state stays the same if no request waits or no
    slot is free.
    """
    slots, staging = state.slots.state, state.staging.state
    index = jnp.argmin(staging.admission_order)
    slot = jnp.argmin(slots.active)
    is_waiting = staging.admission_order[index] < NOT_WAITING
    can_move = is_waiting & ~slots.active[slot]
    # If no request can move, both indices are out of bounds, and JAX drops the writes.
    to_slot = jnp.where(can_move, slot, slots.active.size)
    from_index = jnp.where(can_move, index, staging.admission_order.size)

    def copy(old: jax.Array, source: jax.Array) -> jax.Array:
        return old.at[to_slot].set(source[index], mode="drop")

    def copy_kv(old: jax.Array, source: jax.Array) -> jax.Array:
        has_layers = old.ndim == 5  # [L, W, K, S, H], not one layer's [W, K, S, H]
        return jax.vmap(copy)(old, source) if has_layers else copy(old, source)

    slots = jax.tree.map(copy, slots, staging)
    slots = slots._replace(active=slots.active.at[to_slot].set(True, mode="drop"))
    order = staging.admission_order.at[from_index].set(NOT_WAITING, mode="drop")
    request = staging.request.at[from_index].set(NO_REQUEST, mode="drop")
    # The slot has its pages now.
    table = staging.table.at[from_index].set(pages.NO_PAGE, mode="drop")
    kv = jax.tree.map(copy_kv, state.slots.kv, state.staging.kv)
    staging = staging._replace(admission_order=order, request=request, table=table)
    return DecodeState(Slots(slots, kv), Slots(staging, state.staging.kv), state.pool)


def admit_all(spec: DecodeSpec, state: DecodeState) -> DecodeState:
    """Admits while a slot is free and a request waits.

    With `spec.fixed_trip_count` it tries ADMISSIONS_PER_STEP times instead.
    """
    if spec.fixed_trip_count:
        staging_size = state.staging.state.admission_order.size
        for _ in range(min(ADMISSIONS_PER_STEP, staging_size)):
            state = admit(state)
        return state

    def can_admit(state: DecodeState) -> jax.Array:
        return any_waiting(state) & ~state.slots.state.active.all()

    return lax.while_loop(can_admit, admit, state)


def no_events(spec: DecodeSpec, *shape: int) -> Events:
    """Returns Events of this shape, all of them IDLE."""
    zeros = jnp.zeros(shape, jnp.int32)
    top_shape = *shape, spec.max_logprobs
    return Events(
        request=zeros + NO_REQUEST,
        token=zeros,
        flag=zeros,
        logprob=jnp.zeros(shape),
        top_ids=jnp.zeros(top_shape, jnp.int32),
        top_logprobs=jnp.zeros(top_shape),
        drafted=zeros if spec.speculate else None,
    )


def next_tokens(
    spec: DecodeSpec,
    logits_BV: jax.Array,
    rows_B: SlotState,
    position_B: jax.Array,
    emits_B: jax.Array,
) -> tuple[Events, SlotState]:
    """Samples the next token of every row.

    Args:
      logits_BV: float32, of the whole vocabulary.
      rows_B: the requests' states.
      position_B: the index of the next token in its sequence.
      emits_B: bool; the other rows emit nothing, and their new state is not used.
    Returns (events [B], the new states).
    """
    run = sampling.run_always if spec.fixed_trip_count else sampling.run_if
    may_stop_B1 = (rows_B.required <= 0)[:, None]
    token_B = sampling.sample_tokens(
        logits_BV,
        rows_B.sampling,
        rows_B.history,
        position_B,
        spec.vocabulary,
        run,
        banned_BE=jnp.where(may_stop_B1, NO_REQUEST, rows_B.stops),
    )
    wants_logprobs_B = rows_B.logprobs & emits_B

    def log_probabilities(_: Any) -> Any:
        return sampling.log_probabilities(
            logits_BV, token_B, spec.max_logprobs, spec.vocabulary
        )

    idle = no_events(spec, token_B.size)
    logprob_B, top_ids_BE, top_logprobs_BE = run(
        wants_logprobs_B.any(),
        log_probabilities,
        (idle.logprob, idle.top_ids, idle.top_logprobs),
    )
    stops_B = (rows_B.stops == token_B[:, None]).any(axis=1)
    remaining_B = rows_B.remaining - 1
    flag_B = jnp.where(remaining_B <= 0, LENGTH, TOKEN)
    flag_B = jnp.where(stops_B, STOP, flag_B)
    flag_B = jnp.where(emits_B, flag_B, IDLE)
    events = Events(
        request=jnp.where(emits_B, rows_B.request, NO_REQUEST),
        token=token_B,
        flag=flag_B,
        logprob=jnp.where(wants_logprobs_B, logprob_B, 0),
        top_ids=top_ids_BE,
        top_logprobs=top_logprobs_BE,
        drafted=idle.drafted,
    )
    drafting = rows_B.drafting
    if drafting is not None:
        drafting = speculation.append(drafting, position_B, token_B, emits_B)
    return events, rows_B._replace(
        token=token_B,
        position=position_B,
        remaining=remaining_B,
        required=rows_B.required - 1,
        history=sampling.update_history(rows_B.history, token_B, emits_B),
        drafting=drafting,
    )


def where_emitted(emits_B: jax.Array, new: SlotState, old: SlotState) -> SlotState:
    """Returns the states from `next_tokens` in the rows that emit, else the old ones.

    `next_tokens` changes history and drafting in these rows alone.
    """
    fields = ("token", "position", "remaining", "required")
    values: dict[str, Any] = {
        f: jnp.where(emits_B, getattr(new, f), getattr(old, f)) for f in fields
    }
    return old._replace(history=new.history, drafting=new.drafting, **values)


def iterate(
    spec: DecodeSpec, weights: Transformer | Unstacked, state: DecodeState
) -> tuple[DecodeState, Events]:
    """Runs one iteration: admits requests, then advances every active slot.

    With pages, a slot may wait for one, or lose its request: decode_pages.grow.
    Returns (state, events [W]); with `spec.speculate`, events [1 + D, W].
    """
    state, asking, growth = admit_and_grow(spec, state)
    advance = speculate if spec.speculate else advance_by_one
    state, events = advance(spec, weights, state, growth.runs)
    return state, with_preempted(spec, events, asking, growth)


def admit_and_grow(
    spec: DecodeSpec, state: DecodeState
) -> tuple[DecodeState, SlotState, decode_pages.Growth]:
    """Admits requests; with pages, gives them to the slots that need one.

    Returns (state, the slots before they asked for pages, what happened to them).
    """
    state = admit_all(spec, state)
    asking = state.slots.state
    if state.pool is None:
        never = jnp.zeros_like(asking.active)
        return state, asking, decode_pages.Growth(asking.active, never)
    state, growth = decode_pages.grow(state)
    return state, asking, growth


def with_preempted(
    spec: DecodeSpec, events: Events, asking: SlotState, growth: decode_pages.Growth
) -> Events:
    """Returns the events of an iteration with those of the slots that were preempted.

    asking: the slots before they asked for pages.
    """
    if not spec.page_size:
        return events
    preempted = growth.preempted
    if spec.speculate:  # in the first row of events
        preempted &= jnp.arange(spec.most_tokens)[:, None] == 0
    return events._replace(
        request=jnp.where(preempted, asking.request, events.request),
        flag=jnp.where(preempted, PREEMPTED, events.flag),
    )


def pages_to_read(
    spec: DecodeSpec, state: DecodeState, last_W: jax.Array, runs_W: jax.Array
) -> pages.Reads | None:
    """Returns the pages with the tokens up to `last_W` of the slots that run, if any.

    None: every slot has a row of its own.
    """
    if state.pool is None:
        return None
    table_WM, page_count = state.slots.state.table, state.pool.users.size
    size, kernel = spec.page_size, spec.page_kernel
    return pages.reads(table_WM, last_W, runs_W, size, page_count, kernel)


def forward(
    spec: DecodeSpec,
    weights: Transformer | Unstacked,
    state: DecodeState,
    reads: pages.Reads | None,
    tokens_WT: jax.Array,
    positions_WT: jax.Array,
) -> tuple[jax.Array, Any]:
    """Computes T tokens of every slot; returns (logits [W, T, V], keys and values)."""
    x_WTD, kv = hidden(
        weights,
        spec.model_config,
        tokens_WT,
        positions_WT,
        cache=state.slots.kv if state.pool is None else state.pool.kv,
        pages_read=reads,
        reduction=spec.reduction,
        twice=chips.doubles_row(spec.mesh),
    )
    logits_WTV = logits(weights, spec.model_config, x_WTD)
    return sharding.gather_vocabulary(logits_WTV), kv


def advance_by_one(
    spec: DecodeSpec,
    weights: Transformer | Unstacked,
    state: DecodeState,
    runs_W: jax.Array,
) -> tuple[DecodeState, Events]:
    """Advances the slots that run by one token; returns (state, events [W])."""
    slots = state.slots.state
    reads = pages_to_read(spec, state, slots.position, runs_W)
    tokens_W1, positions_W1 = slots.token[:, None], slots.position[:, None]
    logits_W1V, kv = forward(spec, weights, state, reads, tokens_W1, positions_W1)
    return emit(spec, state, kv, logits_W1V[:, 0], runs_W)


def emit(
    spec: DecodeSpec,
    state: DecodeState,
    kv: Any,
    logits_WV: jax.Array,
    runs_W: jax.Array,
) -> tuple[DecodeState, Events]:
    """Samples a token for each slot that runs, and frees the slots that are done.

    kv: the keys and values after the forward pass. Returns (state, events [W]).
    """
    slots = state.slots.state
    next_position_W = slots.position + 1
    events, new = next_tokens(spec, logits_WV, slots, next_position_W, runs_W)
    active_W = events.flag == TOKEN
    if state.pool is None:
        request_W = jnp.where(active_W, new.request, NO_REQUEST)
        new = new._replace(active=active_W, request=request_W)
        return state._replace(slots=Slots(new, kv)), events
    slots = where_emitted(runs_W, new, slots)
    state = state._replace(slots=Slots(slots, None), pool=state.pool._replace(kv=kv))
    return decode_pages.release_slots(state, runs_W & ~active_W), events


# ---------------------------------------------------------------- speculation


def speculate(
    spec: DecodeSpec,
    weights: Transformer | Unstacked,
    state: DecodeState,
    runs_W: jax.Array,
) -> tuple[DecodeState, Events]:
    """Advances the slots that run by 1 to 1 + D tokens each, see speculation.py.

    Returns (state, events [1 + D, W]). With `spec.fixed_trip_count` there is no branch:
    every iteration computes 1 + D tokens a slot.
    """
    slots = state.slots.state
    assert slots.drafting is not None
    most_W = jnp.where(runs_W, slots.remaining - 1, 0)
    drafts = speculation.propose(slots.drafting, slots.position, most_W, spec.speculate)

    def with_drafts(state: DecodeState) -> tuple[DecodeState, Events]:
        return advance_with_drafts(spec, weights, state, runs_W, drafts)

    def without_drafts(state: DecodeState) -> tuple[DecodeState, Events]:
        state, events_W = advance_by_one(spec, weights, state, runs_W)
        slots = state.slots.state
        assert slots.drafting is not None
        drafting = speculation.recover(slots.drafting, drafts)
        state = with_slots(state, slots._replace(drafting=drafting))
        events = no_events(spec, spec.most_tokens, runs_W.size)
        return state, jax.tree.map(lambda x, new: x.at[0].set(new), events, events_W)

    if spec.fixed_trip_count:
        return with_drafts(state)
    least = speculation.least_gain(runs_W.size, spec.speculate, spec.balance)
    pays = speculation.pays(slots.drafting, drafts, runs_W, least)
    events = no_events(spec, spec.most_tokens, runs_W.size)
    state, events = run_once(pays, with_drafts, state, events)
    return run_once(~pays, without_drafts, state, events)


def run_once(
    predicate: jax.Array,
    function: Callable[[DecodeState], tuple[DecodeState, Events]],
    state: DecodeState,
    events: Events,
) -> tuple[DecodeState, Events]:
    """Returns `function(state)` if `predicate` is True, else (state, events).

    It is a loop of one iteration or none: XLA:CPU copies all keys and values for each
    branch of a `lax.cond`, and a loop changes them in place.
    """
    _, state, events = lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(predicate), *function(carry[1])),
        (predicate, state, events),
    )
    return state, events


def advance_with_drafts(
    spec: DecodeSpec,
    weights: Transformer | Unstacked,
    state: DecodeState,
    runs_W: jax.Array,
    drafts: speculation.Drafts,
) -> tuple[DecodeState, Events]:
    """Computes the last token of each slot and its draft, and emits what is accepted.

    Keys and values of drafted tokens that are not accepted stay where they are. No
    token reads them: attention reads up to a token's own position, and the token that
    comes to a position writes there first.
    """
    if state.pool is not None:
        state, length_W = decode_pages.grow_for_drafts(
            state, drafts.length, spec.speculate
        )
        drafts = drafts._replace(length=length_W)
    slots = state.slots.state
    T = spec.most_tokens
    reads = pages_to_read(spec, state, slots.position + drafts.length, runs_W)
    tokens_WT = jnp.concatenate([slots.token[:, None], drafts.tokens], axis=1)
    positions_WT = slots.position[:, None] + jnp.arange(T)
    logits_WTV, kv = forward(spec, weights, state, reads, tokens_WT, positions_WT)
    # After the last drafted token there is nothing to accept.
    expected_WT = jnp.where(
        jnp.arange(T) < drafts.length[:, None],
        jnp.pad(drafts.tokens, [(0, 0), (0, 1)]),
        speculation.NO_TOKEN,
    )

    def emit(t: jax.Array, carry: Any) -> Any:
        rows, emits_W, ended_W, events = carry
        logits_WV = lax.dynamic_index_in_dim(logits_WTV, t, 1, keepdims=False)
        expected_W = lax.dynamic_index_in_dim(expected_WT, t, 1, keepdims=False)
        events_W, new = next_tokens(spec, logits_WV, rows, rows.position + 1, emits_W)
        goes_on_W = events_W.flag == TOKEN
        rows = where_emitted(emits_W, new, rows)
        events = jax.tree.map(lambda all, one: all.at[t].set(one), events, events_W)
        ended_W |= emits_W & ~goes_on_W
        return rows, goes_on_W & (events_W.token == expected_W), ended_W, events

    carry = slots, runs_W, jnp.zeros_like(runs_W), no_events(spec, T, runs_W.size)
    if spec.fixed_trip_count:
        carry = lax.fori_loop(0, T, emit, carry)
    else:
        _, carry = lax.while_loop(
            lambda loop: (loop[0] < T) & loop[1][1].any(),
            lambda loop: (loop[0] + 1, emit(*loop)),
            (jnp.int32(0), carry),
        )
    new, _, ended_W, events = carry
    assert new.drafting is not None and events.drafted is not None
    accepted_W = (new.position - slots.position - 1).clip(0)
    new = new._replace(drafting=speculation.learn(new.drafting, drafts, accepted_W))
    events = events._replace(drafted=events.drafted.at[0].set(drafts.length))
    if state.pool is None:
        request_W = jnp.where(ended_W, NO_REQUEST, new.request)
        new = new._replace(active=new.active & ~ended_W, request=request_W)
        return state._replace(slots=Slots(new, kv)), events
    state = with_slots(state, new)._replace(pool=state.pool._replace(kv=kv))
    return decode_pages.release_slots(state, ended_W), events


def with_slots(state: DecodeState, slots: SlotState) -> DecodeState:
    """Returns the state with other slots, whose keys and values stay."""
    return state._replace(slots=state.slots._replace(state=slots))
