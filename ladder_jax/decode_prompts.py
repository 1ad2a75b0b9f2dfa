"""Computes pieces of prompts on the device, in a call of their own or beside slots.

A call of its own is **prefill** (decode.make_prefill). A call that **carries** a piece
computes one token of every slot and the piece in one forward pass, which reads the
weights once (decode.make_carry; Sarathi-Serve, arXiv 2403.02310).

W slots, R staging rows, P prompts, T prompt tokens, N = W + P T, C prompt width,
S cache length, V vocabulary, M entries of a table. In the shape of a cache: K key-value
heads, H head.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ladder_jax import (
    decode_pages,
    decode_scores,
    pages,
    sampling,
    sharding,
    speculation,
)
from ladder_jax.beside import Beside
from ladder_jax.decode_state import (
    NO_REQUEST,
    PREEMPTED,
    TOKEN,
    DecodeSpec,
    DecodeState,
    Events,
    Prompts,
    Slots,
)
from ladder_jax.decode_step import (
    admit_and_grow,
    emit,
    next_tokens,
    pages_to_read,
    with_preempted,
)
from ladder_jax.model import Transformer, Unstacked, hidden, logits


def prefill(
    spec: DecodeSpec,
    scored: bool,
    weights: Transformer | Unstacked,
    staging: Slots,
    prompts: Prompts,
) -> tuple[Slots, Events, decode_scores.Scores | None]:
    """Computes pieces of prompts into staging: decode.make_prefill."""
    T = prompts.tokens.shape[1]
    prompts_kv, reads, lacks_P, write = _prompt_rows(spec, staging, prompts)
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
    staging, events = first_tokens(spec, staging, prompts, logits_PV, lacks_P)
    return staging, events, scores


def first_tokens(
    spec: DecodeSpec,
    staging: Slots,
    prompts: Prompts,
    logits_PV: jax.Array,
    lacks_P: jax.Array | None,
) -> tuple[Slots, Events]:
    """Samples the first tokens of the prompts that are complete; they wait for a slot.

    Args:
      staging: with the pieces' keys and values.
      logits_PV: after the last token of each piece.
      lacks_P: with pages, bool: which prompts lack one.
    Returns (staging, events [P]).
    """
    R = staging.state.admission_order.size
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
    if lacks_P is not None:
        # The next call frees the pages of a request that its first token has ended:
        # the prefix cache may take them until then.
        has_ended_P = prompts.last & (events.flag != TOKEN)
        ended_P = jnp.where(has_ended_P, prompts.staging_index, R)
        request = state.request.at[ended_P].set(NO_REQUEST, mode="drop")
        state = state._replace(request=request)
        # The host sees that a prompt lacks pages, and fails.
        events = events._replace(flag=jnp.where(lacks_P, PREEMPTED, events.flag))
    return Slots(state, staging.kv), events


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


# ---------------------------------------------------------------- beside the slots


def carry(
    spec: DecodeSpec,
    weights: Transformer | Unstacked,
    state: DecodeState,
    prompts: Prompts,
) -> tuple[DecodeState, Events, Events]:
    """Runs one iteration whose forward pass also computes pieces of prompts.

    Requests have pages, and `spec.speculate` is 0. A prompt that is complete waits for
    a slot from the next iteration on.
    Returns (state, events [1, W] of the slots, events [P] of the prompts).
    """
    staging = state.shared_staging()
    # Prompts get their pages before slots do: the host has counted them.
    kv, prompt_reads, lacks_P, write = _prompt_rows(spec, staging, prompts)
    state = state.with_staging(write(kv))
    state, asking, growth = admit_and_grow(spec, state)
    assert state.pool is not None and prompt_reads is not None
    slots, runs_W = state.slots.state, growth.runs
    slot_reads = pages_to_read(spec, state, slots.position, runs_W)
    assert slot_reads is not None
    (P, T), W = prompts.tokens.shape, runs_W.size
    positions_PT = prompts.start[:, None] + jnp.arange(T)
    last_P = W + jnp.arange(P) * T + (prompts.length - 1).clip(0)

    def one_row(of_slots_W: jax.Array, of_prompts: jax.Array) -> jax.Array:
        return jnp.concatenate([of_slots_W, of_prompts.reshape(-1)])[None]

    x_1RD, kv = hidden(
        weights,
        spec.model_config,
        one_row(slots.token, prompts.tokens),
        one_row(slots.position, positions_PT),
        cache=state.pool.kv,
        read_BR=one_row(jnp.arange(W), last_P),
        pages_read=Beside(slot_reads, prompt_reads),
        reduction=spec.reduction,
    )
    logits_1RV = logits(weights, spec.model_config, x_1RD)
    logits_RV = sharding.gather_vocabulary(logits_1RV)[0]
    state, events_W = emit(spec, state, kv, logits_RV[:W], runs_W)
    events_W = with_preempted(spec, events_W, asking, growth)
    staging, events_P = first_tokens(
        spec, state.shared_staging(), prompts, logits_RV[W:], lacks_P
    )
    one_iteration = jax.tree.map(lambda x: x[None], events_W)
    return state.with_staging(staging), one_iteration, events_P
