"""Decodes requests that start at different times together, in one jitted loop.

This is called temporal fusion. On the device a request is one row: its keys and values,
and a `SlotState` with everything else that the device needs to decode it. The row is in
one of W **slots**, where the device decodes it, or in one of the R rows of **staging**,
where prefilled requests wait for a slot. One call of the **chunk** runs up to K
iterations. Each iteration

    1. admits: while a slot is free and a request waits, copies the waiting request
       with the lowest admission order into the first free slot;
    2. advances every active slot by one token: forward pass, sampling, history; or by
       several, if it accepts tokens that were drafted (speculation.py);
    3. emits an **event** for every token: (request id, token, flag, log-probability);
    4. frees the slots whose request is done, for step 1 of the next iteration.

So another request takes a freed slot in the next iteration, without the host. The
host reads the events of a chunk while the device runs the next chunk. The device
takes all these decisions, and every shard takes the same ones.

The decode state is one donated pytree, see decode_state.py. The cost of an iteration
depends on its compiled shape (W slots of S tokens), not on how many slots are active.
So the engine changes the shape with the load, see decode_shapes.py.

W slots, R staging rows, P prompts, T prompt tokens, C prompt width, S cache length,
V vocabulary, E entries of a list, K iterations, B rows, D drafted tokens, T = 1 + D
tokens of a slot. In the shape of a cache: L
layers, K key-value heads, H head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import (
    decode_pages,
    decode_scores,
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
    Prompts,
    Slots,
    SlotState,
    kv_specs,
    slots_specs,
    state_specs,
    without_weak_types,
)
from ladder_jax.decode_weights import weights_specs
from ladder_jax.hardware import xla_options
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
    state = admit_all(spec, state)
    old = state.slots.state
    growth = decode_pages.Growth(old.active, jnp.zeros_like(old.active))
    if state.pool is not None:
        state, growth = decode_pages.grow(state)
    advance = speculate if spec.speculate else advance_by_one
    state, events = advance(spec, weights, state, growth.runs)
    if state.pool is None:
        return state, events
    preempted = growth.preempted
    if spec.speculate:  # in the first row of events
        preempted &= jnp.arange(spec.most_tokens)[:, None] == 0
    return state, events._replace(
        request=jnp.where(preempted, old.request, events.request),
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
    logits_WV = logits_W1V[:, 0]
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


# ---------------------------------------------------------------- the programs


def _jit_on_mesh(
    function: Callable[..., Any],
    spec: DecodeSpec,
    in_specs: Any,
    out_specs: Any,
    donate: int | None = None,
    workload: str = "decode",
) -> Callable[..., Any]:
    """Jits `function`, which works on local shards, over the mesh.

    Args:
      donate: the number of the argument to donate.
      workload: which of XLA's options to use, see xla_options.options.
    """

    # The outputs of one call are inputs of the next. With other shardings or with weak
    # types, jit would take them for inputs of another type and compile again.
    def run(*args: Any) -> Any:
        return without_weak_types(function(*args))

    return jax.jit(
        sharding.shard_map(run, spec.mesh, in_specs, out_specs),
        donate_argnums=donate,
        out_shardings=sharding.named_shardings(spec.mesh, out_specs),
        compiler_options=xla_options.options(spec.mesh, workload),
    )


@functools.lru_cache(maxsize=32)
def make_chunk(spec: DecodeSpec, iterations: int) -> Callable[..., Any]:
    """Returns the jitted chunk, which runs up to K = `iterations` iterations.

    (weights, state, cancelled, steps) -> (state, events [K, W], waiting [R]); with
    `spec.speculate` the events are [K (1 + D), W].

      state: a DecodeState, donated.
      cancelled: int32 [C], ids of requests to remove first, padded with NO_REQUEST.
      steps: int32 scalar, at most K. Without `fixed_trip_count` the loop ends after
        so many iterations, or earlier if no slot is active and no request waits.
      waiting: int32 [R], the request ids in staging after the chunk.
    """

    def chunk(
        weights: Transformer | Unstacked,
        state: DecodeState,
        cancelled_C: jax.Array,
        steps: jax.Array,
    ) -> tuple[DecodeState, Events, jax.Array]:
        state = cancel(state, cancelled_C)
        W = state.slots.state.active.size
        shape = (spec.most_tokens, W) if spec.speculate else (W,)
        events = no_events(spec, iterations, *shape)

        def step(
            i: jax.Array, state: DecodeState, events: Events
        ) -> tuple[DecodeState, Events]:
            state, new_events = iterate(spec, weights, state)

            def write(all_K: jax.Array, new: jax.Array) -> jax.Array:
                return lax.dynamic_update_index_in_dim(all_K, new, i, 0)

            return state, jax.tree.map(write, events, new_events)

        def should_continue(carry: tuple[jax.Array, DecodeState, Events]) -> jax.Array:
            i, state, _ = carry
            has_steps = i < steps
            has_active = state.slots.state.active.any()
            return has_steps & (has_active | any_waiting(state))

        if spec.fixed_trip_count:
            state, events = lax.fori_loop(
                0, iterations, lambda i, carry: step(i, *carry), (state, events)
            )
        else:
            _, state, events = lax.while_loop(
                should_continue,
                lambda carry: (carry[0] + 1, *step(*carry)),
                (jnp.int32(0), state, events),
            )
        if spec.speculate:  # [K, 1 + D, W] -> [K (1 + D), W]
            rows = iterations * spec.most_tokens
            events = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), events)
        return state, events, state.staging.state.request

    in_specs = weights_specs(spec), state_specs(spec), P(), P()
    return _jit_on_mesh(chunk, spec, in_specs, (state_specs(spec), P(), P()), donate=1)


def cancel(state: DecodeState, cancelled_C: jax.Array) -> DecodeState:
    """Removes the requests with these ids from slots and staging."""

    def is_cancelled(rows: Slots) -> jax.Array:
        request = rows.state.request
        is_listed = (request[:, None] == cancelled_C).any(axis=1)
        return is_listed & (request != NO_REQUEST)

    def set_fields(rows: Slots, where: jax.Array, **values: Any) -> Slots:
        """Sets these fields in the rows `where` is True."""
        fields: dict[str, Any] = {
            name: jnp.where(where, value, getattr(rows.state, name))
            for name, value in values.items()
        }
        return rows._replace(state=rows.state._replace(**fields))

    slots_W, staging_R = is_cancelled(state.slots), is_cancelled(state.staging)
    if state.pool is not None:
        state = decode_pages.release_slots(state, slots_W)
        staging = decode_pages.release_staging(state.shared_staging(), staging_R)
        state = state.with_staging(staging)
    return state._replace(
        slots=set_fields(state.slots, slots_W, active=False, request=NO_REQUEST),
        staging=set_fields(
            state.staging, staging_R, admission_order=NOT_WAITING, request=NO_REQUEST
        ),
    )


@functools.lru_cache(maxsize=64)
def make_prefill(spec: DecodeSpec, scored: bool = False) -> Callable[..., Any]:
    """Returns the jitted prefill, which computes pieces of P prompts into staging.

    (weights, staging, prompts) -> (staging, events [P], scores)

      staging: `Slots` of R rows, donated.
      prompts: `Prompts`. C is the padded width of `prompts.prompt`. All pieces must lie
        within the first C tokens of a row: prefill reads and writes these alone.
      scores: None, or decode_scores.Scores [P, T] if `scored`. Then the token after
        each piece must be within the first C tokens, too.

    A piece attends to the keys and values that earlier pieces of its prompt, or a
    shared prefix, wrote to its row of staging. After the last piece of a prompt,
    prefill samples the request's first token and emits it, and the request waits for a
    slot. A request that wants no token emits none and does not wait.
    """
    in_specs = weights_specs(spec), slots_specs(spec), P()
    return _jit_on_mesh(
        functools.partial(_prefill, spec, scored),
        spec,
        in_specs,
        (slots_specs(spec), P(), P()),
        donate=1,
        workload="prefill",
    )


def _prefill(
    spec: DecodeSpec,
    scored: bool,
    weights: Transformer | Unstacked,
    staging: Slots,
    prompts: Prompts,
) -> tuple[Slots, Events, decode_scores.Scores | None]:
    T = prompts.tokens.shape[1]
    R = staging.state.admission_order.size
    prompts_kv, reads, lacks_pages_P, write = _prompt_rows(spec, staging, prompts)
    positions_PT = prompts.start[:, None] + jnp.arange(T)
    last_P1 = (prompts.length - 1).clip(0)[:, None]
    x_PRD, prompts_kv = hidden(
        weights,
        spec.model_config,
        prompts.tokens,
        positions_PT,
        cache=prompts_kv,
        read_BR=None if scored else last_P1,
        pages_read=reads,
        reduction=spec.reduction,
    )
    scores = None
    if scored:
        targets_PT = jnp.take_along_axis(
            prompts.prompt, positions_PT + 1, axis=1, mode="clip"
        )
        scores = decode_scores.score(spec, weights, x_PRD, targets_PT)
        x_PRD = jnp.take_along_axis(x_PRD, last_P1[:, :, None], axis=1)
    staging = write(prompts_kv)
    logits_P1V = logits(weights, spec.model_config, x_PRD)
    logits_PV = sharding.gather_vocabulary(logits_P1V)[:, 0]
    history_PV = sampling.prompt_history(
        prompts.prompt,
        spec.model_config.vocab_size,
        prompts.size - prompts.generated,
    )
    table_PM = staging.state.table[prompts.staging_index.clip(0, R - 1)]
    rows_P = prompts.state._replace(history=history_PV, table=table_PM)
    if rows_P.drafting is not None and staging.state.drafting is not None:
        length = staging.state.drafting.tokens.shape[1]
        drafting = speculation.with_prompts(rows_P.drafting, prompts.prompt, length)
        rows_P = rows_P._replace(drafting=drafting)
    next_position_P = prompts.start + prompts.length
    emits_P = prompts.last & (rows_P.remaining > 0)
    events, rows_P = next_tokens(spec, logits_PV, rows_P, next_position_P, emits_P)
    # Only requests that wait for a slot from now on are written to staging. A prompt
    # with more pieces to come does not wait yet, and a request that its first token
    # ended does not wait any more: their index is R, and JAX drops the write.
    index_P = jnp.where(events.flag == TOKEN, prompts.staging_index, R)
    state = jax.tree.map(
        lambda old, new: old.at[index_P].set(new, mode="drop"), staging.state, rows_P
    )
    if lacks_pages_P is not None:
        # The next call frees the pages of a request that its first token has ended:
        # the prefix cache may take them until then.
        has_ended_P = prompts.last & (events.flag != TOKEN)
        ended_P = jnp.where(has_ended_P, prompts.staging_index, R)
        request = state.request.at[ended_P].set(NO_REQUEST, mode="drop")
        state = state._replace(request=request)
        # The host sees that a prompt lacks pages, and fails.
        events = events._replace(flag=jnp.where(lacks_pages_P, PREEMPTED, events.flag))
    return Slots(state, staging.kv), events, scores


def _prompt_rows(
    spec: DecodeSpec, staging: Slots, prompts: Prompts
) -> tuple[Any, pages.Tables | None, jax.Array | None, Callable[[Any], Slots]]:
    """Returns the prompts' keys and values.

    They are the first C of their rows of staging; with pages, those of the pool, with
    the pages to read and bool [P]: which prompts lack a page. Also returns a function
    that takes the new keys and values, and returns staging with them.
    """
    C = prompts.prompt.shape[1]
    R = staging.state.admission_order.size
    index_P = prompts.staging_index
    if spec.page_size:
        staging = decode_pages.release_staging(staging)
        table_PM, lacks_P, pool = decode_pages.prompt_tables(
            staging.kv, staging.state, prompts
        )
        # The id tells which row a cancelled request leaves, whatever it computed.
        rows = staging.state._replace(
            table=staging.state.table.at[index_P].set(table_PM, mode="drop"),
            request=staging.state.request.at[index_P].set(
                prompts.state.request, mode="drop"
            ),
        )
        last_P = jnp.where(index_P < R, prompts.start + prompts.length - 1, 0)

        def with_kv(kv: Any) -> Slots:
            return Slots(rows, pool._replace(kv=kv))

        reads = pages.Tables(table_PM, last_P, spec.page_kernel)
        return pool.kv, reads, lacks_P, with_kv

    def first_tokens(kv: jax.Array, rows_P: jax.Array) -> tuple[Any, ...]:
        """Returns the index of these rows' first C tokens in [..., R, K, S, H]."""
        layers = (slice(None),) * (kv.ndim - 4)
        return *layers, rows_P, slice(None), slice(C)

    def read(kv: jax.Array) -> jax.Array:
        return kv[first_tokens(kv, index_P.clip(0, R - 1))]

    def write(kv: jax.Array, new: jax.Array) -> jax.Array:
        return kv.at[first_tokens(kv, index_P)].set(new, mode="drop")

    def write_all(new: Any) -> Slots:
        return staging._replace(kv=jax.tree.map(write, staging.kv, new))

    return jax.tree.map(read, staging.kv), None, None, write_all


@functools.lru_cache(maxsize=32)
def make_read_block(spec: DecodeSpec, size: int) -> Callable[..., Any]:
    """Returns a jitted function that takes a block of tokens out of staging.

    (staging, index, start) -> (staging, block): `size` tokens from `start` on of row
    `index`. The block is a copy of their keys and values [.., 1, K, size, H]; with
    pages, it is the pages [E], which have one user more. `staging` is donated.
    """

    def read_block(
        staging: Slots, index: jax.Array, start: jax.Array
    ) -> tuple[Slots, Any]:
        if spec.page_size:
            return decode_pages.hold_block(staging, index, start, size)

        def read(kv: jax.Array) -> jax.Array:
            row = lax.dynamic_slice_in_dim(kv, index, 1, kv.ndim - 4)
            return lax.dynamic_slice_in_dim(row, start, size, kv.ndim - 2)

        return staging, jax.tree.map(read, staging.kv)

    in_specs = slots_specs(spec), P(), P()
    out_specs = slots_specs(spec), _block_specs(spec)
    return _jit_on_mesh(read_block, spec, in_specs, out_specs, donate=0)


@functools.lru_cache(maxsize=32)
def make_write_block(spec: DecodeSpec) -> Callable[..., Any]:
    """Returns a jitted function that gives a block of tokens to a row of staging.

    (staging, index, start, block, request) -> staging with `block` at the tokens from
    `start` on of row `index`, which belongs to this request. `block` comes from
    `make_read_block`. `staging` is donated.
    """

    def write_block(
        staging: Slots,
        index: jax.Array,
        start: jax.Array,
        block: Any,
        request: jax.Array,
    ) -> Slots:
        if spec.page_size:
            return decode_pages.share_block(staging, index, start, block, request)

        def write(kv: jax.Array, new: jax.Array) -> jax.Array:
            starts: list[Any] = [0] * kv.ndim
            starts[-4], starts[-2] = index, start
            return lax.dynamic_update_slice(kv, new, starts)

        return staging._replace(kv=jax.tree.map(write, staging.kv, block))

    in_specs = slots_specs(spec), P(), P(), _block_specs(spec), P()
    return _jit_on_mesh(write_block, spec, in_specs, slots_specs(spec), donate=0)


@functools.lru_cache(maxsize=32)
def make_drop_block(spec: DecodeSpec) -> Callable[..., Any]:
    """Returns a jitted function that drops a block; only pages need it.

    (staging, block) -> staging, donated, whose pages of `block` have one user less.
    """

    def drop_block(staging: Slots, block: Any) -> Slots:
        return decode_pages.drop_block(staging, block)

    in_specs = slots_specs(spec), P()
    return _jit_on_mesh(drop_block, spec, in_specs, slots_specs(spec), donate=0)


def _block_specs(spec: DecodeSpec) -> Any:
    return P() if spec.page_size else kv_specs(spec)
