"""Temporal fusion: requests of any age advance together, one token an iteration, inside one jitted loop.

On the device a request is one *row*: its keys and values and a `SlotState` of what decoding it needs. A row lives in one of W
*slots*, which decode, or in one of R places of *staging*, where prefilled requests wait. One call of the **chunk** runs
up to K iterations, and each of them

    1. admits: while a slot is free and somebody waits, the one whose turn it is moves there, row by row copied;
    2. advances every active slot by one token: forward pass, sampling, history;
    3. emits an **event** for every slot: (request, token, log-probability, flag);
    4. frees the slots whose request is done, for step 1 of the next iteration.

So a finished request's slot is taken over in the next iteration without the host, which reads the events of a chunk
while the next one runs. Everything that decides is on the device and the same on all its shards.

All state is one donated pytree. Its compiled shape (W slots of S tokens) is the cost of an iteration, so the engine
keeps it fitted to what is live with `reshape`, by the memory shuffle of Flover (arXiv 2305.13484): the fewest moves.

W slots, R places, P prompts, T prompt tokens, S cache length, V vocabulary, E entries, K iterations.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ladder_jax import kv_cache, sampling, sharding
from ladder_jax import model as transformer
from ladder_jax.hardware import xla_options

NO_REQUEST = -1  # in place of a request's id
NOT_WAITING = 2**31 - 1  # the turn of a place that empty_slots waits in
IDLE, TOKEN, LENGTH, STOP = range(
    4
)  # an event's flag: none, a token, the last by max_tokens, a stop id


class SlotState(NamedTuple):
    """What decoding a request needs, beside its keys and values. Arrays lead with slots or places."""

    request: jax.Array  # its id, or NO_REQUEST
    active: jax.Array  # bool: it advances in this iteration (staging: always False)
    admission_order: (
        jax.Array
    )  # int32: waiting requests are admitted in this order; NOT_WAITING: not waiting
    token: jax.Array  # the last one, not yet seen by the model
    position: jax.Array  # where that token stands in the sequence
    remaining: jax.Array  # tokens that it may still emit
    stops: jax.Array  # [., E] ids that end it, padded with NO_REQUEST
    logprobs: jax.Array  # bool: it wants log-probabilities
    sampling: sampling.SamplingParams
    history: jax.Array  # [., V], see sampling.update_history


class Slots(NamedTuple):
    """The slots, or staging. Keys and values are a list of KVs [W or R, K, S, H], one a layer, or one KV [L, ...]."""

    state: SlotState
    kv: list[kv_cache.KV] | kv_cache.KV


class DecodeState(NamedTuple):
    """The whole decode state."""

    slots: Slots
    staging: Slots


class Events(NamedTuple):
    """What happened: [K, W] for a chunk, [P] for a prefill."""

    request: jax.Array
    token: jax.Array
    flag: jax.Array  # IDLE, TOKEN, LENGTH or STOP
    logprob: jax.Array  # float32, the model's own; 0 where empty_slots asked
    top_ids: jax.Array  # [..., E]
    top_logprobs: jax.Array


class Prompts(NamedTuple):
    """Pieces of P prompts for one prefill call, NumPy or device arrays."""

    tokens: jax.Array  # [P, T]: this piece
    start: jax.Array  # where in its prompt the piece starts
    length: jax.Array  # tokens in it that count
    staging_index: jax.Array  # in staging; R: this row is padding
    last: jax.Array  # bool: the prompt ends with this piece
    prompt: (
        jax.Array
    )  # [P, C]: the whole prompt (read where `last`), padded with ids that do not exist
    state: (
        SlotState  # of the request; token, position, history and active are made here
    )


class DecodeSpec(NamedTuple):
    """What the compiled functions of one engine share; hashable, so that engines alike share them."""

    config: object  # config.Model
    mesh: object
    vocabulary: int  # ids below it may be sampled
    entries: tuple[int, int]  # most stop ids, most biased ids of a request
    max_logprobs: int  # most alternatives whose log-probability is emitted
    kv_dtype: str
    unroll_layers: bool
    fixed_trip_count: (
        bool  # trip counts known beforehand, masks instead of branches (GPU; see below)
    )
    reduction: object = "psum"  # see model.hidden


# XLA runs a loop of unknown trip count, and a branch, wholly on the device on TPU and CPU; on GPU it copies the
# predicate to the host in every iteration and waits for it. `fixed` programs have neither: K iterations always run,
# and every iteration tries to admit ADMISSIONS_PER_STEP requests, with writes that fall outside where there is nothing to do.
ADMISSIONS_PER_STEP = 2


# ---------------------------------------------------------------- the state


def empty_slots(count, spec):
    """A `SlotState` [count] that belongs to no request."""
    zeros = functools.partial(jnp.zeros, count)
    stop_ids, biases = spec.entries
    ones = lambda: jnp.ones(count, jnp.float32)
    params = sampling.SamplingParams(
        zeros(),
        zeros(jnp.int32),
        ones(),
        zeros(),
        ones(),
        zeros(),
        zeros(),
        zeros(jnp.uint32),
        jnp.zeros((count, biases), jnp.int32),
        jnp.zeros((count, biases)),
    )
    return SlotState(
        request=jnp.full(count, NO_REQUEST, jnp.int32),
        active=zeros(bool),
        admission_order=jnp.full(count, NOT_WAITING, jnp.int32),
        token=zeros(jnp.int32),
        position=zeros(jnp.int32),
        remaining=zeros(jnp.int32),
        stops=jnp.full((count, stop_ids), NO_REQUEST, jnp.int32),
        logprobs=zeros(bool),
        sampling=params,
        history=jnp.zeros((count, spec.config.vocab_size), jnp.int32),
    )


def _kv_specs(spec):
    layer = P(*sharding.CACHE[1:])
    return [layer] * spec.config.layers if spec.unroll_layers else sharding.CACHE


def _rows_specs(spec):
    return Slots(P(), _kv_specs(spec))


def _specs(spec):
    return DecodeState(_rows_specs(spec), _rows_specs(spec))


def empty(spec, width, places, length):
    """A DecodeState of `width` slots and `places` places for requests of `length` tokens."""
    return _make_empty(spec, width, places, length)()


@functools.lru_cache(maxsize=256)
def _make_empty(spec, width, places, length):
    config = spec.config

    def rows(count):
        shape = count, config.kv_heads, length, config.head_dim
        layers = config.layers
        return Slots(
            empty_slots(count, spec),
            [kv_cache.empty(shape, spec.kv_dtype) for _ in range(layers)]
            if spec.unroll_layers
            else kv_cache.empty((layers, *shape), spec.kv_dtype),
        )

    shapes = lambda: jax.tree.map(
        lambda x: lax.convert_element_type(x, x.dtype),
        DecodeState(rows(width), rows(places)),
    )
    specs = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec, part),
        _specs(spec),
        jax.eval_shape(shapes),
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.jit(shapes, out_shardings=sharding.named_shardings(spec.mesh, specs))


def _compiled(function, spec, in_specs, out_specs, donate=None, workload="decode"):
    """`function` on local shards, jitted over the mesh, with argument `donate` donated; workload: see targets."""
    # What comes out goes in again. Without its sharding XLA names an equal one otherwise, and a weak type is another
    # type: either would be compiled for again.
    strong = lambda *arguments: jax.tree.map(
        lambda x: lax.convert_element_type(x, x.dtype), function(*arguments)
    )
    return jax.jit(
        sharding.shard_map(strong, spec.mesh, in_specs, out_specs),
        donate_argnums=donate,
        out_shardings=sharding.named_shardings(spec.mesh, out_specs),
        compiler_options=xla_options.options(spec.mesh, workload),
    )


def _arrange(spec, model):
    cast = lambda role, x: x if role == "norm" else x.astype(spec.config.dtype)
    model = jax.tree.map(cast, sharding.parameter_roles(model), model)
    return transformer.unstack(model) if spec.unroll_layers else model


def _weights_specs(spec):
    shapes = lambda: _arrange(spec, transformer.init(spec.config, jax.random.key(0)))
    return sharding.parameter_specs(jax.eval_shape(shapes))


@functools.lru_cache(maxsize=32)
def _make_arrange(spec):
    return jax.jit(
        functools.partial(_arrange, spec),
        out_shardings=sharding.named_shardings(spec.mesh, _weights_specs(spec)),
    )


def place_weights(spec, model):
    """`model` (a Transformer on the mesh) as the programs take it.

    A decode step costs what reading its weights costs: a cast in it would read twice as much, and a scan over stacked
    layers copies each layer's out of the stack on GPUs (`unstack`).
    """
    return _make_arrange(spec)(model)


# ---------------------------------------------------------------- one iteration


def admit(state):
    """The state after the waiting request whose turn it is has moved to the first free slot, if there are both."""
    (slots, slots_kv), (staging, staging_kv) = state.slots, state.staging
    place, slot = jnp.argmin(staging.admission_order), jnp.argmin(slots.active)
    moves = (staging.admission_order[place] < NOT_WAITING) & ~slots.active[slot]
    to = jnp.where(
        moves, slot, slots.active.size
    )  # where nothing moves, writes fall outside and are dropped
    leaves = jnp.where(moves, place, staging.admission_order.size)
    copy = lambda kept, source: kept.at[to].set(source[place], mode="drop")
    copy_kv = lambda kept, source: (
        copy(kept, source) if kept.ndim == 4 else jax.vmap(copy)(kept, source)
    )
    slots = jax.tree.map(copy, slots, staging)
    slots = slots._replace(active=slots.active.at[to].set(True, mode="drop"))
    staging = staging._replace(
        admission_order=staging.admission_order.at[leaves].set(
            NOT_WAITING, mode="drop"
        ),
        request=staging.request.at[leaves].set(NO_REQUEST, mode="drop"),
    )
    return DecodeState(
        Slots(slots, jax.tree.map(copy_kv, slots_kv, staging_kv)),
        Slots(staging, staging_kv),
    )


def any_waiting(state):
    return state.staging.state.admission_order.min() < NOT_WAITING


def admit_all(spec, state):
    """Admits as long as a slot is free and somebody waits (`fixed`: tries ADMISSIONS_PER_STEP times)."""
    if spec.fixed_trip_count:
        for _ in range(
            min(ADMISSIONS_PER_STEP, state.staging.state.admission_order.size)
        ):
            state = admit(state)
        return state
    return lax.while_loop(
        lambda state: any_waiting(state) & ~state.slots.state.active.all(), admit, state
    )


def no_events(spec, *shape):
    """Events in which nothing happens."""
    ids, top = jnp.zeros(shape, jnp.int32), (*shape, spec.max_logprobs)
    return Events(
        ids + NO_REQUEST,
        ids,
        ids,
        jnp.zeros(shape),
        jnp.zeros(top, jnp.int32),
        jnp.zeros(top),
    )


def next_tokens(spec, logits_BV, rows_B, position_B, asked_B):
    """Samples for rows whose logits are known. Returns (events [B], rows after it); the token will stand at `position`.

    `asked`: of which rows the result counts.
    """
    maybe = sampling.run_always if spec.fixed_trip_count else sampling.run_if
    token_B = sampling.sample_tokens(
        logits_BV, rows_B.sampling, rows_B.history, position_B, spec.vocabulary, maybe
    )
    wanted_B = rows_B.logprobs & asked_B
    logprob_B, top_ids_BE, top_BE = maybe(
        wanted_B.any(),
        lambda _: sampling.log_probabilities(
            logits_BV, token_B, spec.max_logprobs, spec.vocabulary
        ),
        tuple(no_events(spec, token_B.size)[3:]),
    )
    stops_B = (rows_B.stops == token_B[:, None]).any(axis=1)
    remaining_B = rows_B.remaining - 1
    flag_B = jnp.where(
        asked_B,
        jnp.where(stops_B, STOP, jnp.where(remaining_B <= 0, LENGTH, TOKEN)),
        IDLE,
    )
    events = Events(
        jnp.where(asked_B, rows_B.request, NO_REQUEST),
        token_B,
        flag_B,
        jnp.where(wanted_B, logprob_B, 0),
        top_ids_BE,
        top_BE,
    )
    return events, rows_B._replace(
        token=token_B,
        position=position_B,
        remaining=remaining_B,
        history=sampling.update_history(rows_B.history, token_B, asked_B),
    )


def iterate(spec, weights, state):
    """One iteration: (state, events [W])."""
    state = admit_all(spec, state)
    slots, slots_kv = state.slots
    x_W1D, slots_kv = transformer.hidden(
        weights,
        spec.config,
        slots.token[:, None],
        slots.position[:, None],
        cache=slots_kv,
        reduction=spec.reduction,
    )
    logits_WV = sharding.gather_vocabulary(
        transformer.logits(weights, spec.config, x_W1D)
    )[:, 0]
    events, slots = next_tokens(
        spec, logits_WV, slots, slots.position + 1, slots.active
    )
    goes_on_W = events.flag == TOKEN
    slots = slots._replace(
        active=goes_on_W, request=jnp.where(goes_on_W, slots.request, NO_REQUEST)
    )
    return state._replace(slots=Slots(slots, slots_kv)), events


# ---------------------------------------------------------------- the programs


@functools.lru_cache(maxsize=32)
def make_chunk(spec, iterations):
    """(weights, state, cancelled [C] request ids, steps) -> (state, events [K, W], waiting [R] request ids), compiled.

    `steps` (traced, up to K = `iterations`) bounds the iterations that run; a loop that is not `fixed` ends before that
    when nothing is active and nothing waits. `state` is donated.
    """

    def local(weights, state, cancelled_C, steps):
        state = cancel(state, cancelled_C)
        blank = no_events(spec, iterations, state.slots.state.active.size)

        def step(i, state, events):
            state, new = iterate(spec, weights, state)
            return state, jax.tree.map(
                lambda kept, x: lax.dynamic_update_index_in_dim(kept, x, i, 0),
                events,
                new,
            )

        if spec.fixed_trip_count:
            state, events = lax.fori_loop(
                0, iterations, lambda i, carry: step(i, *carry), (state, blank)
            )
        else:
            more = lambda carry: (
                (carry[0] < steps)
                & (carry[1].slots.state.active.any() | any_waiting(carry[1]))
            )
            _, state, events = lax.while_loop(
                more,
                lambda carry: (carry[0] + 1, *step(*carry)),
                (jnp.int32(0), state, blank),
            )
        return state, events, state.staging.state.request

    return _compiled(
        local,
        spec,
        (_weights_specs(spec), _specs(spec), P(), P()),
        (_specs(spec), P(), P()),
        donate=1,
    )


def cancel(state, cancelled_C):
    """The state without these requests, wherever they are."""

    def without(rows, **emptied):
        gone = (rows.state.request[:, None] == cancelled_C).any(axis=1) & (
            rows.state.request != NO_REQUEST
        )
        empty = {
            name: jnp.where(gone, value, getattr(rows.state, name))
            for name, value in emptied.items()
        }
        return rows._replace(state=rows.state._replace(**empty))

    return DecodeState(
        without(state.slots, active=False, request=NO_REQUEST),
        without(state.staging, admission_order=NOT_WAITING, request=NO_REQUEST),
    )


@functools.lru_cache(maxsize=32)
def make_prefill(spec):
    """(weights, staging, Prompts) -> (staging, events [P]), compiled: computes prompts into staging, P in one call.

    A piece attends to what earlier pieces, or a shared prefix, left in its place. With a prompt's last piece its first
    token is sampled and emitted, and the request waits from then on. `staging` is donated. The prompts' padded width C
    is how much of the cache the pieces see: they must lie within it.
    """

    def local(weights, staging, prompts):
        count, T = prompts.tokens.shape
        C, R = prompts.prompt.shape[1], staging.state.admission_order.size
        at = lambda x, rows: (
            *(slice(None),) * (x.ndim - 4),
            rows,
            slice(None),
            slice(C),
        )  # of [.., R, K, S, H]
        rows_kv = jax.tree.map(
            lambda x: x[at(x, prompts.staging_index.clip(0, R - 1))], staging.kv
        )
        positions_PT = prompts.start[:, None] + jnp.arange(T)
        last_P1 = (prompts.length - 1).clip(0)[:, None]
        x_P1D, rows_kv = transformer.hidden(
            weights,
            spec.config,
            prompts.tokens,
            positions_PT,
            cache=rows_kv,
            read_BR=last_P1,
            reduction=spec.reduction,
        )
        kv = jax.tree.map(
            lambda kept, x: kept.at[at(kept, prompts.staging_index)].set(
                x, mode="drop"
            ),
            staging.kv,
            rows_kv,
        )
        logits_PV = sharding.gather_vocabulary(
            transformer.logits(weights, spec.config, x_P1D)
        )[:, 0]
        row = prompts.state._replace(
            history=sampling.prompt_history(prompts.prompt, spec.config.vocab_size)
        )
        events, row = next_tokens(
            spec, logits_PV, row, prompts.start + prompts.length, prompts.last
        )
        place_P = jnp.where(
            events.flag == TOKEN, prompts.staging_index, R
        )  # a request that is done already never waits
        return Slots(
            jax.tree.map(
                lambda kept, x: kept.at[place_P].set(x, mode="drop"), staging.state, row
            ),
            kv,
        ), events

    return _compiled(
        local,
        spec,
        (_weights_specs(spec), _rows_specs(spec), P()),
        (_rows_specs(spec), P()),
        donate=1,
        workload="prefill",
    )


@functools.lru_cache(maxsize=32)
def make_read_block(spec, size):
    """(staging, place, start) -> the keys and values of `size` tokens of a place, compiled."""

    def local(staging, place, start):
        return jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(
                lax.dynamic_slice_in_dim(x, place, 1, x.ndim - 4),
                start,
                size,
                x.ndim - 2,
            ),
            staging.kv,
        )

    return _compiled(local, spec, (_rows_specs(spec), P(), P()), _kv_specs(spec))


@functools.lru_cache(maxsize=32)
def make_write_block(spec):
    """(staging, place, start, block) -> staging with what `make_read_block` read put there, compiled; donated."""

    def local(staging, place, start, block):
        def put(kept, x):
            at = [0] * kept.ndim
            at[-4], at[-2] = place, start
            return lax.dynamic_update_slice(kept, x, at)

        return staging._replace(kv=jax.tree.map(put, staging.kv, block))

    in_specs = _rows_specs(spec), P(), P(), _kv_specs(spec)
    return _compiled(local, spec, in_specs, _rows_specs(spec), donate=0)


# ---------------------------------------------------------------- the compiled shape follows what is live


def shuffle(live_W, width):
    """Flover's memory shuffle: which slots [width] a state of another width takes, with the fewest moves.

    Of all windows of `width` slots the leftmost that holds the most live ones is kept, and the live ones outside move
    into its holes in ascending order. When widening, slots stay and new ones are W, which no slot is.
    """
    W = live_W.size
    if width >= W:
        return jnp.minimum(jnp.arange(width), W)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(live_W)])
    window = jnp.argmax(before[width:] - before[: W - width + 1]) + jnp.arange(width)
    outside_W = live_W.at[window].set(False)
    movers_W = jnp.argsort(
        ~outside_W, stable=True
    )  # live slots outside the window, ascending, come first
    hole = ~live_W[window]
    nth = jnp.cumsum(hole) - 1
    return jnp.where(hole & (nth < outside_W.sum()), movers_W[nth.clip(0)], window)


@functools.partial(jax.jit, static_argnames="width")
def _reshape_rows(slots, width):
    plan = shuffle(slots.active, width)
    fresh = lambda x, value: jnp.where(plan < slots.active.size, x, value)
    taken = jax.tree.map(lambda x: jnp.take(x, plan, axis=0, mode="clip"), slots)
    return plan, taken._replace(
        active=fresh(taken.active, False), request=fresh(taken.request, NO_REQUEST)
    )


@functools.lru_cache(maxsize=256)
def _take(sharding, length):
    """(keys or values [..., B, K, S, H], rows or None) -> those rows, `length` of their tokens; compiled."""

    def take(x, rows):
        if rows is not None:
            x = jnp.take(x, rows, axis=x.ndim - 4, mode="clip")
        surplus = x.shape[-2] - length
        return (
            x[..., :length, :]
            if surplus >= 0
            else jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -surplus), (0, 0)])
        )

    return jax.jit(take, out_shardings=sharding)


def reshape(state, width, length):
    """The state with `width` slots of `length` tokens. What is live must fit, or it is lost.

    Keys and values move array by array, and each old one is dropped on the way, so that little exists twice.
    """
    row, plan = state.slots.state, None
    if width != row.active.size:
        plan, row = _reshape_rows(row, width)

    def move(tree, rows):
        leaves, shape = jax.tree.flatten(tree)
        for i, leaf in enumerate(leaves):
            if rows is not None or length != leaf.shape[-2]:
                leaves[i] = _take(leaf.sharding, length)(leaf, rows)
                leaf.delete()
        return jax.tree.unflatten(shape, leaves)

    return DecodeState(
        Slots(row, move(state.slots.kv, plan)),
        Slots(state.staging.state, move(state.staging.kv, None)),
    )
