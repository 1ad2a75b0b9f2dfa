"""Temporal fusion: requests of different ages decode together in one jitted loop.

On the device a request is one row: its keys and values, and a `SlotState` with all
else that decoding it needs. A row is in one of W **slots**, where it decodes, or in
one of R places of **staging**, where prefilled requests wait for a slot. One call of
the **chunk** runs up to K iterations. Each iteration

    1. admits: while a slot is free and a request waits, copies the waiting request
       with the lowest admission order into the first free slot;
    2. advances every active slot by one token: forward pass, sampling, history;
    3. emits an **event** for every slot: (request id, token, flag, log-probability);
    4. frees the slots whose request is done, for step 1 of the next iteration.

So another request takes a freed slot in the next iteration, without the host. The
host reads the events of a chunk while the device runs the next chunk. The device
takes all these decisions, and every shard takes the same ones.

The decode state is one donated pytree. An iteration costs what the compiled shape (W
slots of S tokens) costs, whatever is live. So the engine keeps that shape close to the
live requests: `reshape` gives the state another shape with the fewest moves.

W slots, R staging places, P prompts, T prompt tokens, C prompt width, S cache length,
V vocabulary, E entries of a list, K iterations, B rows. In the shape of a cache: L
layers, K key-value heads, H head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ladder_jax import kv_cache, sampling, sharding
from ladder_jax.config import Model
from ladder_jax.hardware import xla_options
from ladder_jax.model import Transformer, Unstacked, abstract, hidden, logits, unstack
from ladder_jax.sampling import Array

NO_REQUEST = -1  # the request id of an empty slot
NOT_WAITING = 2**31 - 1  # the admission order of an empty place in staging

# Flags of an event: no token, a token, the last one that max_tokens allows, a stop id.
IDLE, TOKEN, LENGTH, STOP = range(4)

# On TPU and CPU, XLA runs a branch, or a loop of unknown trip count, wholly on the
# device. On GPU it copies the predicate to the host in every iteration and waits for
# it. Programs with `fixed_trip_count` have neither: K iterations always run, and every
# iteration tries this many admissions. Writes that have nothing to do fall outside
# their arrays, and JAX drops them.
ADMISSIONS_PER_STEP = 2


# ---------------------------------------------------------------- types


class SlotState(NamedTuple):
    """All that decoding a request needs beside its keys and values.

    Arrays lead with a dimension of slots or of staging places. The host builds those
    of new requests with NumPy.
    """

    request: Array  # int32: its id, or NO_REQUEST
    active: Array  # bool: it advances in this iteration (staging: False)
    admission_order: Array  # int32: the lowest is admitted first; or NOT_WAITING
    token: Array  # int32: the last token, which the model has not seen yet
    position: Array  # int32: where that token stands in the sequence
    remaining: Array  # int32: tokens that it may still emit
    stops: Array  # int32 [., E]: ids that end it, padded with NO_REQUEST
    logprobs: Array  # bool: its events carry log-probabilities
    sampling: sampling.SamplingParams
    history: Array  # int32 [., V], see sampling.update_history


class Slots(NamedTuple):
    """The rows of the slots, or of staging.

    Keys and values are a list of KVs [W or R, K, S, H], one a layer, if the layers are
    unrolled; else one KV [L, W or R, K, S, H].
    """

    state: SlotState
    kv: list[kv_cache.KV] | kv_cache.KV


class DecodeState(NamedTuple):
    """All that a decode program keeps on the device from call to call."""

    slots: Slots
    staging: Slots


class Events(NamedTuple):
    """What each row emitted: arrays [K, W] of a chunk, [P] of a prefill call."""

    request: Array  # int32: a request id, or NO_REQUEST
    token: Array  # int32
    flag: Array  # int32: IDLE, TOKEN, LENGTH or STOP
    logprob: Array  # float32, before any sampling rule; 0 if not requested
    top_ids: Array  # int32 [..., E]: the likeliest ids
    top_logprobs: Array  # float32 [..., E]: their log-probabilities


class Prompts(NamedTuple):
    """Pieces of P prompts for one prefill call, NumPy or device arrays."""

    tokens: Array  # int32 [P, T]: the piece, padded
    start: Array  # int32: where in its prompt the piece starts
    length: Array  # int32: tokens of the piece without padding
    staging_index: Array  # int32: its place in staging; R: the row is padding
    last: Array  # bool: the prompt ends with this piece
    # int32 [P, C]: the whole prompt, padded with ids outside the vocabulary; only
    # rows with `last` are read.
    prompt: Array
    # Of the request. Prefill sets token, position, history and active.
    state: SlotState


class DecodeSpec(NamedTuple):
    """All that the compiled programs of an engine depend on, beside array shapes.

    It is hashable: engines with equal specs share their compiled programs.
    """

    model_config: Model
    mesh: Mesh
    vocabulary: int  # only ids below it are sampled
    max_stop_ids: int  # of a request
    max_logit_bias: int  # ids that a request may bias
    max_logprobs: int  # alternatives that an event has room for
    kv_dtype: str  # one of kv_cache.DTYPES
    unroll_layers: bool  # one array a layer, not a stack of all layers
    fixed_trip_count: bool  # masks, no branches: see ADMISSIONS_PER_STEP
    reduction: Any = "psum"  # see model.hidden


# ---------------------------------------------------------------- the state


def empty_slots(count: int, spec: DecodeSpec) -> SlotState:
    """Returns a `SlotState` of `count` rows that belong to no request."""
    zeros = functools.partial(jnp.zeros, count)
    return SlotState(
        request=jnp.full(count, NO_REQUEST, jnp.int32),
        active=zeros(bool),
        admission_order=jnp.full(count, NOT_WAITING, jnp.int32),
        token=zeros(jnp.int32),
        position=zeros(jnp.int32),
        remaining=zeros(jnp.int32),
        stops=jnp.full((count, spec.max_stop_ids), NO_REQUEST, jnp.int32),
        logprobs=zeros(bool),
        sampling=sampling.neutral_params(count, spec.max_logit_bias),
        history=jnp.zeros((count, spec.model_config.vocab_size), jnp.int32),
    )


def kv_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of `Slots.kv`."""
    if not spec.unroll_layers:
        return sharding.CACHE
    return [P(*sharding.CACHE[1:])] * spec.model_config.layers


def slots_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of `Slots`: only keys and values are sharded."""
    return Slots(P(), kv_specs(spec))  # type: ignore[arg-type]  # specs for arrays


def state_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of a `DecodeState`."""
    return DecodeState(slots_specs(spec), slots_specs(spec))


def weights_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of the weights that `place_weights` returns."""
    arrange = functools.partial(_arrange, spec)
    weights = jax.eval_shape(arrange, abstract(spec.model_config))
    return sharding.parameter_specs(weights)


def empty(spec: DecodeSpec, width: int, places: int, length: int) -> DecodeState:
    """Allocates a DecodeState without requests.

    Args:
      width: W, slots.
      places: R, places in staging.
      length: S, tokens that each row's keys and values have room for.
    """
    return _make_empty(spec, width, places, length)()


@functools.lru_cache(maxsize=256)
def _make_empty(
    spec: DecodeSpec, width: int, places: int, length: int
) -> Callable[[], DecodeState]:
    model_config = spec.model_config

    def empty_rows(count: int) -> Slots:
        shape = count, model_config.kv_heads, length, model_config.head_dim
        layers = model_config.layers
        state = empty_slots(count, spec)
        if spec.unroll_layers:
            kv = [kv_cache.empty(shape, spec.kv_dtype) for _ in range(layers)]
            return Slots(state, kv)
        return Slots(state, kv_cache.empty((layers, *shape), spec.kv_dtype))

    def build() -> DecodeState:
        return _strong(DecodeState(empty_rows(width), empty_rows(places)))

    # One PartitionSpec stands for a whole subtree: give every array its own.
    specs = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec, part),
        state_specs(spec),
        jax.eval_shape(build),
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.jit(build, out_shardings=sharding.named_shardings(spec.mesh, specs))


def _strong(tree: Any) -> Any:
    """Strips JAX's weak types from a tree of arrays."""
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), tree)


def _compiled(
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
      workload: whose options of XLA apply, see xla_options.options.
    """

    # A call's outputs are the next call's inputs. Their shardings are pinned and their
    # weak types stripped: else jit would see inputs of another type and compile again.
    def strong(*args: Any) -> Any:
        return _strong(function(*args))

    return jax.jit(
        sharding.shard_map(strong, spec.mesh, in_specs, out_specs),
        donate_argnums=donate,
        out_shardings=sharding.named_shardings(spec.mesh, out_specs),
        compiler_options=xla_options.options(spec.mesh, workload),
    )


# ---------------------------------------------------------------- the weights


def place_weights(spec: DecodeSpec, model: Transformer) -> Transformer | Unstacked:
    """Returns the weights of `model`, which is on the mesh, as the programs take them.

    Matrices are in the compute dtype and, if `spec.unroll_layers`, layers are a list. A
    decode step costs what reading its weights costs: a cast inside it would read twice
    as much, and a scan over stacked layers copies each layer out of the stack on GPUs.
    """
    return _make_arrange(spec)(model)


@functools.lru_cache(maxsize=32)
def _make_arrange(spec: DecodeSpec) -> Callable[..., Any]:
    return jax.jit(
        functools.partial(_arrange, spec),
        out_shardings=sharding.named_shardings(spec.mesh, weights_specs(spec)),
    )


def _arrange(spec: DecodeSpec, model: Transformer) -> Transformer | Unstacked:
    def cast(role: sharding.Role, x: jax.Array) -> jax.Array:
        return x if role == "norm" else x.astype(spec.model_config.dtype)

    model = jax.tree.map(cast, sharding.parameter_roles(model), model)
    return unstack(model) if spec.unroll_layers else model


# ---------------------------------------------------------------- one iteration


def any_waiting(state: DecodeState) -> jax.Array:
    """Whether a request waits in staging: a bool scalar."""
    return state.staging.state.admission_order.min() < NOT_WAITING


def admit(state: DecodeState) -> DecodeState:
    """Moves the waiting request with the lowest order into the first free slot.

    The state stays the same if no request waits or no slot is free.
    """
    slots, staging = state.slots.state, state.staging.state
    index = jnp.argmin(staging.admission_order)
    slot = jnp.argmin(slots.active)
    moves = (staging.admission_order[index] < NOT_WAITING) & ~slots.active[slot]
    # Where nothing moves, both lie outside their arrays, and JAX drops the writes.
    to_slot = jnp.where(moves, slot, slots.active.size)
    from_index = jnp.where(moves, index, staging.admission_order.size)

    def copy(old: jax.Array, source: jax.Array) -> jax.Array:
        return old.at[to_slot].set(source[index], mode="drop")

    def copy_kv(old: jax.Array, source: jax.Array) -> jax.Array:
        stacked = old.ndim == 5
        return jax.vmap(copy)(old, source) if stacked else copy(old, source)

    slots = jax.tree.map(copy, slots, staging)
    slots = slots._replace(active=slots.active.at[to_slot].set(True, mode="drop"))
    order = staging.admission_order.at[from_index].set(NOT_WAITING, mode="drop")
    request = staging.request.at[from_index].set(NO_REQUEST, mode="drop")
    kv = jax.tree.map(copy_kv, state.slots.kv, state.staging.kv)
    staging = staging._replace(admission_order=order, request=request)
    return DecodeState(Slots(slots, kv), Slots(staging, state.staging.kv))


def admit_all(spec: DecodeSpec, state: DecodeState) -> DecodeState:
    """Admits while a slot is free and a request waits.

    With `spec.fixed_trip_count` it tries ADMISSIONS_PER_STEP times instead.
    """
    if spec.fixed_trip_count:
        places = state.staging.state.admission_order.size
        for _ in range(min(ADMISSIONS_PER_STEP, places)):
            state = admit(state)
        return state

    def can_admit(state: DecodeState) -> jax.Array:
        return any_waiting(state) & ~state.slots.state.active.all()

    return lax.while_loop(can_admit, admit, state)


def no_events(spec: DecodeSpec, *shape: int) -> Events:
    """Returns Events of this shape in which nothing happens."""
    zeros, top_shape = jnp.zeros(shape, jnp.int32), (*shape, spec.max_logprobs)
    return Events(
        request=zeros + NO_REQUEST,
        token=zeros,
        flag=zeros,
        logprob=jnp.zeros(shape),
        top_ids=jnp.zeros(top_shape, jnp.int32),
        top_logprobs=jnp.zeros(top_shape),
    )


def next_tokens(
    spec: DecodeSpec,
    logits_BV: jax.Array,
    rows_B: SlotState,
    position_B: jax.Array,
    counts_B: jax.Array,
) -> tuple[Events, SlotState]:
    """Samples the next token of every row.

    Args:
      logits_BV: float32, of the whole vocabulary.
      rows_B: the requests' states.
      position_B: where in its sequence the next token will stand.
      counts_B: bool; the other rows emit nothing, and their new state is not used.
    Returns (events [B], the states after it).
    """
    maybe = sampling.run_always if spec.fixed_trip_count else sampling.run_if
    token_B = sampling.sample_tokens(
        logits_BV, rows_B.sampling, rows_B.history, position_B, spec.vocabulary, maybe
    )
    wants_logprobs_B = rows_B.logprobs & counts_B
    any_wants = wants_logprobs_B.any()
    nothing = no_events(spec, token_B.size)
    logprob_B, top_ids_BE, top_logprobs_BE = maybe(
        any_wants,
        lambda _: sampling.log_probabilities(
            logits_BV, token_B, spec.max_logprobs, spec.vocabulary
        ),
        (nothing.logprob, nothing.top_ids, nothing.top_logprobs),
    )
    stops_B = (rows_B.stops == token_B[:, None]).any(axis=1)
    remaining_B = rows_B.remaining - 1
    flag_B = jnp.where(remaining_B <= 0, LENGTH, TOKEN)
    flag_B = jnp.where(stops_B, STOP, flag_B)
    flag_B = jnp.where(counts_B, flag_B, IDLE)
    events = Events(
        request=jnp.where(counts_B, rows_B.request, NO_REQUEST),
        token=token_B,
        flag=flag_B,
        logprob=jnp.where(wants_logprobs_B, logprob_B, 0),
        top_ids=top_ids_BE,
        top_logprobs=top_logprobs_BE,
    )
    return events, rows_B._replace(
        token=token_B,
        position=position_B,
        remaining=remaining_B,
        history=sampling.update_history(rows_B.history, token_B, counts_B),
    )


def iterate(
    spec: DecodeSpec, weights: Transformer | Unstacked, state: DecodeState
) -> tuple[DecodeState, Events]:
    """Runs one iteration: admission, one token of every slot. Returns events [W]."""
    state = admit_all(spec, state)
    slots, kv = state.slots
    x_W1D, kv = hidden(
        weights,
        spec.model_config,
        slots.token[:, None],
        slots.position[:, None],
        cache=kv,
        reduction=spec.reduction,
    )
    logits_W1V = logits(weights, spec.model_config, x_W1D)
    logits_WV = sharding.gather_vocabulary(logits_W1V)[:, 0]
    next_position_W = slots.position + 1
    events, slots = next_tokens(spec, logits_WV, slots, next_position_W, slots.active)
    active_W = events.flag == TOKEN
    request_W = jnp.where(active_W, slots.request, NO_REQUEST)
    slots = slots._replace(active=active_W, request=request_W)
    return state._replace(slots=Slots(slots, kv)), events


# ---------------------------------------------------------------- the programs


@functools.lru_cache(maxsize=32)
def make_chunk(spec: DecodeSpec, iterations: int) -> Callable[..., Any]:
    """Returns the jitted chunk, which runs up to K = `iterations` iterations.

    (weights, state, cancelled, steps) -> (state, events [K, W], waiting [R])

      state: a DecodeState, donated.
      cancelled: int32 [C], ids of requests to remove first, padded with NO_REQUEST.
      steps: int32 scalar, at most K. Without `fixed_trip_count` the loop ends after
        so many iterations, or earlier if no slot is active and no request waits.
      waiting: the request ids in staging afterwards.
    """

    def chunk(
        weights: Transformer | Unstacked,
        state: DecodeState,
        cancelled_C: jax.Array,
        steps: jax.Array,
    ) -> tuple[DecodeState, Events, jax.Array]:
        state = cancel(state, cancelled_C)
        events = no_events(spec, iterations, state.slots.state.active.size)

        def step(
            i: jax.Array, state: DecodeState, events: Events
        ) -> tuple[DecodeState, Events]:
            state, events_W = iterate(spec, weights, state)

            def write(all_KW: jax.Array, new_W: jax.Array) -> jax.Array:
                return lax.dynamic_update_index_in_dim(all_KW, new_W, i, 0)

            return state, jax.tree.map(write, events, events_W)

        def goes_on(carry: tuple[jax.Array, DecodeState, Events]) -> jax.Array:
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
                goes_on,
                lambda carry: (carry[0] + 1, *step(*carry)),
                (jnp.int32(0), state, events),
            )
        return state, events, state.staging.state.request

    in_specs = weights_specs(spec), state_specs(spec), P(), P()
    return _compiled(chunk, spec, in_specs, (state_specs(spec), P(), P()), donate=1)


def cancel(state: DecodeState, cancelled_C: jax.Array) -> DecodeState:
    """Removes the requests with these ids from slots and staging."""

    def without(rows: Slots, **values: Any) -> Slots:
        """Puts `values` into the fields of the cancelled requests."""
        request = rows.state.request
        is_listed = (request[:, None] == cancelled_C).any(axis=1)
        is_cancelled = is_listed & (request != NO_REQUEST)
        fields: dict[str, Any] = {
            name: jnp.where(is_cancelled, value, getattr(rows.state, name))
            for name, value in values.items()
        }
        return rows._replace(state=rows.state._replace(**fields))

    return DecodeState(
        without(state.slots, active=False, request=NO_REQUEST),
        without(state.staging, admission_order=NOT_WAITING, request=NO_REQUEST),
    )


@functools.lru_cache(maxsize=32)
def make_prefill(spec: DecodeSpec) -> Callable[..., Any]:
    """Returns the jitted prefill, which computes pieces of P prompts into staging.

    (weights, staging, prompts) -> (staging, events [P])

      staging: `Slots` of R places, donated.
      prompts: `Prompts`. All pieces must lie within the first C tokens, the padded
        width of `prompts.prompt`: they attend to so much of the cache.

    A piece attends to the keys and values that earlier pieces of its prompt, or a
    shared prefix, left in its place. With the last piece of a prompt its first token
    is sampled and emitted, and the request then waits for a slot.
    """
    in_specs = weights_specs(spec), slots_specs(spec), P()
    return _compiled(
        functools.partial(_prefill, spec),
        spec,
        in_specs,
        (slots_specs(spec), P()),
        donate=1,
        workload="prefill",
    )


def _prefill(
    spec: DecodeSpec, weights: Transformer | Unstacked, staging: Slots, prompts: Prompts
) -> tuple[Slots, Events]:
    T, C = prompts.tokens.shape[1], prompts.prompt.shape[1]
    R = staging.state.admission_order.size

    def part(kv: jax.Array, rows_P: jax.Array) -> tuple[Any, ...]:
        """The index of the first C tokens of these rows in [..., R, K, S, H]."""
        layers = (slice(None),) * (kv.ndim - 4)
        return *layers, rows_P, slice(None), slice(C)

    def read(kv: jax.Array) -> jax.Array:
        return kv[part(kv, prompts.staging_index.clip(0, R - 1))]

    def write(kv: jax.Array, new: jax.Array) -> jax.Array:
        return kv.at[part(kv, prompts.staging_index)].set(new, mode="drop")

    prompts_kv = jax.tree.map(read, staging.kv)
    positions_PT = prompts.start[:, None] + jnp.arange(T)
    last_P1 = (prompts.length - 1).clip(0)[:, None]
    x_P1D, prompts_kv = hidden(
        weights,
        spec.model_config,
        prompts.tokens,
        positions_PT,
        cache=prompts_kv,
        read_BR=last_P1,
        reduction=spec.reduction,
    )
    kv = jax.tree.map(write, staging.kv, prompts_kv)
    logits_P1V = logits(weights, spec.model_config, x_P1D)
    logits_PV = sharding.gather_vocabulary(logits_P1V)[:, 0]
    history_PV = sampling.prompt_history(prompts.prompt, spec.model_config.vocab_size)
    rows_P = prompts.state._replace(history=history_PV)
    next_position_P = prompts.start + prompts.length
    events, rows_P = next_tokens(spec, logits_PV, rows_P, next_position_P, prompts.last)
    # The row is written only if the request then waits for a slot: not after a piece
    # that is not the last, nor if its first token ends it. JAX drops other writes.
    index_P = jnp.where(events.flag == TOKEN, prompts.staging_index, R)
    state = jax.tree.map(
        lambda old, new: old.at[index_P].set(new, mode="drop"), staging.state, rows_P
    )
    return Slots(state, kv), events


@functools.lru_cache(maxsize=32)
def make_read_block(spec: DecodeSpec, size: int) -> Callable[..., Any]:
    """Returns a jitted function that copies keys and values out of staging.

    (staging, index, start) -> the keys and values [.., 1, K, size, H] of `size` tokens
    from `start` on, of the staging place `index`.
    """

    def read_block(staging: Slots, index: jax.Array, start: jax.Array) -> Any:
        def read(kv: jax.Array) -> jax.Array:
            row = lax.dynamic_slice_in_dim(kv, index, 1, kv.ndim - 4)
            return lax.dynamic_slice_in_dim(row, start, size, kv.ndim - 2)

        return jax.tree.map(read, staging.kv)

    in_specs = slots_specs(spec), P(), P()
    return _compiled(read_block, spec, in_specs, kv_specs(spec))


@functools.lru_cache(maxsize=32)
def make_write_block(spec: DecodeSpec) -> Callable[..., Any]:
    """Returns a jitted function that copies keys and values into staging.

    (staging, index, start, block) -> staging with `block`, which `make_read_block`
    returned, at the tokens from `start` on of the place `index`. `staging` is donated.
    """

    def write_block(
        staging: Slots, index: jax.Array, start: jax.Array, block: Any
    ) -> Slots:
        def write(kv: jax.Array, new: jax.Array) -> jax.Array:
            starts: list[Any] = [0] * kv.ndim
            starts[-4], starts[-2] = index, start
            return lax.dynamic_update_slice(kv, new, starts)

        return staging._replace(kv=jax.tree.map(write, staging.kv, block))

    in_specs = slots_specs(spec), P(), P(), kv_specs(spec)
    return _compiled(write_block, spec, in_specs, slots_specs(spec), donate=0)


# ---------------------------------------------------------------- another shape


def source_slots(active_W: jax.Array, width: int) -> jax.Array:
    """Returns, for each of `width` new slots, the old slot [width] to copy it from.

    It is the memory shuffle of Flover (arXiv 2305.13484), which needs the fewest moves:
    of all windows of `width` neighbouring slots, the leftmost with the most active ones
    stays, and the active slots outside it move, in ascending order, into its free
    slots. With more slots than before, all stay, and the source of the new ones is W,
    which is no slot.

      active slots  . A . B C . . D     (W = 8), width 4
      window            [. B C .]
      new slots          A B C D
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
    """Returns the state with `width` slots of `length` tokens; `state` is used up.

    The caller makes sure that all active requests fit. Keys and values move array by
    array, and each old array is deleted at once, so that only one exists twice.
    """
    slots, source = state.slots.state, None
    if width != slots.active.size:
        source, slots = _reshape_slots(slots, width)

    def move(kv: Any, source: jax.Array | None) -> Any:
        arrays, tree = jax.tree.flatten(kv)
        for i, array in enumerate(arrays):
            if source is not None or length != array.shape[-2]:
                arrays[i] = _make_move(array.sharding, length)(array, source)
                array.delete()
        return jax.tree.unflatten(tree, arrays)

    return DecodeState(
        Slots(slots, move(state.slots.kv, source)),
        Slots(state.staging.state, move(state.staging.kv, None)),
    )


@functools.partial(jax.jit, static_argnames="width")
def _reshape_slots(slots: SlotState, width: int) -> tuple[jax.Array, SlotState]:
    """Returns (the slots' sources [width], the state of `width` slots)."""
    source = source_slots(slots.active, width)
    exists = source < slots.active.size
    moved = jax.tree.map(lambda x: jnp.take(x, source, axis=0, mode="clip"), slots)
    return source, moved._replace(
        active=jnp.where(exists, moved.active, False),
        request=jnp.where(exists, moved.request, NO_REQUEST),
    )


@functools.lru_cache(maxsize=256)
def _make_move(sharding: NamedSharding, length: int) -> Callable[..., jax.Array]:
    """Jits (keys or values [..., B, K, S, H], rows or None) -> these rows, S = length.

    Tokens are cut off, or zeros added, at the end.
    """

    def move(kv: jax.Array, rows: jax.Array | None) -> jax.Array:
        if rows is not None:
            kv = jnp.take(kv, rows, axis=kv.ndim - 4, mode="clip")
        added = length - kv.shape[-2]
        if added <= 0:
            return kv[..., :length, :]
        return jnp.pad(kv, [(0, 0)] * (kv.ndim - 2) + [(0, added), (0, 0)])

    return jax.jit(move, out_shardings=sharding)
