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
    sharding,
)
from ladder_jax.decode_prompts import carry, prefill
from ladder_jax.decode_state import (
    NO_REQUEST,
    NOT_WAITING,
    DecodeSpec,
    DecodeState,
    Events,
    Prompts,
    Slots,
    kv_specs,
    slots_specs,
    state_specs,
    without_weak_types,
)
from ladder_jax.decode_step import any_waiting, iterate, no_events
from ladder_jax.decode_weights import weights_specs
from ladder_jax.hardware import xla_options
from ladder_jax.model import Transformer, Unstacked

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


@functools.lru_cache(maxsize=32)
def make_carry(spec: DecodeSpec) -> Callable[..., Any]:
    """Returns the jitted call of one iteration that carries pieces of P prompts.

    (weights, state, cancelled, prompts) -> (state, events [1, W], waiting [R],
    events [P])

    It is a chunk of one iteration and the prefill call before it in one forward pass;
    see `make_chunk` and `make_prefill` for the arguments. Requests have pages, and
    `spec.speculate` is 0.
    """

    def carrying(
        weights: Transformer | Unstacked,
        state: DecodeState,
        cancelled_C: jax.Array,
        prompts: Prompts,
    ) -> tuple[DecodeState, Events, jax.Array, Events]:
        state = cancel(state, cancelled_C)
        state, events_1W, events_P = carry(spec, weights, state, prompts)
        return state, events_1W, state.staging.state.request, events_P

    in_specs = weights_specs(spec), state_specs(spec), P(), P()
    out_specs = state_specs(spec), P(), P(), P()
    return _jit_on_mesh(carrying, spec, in_specs, out_specs, donate=1)


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
        functools.partial(prefill, spec, scored),
        spec,
        in_specs,
        (slots_specs(spec), P(), P()),
        donate=1,
        workload="prefill",
    )


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
