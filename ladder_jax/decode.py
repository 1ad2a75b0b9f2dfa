"""Temporal fusion: requests of any age advance together, one token an iteration, inside one jitted loop.

On the device a request is one *row*: its keys and values and a `Row` of what decoding it needs. A row lives in one of W
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

NOBODY = -1                                # in place of a request's id
NEVER = 2**31 - 1                          # the turn of a place that nobody waits in
IDLE, TOKEN, LENGTH, STOP = range(4)       # an event's flag: none, a token, the last by max_tokens, a stop id


class Row(NamedTuple):
    """What decoding a request needs, beside its keys and values. Arrays lead with slots or places."""
    request: jax.Array          # its id, or NOBODY
    active: jax.Array           # bool: it advances in this iteration (staging: always False)
    turn: jax.Array             # int32: waiting requests are admitted in this order; NEVER: not waiting
    token: jax.Array            # the last one, not yet seen by the model
    position: jax.Array         # where that token stands in the sequence
    remaining: jax.Array        # tokens that it may still emit
    stops: jax.Array            # [., E] ids that end it, padded with NOBODY
    logprobs: jax.Array         # bool: it wants log-probabilities
    sampling: sampling.Params
    history: jax.Array          # [., V], see sampling.remember


class Rows(NamedTuple):
    """The slots, or staging. Keys and values are a list of KVs [W or R, K, S, H], one a layer, or one KV [L, ...]."""
    row: Row
    kv: list[kv_cache.KV] | kv_cache.KV


class State(NamedTuple):
    """The whole decode state."""
    slots: Rows
    staging: Rows


class Events(NamedTuple):
    """What happened: [K, W] for a chunk, [P] for a prefill."""
    request: jax.Array
    token: jax.Array
    flag: jax.Array             # IDLE, TOKEN, LENGTH or STOP
    logprob: jax.Array          # float32, the model's own; 0 where nobody asked
    top_ids: jax.Array          # [..., E]
    top_logprobs: jax.Array


class Prompts(NamedTuple):
    """Pieces of P prompts for one prefill call, NumPy or device arrays."""
    tokens: jax.Array           # [P, T]: this piece
    start: jax.Array            # where in its prompt the piece starts
    length: jax.Array           # tokens in it that count
    place: jax.Array            # in staging; R: this row is padding
    last: jax.Array             # bool: the prompt ends with this piece
    prompt: jax.Array           # [P, C]: the whole prompt (read where `last`), padded with ids that do not exist
    row: Row                    # of the request; token, position, history and active are made here


class Program(NamedTuple):
    """What the compiled functions of one engine share; hashable, so that engines alike share them."""
    config: object              # config.Model
    mesh: object
    vocabulary: int             # ids below it may be sampled
    entries: tuple[int, int]    # most stop ids, most biased ids of a request
    top: int                    # most alternatives whose log-probability is emitted
    kv_dtype: str
    unroll_layers: bool
    fixed: bool                 # trip counts known beforehand, masks instead of branches (GPU; see below)
    reduction: object = "psum"     # see model.hidden

# XLA runs a loop of unknown trip count, and a branch, wholly on the device on TPU and CPU; on GPU it copies the
# predicate to the host in every iteration and waits for it. `fixed` programs have neither: K iterations always run,
# and every iteration tries to admit ADMISSIONS requests, with writes that fall outside where there is nothing to do.
ADMISSIONS = 2


# ---------------------------------------------------------------- the state

def nobody(count, program):
    """A `Row` [count] that belongs to no request."""
    zeros = functools.partial(jnp.zeros, count)
    stop_ids, biases = program.entries
    ones = lambda: jnp.ones(count, jnp.float32)
    params = sampling.Params(zeros(), zeros(jnp.int32), ones(), zeros(), ones(), zeros(), zeros(), zeros(jnp.uint32),
                             jnp.zeros((count, biases), jnp.int32), jnp.zeros((count, biases)))
    return Row(request=jnp.full(count, NOBODY, jnp.int32), active=zeros(bool), turn=jnp.full(count, NEVER, jnp.int32),
               token=zeros(jnp.int32), position=zeros(jnp.int32), remaining=zeros(jnp.int32),
               stops=jnp.full((count, stop_ids), NOBODY, jnp.int32),
               logprobs=zeros(bool), sampling=params, history=jnp.zeros((count, program.config.vocab_size), jnp.int32))


def _kv_specs(program):
    layer = P(*sharding.CACHE[1:])
    return [layer] * program.config.layers if program.unroll_layers else sharding.CACHE


def _rows_specs(program):
    return Rows(P(), _kv_specs(program))


def _specs(program):
    return State(_rows_specs(program), _rows_specs(program))


def empty(program, width, places, length):
    """A State of `width` slots and `places` places for requests of `length` tokens."""
    return _make_empty(program, width, places, length)()


@functools.lru_cache(maxsize=256)
def _make_empty(program, width, places, length):
    config = program.config

    def rows(count):
        shape = count, config.kv_heads, length, config.head_dim
        layers = config.layers
        return Rows(nobody(count, program), [kv_cache.empty(shape, program.kv_dtype) for _ in range(layers)]
                    if program.unroll_layers else kv_cache.empty((layers, *shape), program.kv_dtype))

    shapes = lambda: jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), State(rows(width), rows(places)))
    specs = jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), _specs(program),
                         jax.eval_shape(shapes), is_leaf=lambda x: isinstance(x, P))
    return jax.jit(shapes, out_shardings=sharding.named(program.mesh, specs))


def _compiled(function, program, in_specs, out_specs, donate=None, workload="decode"):
    """`function` on local shards, jitted over the mesh, with argument `donate` donated; workload: see targets."""
    # What comes out goes in again. Without its sharding XLA names an equal one otherwise, and a weak type is another
    # type: either would be compiled for again.
    strong = lambda *arguments: jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), function(*arguments))
    return jax.jit(sharding.shard_map(strong, program.mesh, in_specs, out_specs), donate_argnums=donate,
                   out_shardings=sharding.named(program.mesh, out_specs),
                   compiler_options=xla_options.options(program.mesh, workload))


def _arrange(program, model):
    cast = lambda name, x: x if name.endswith("norm") else x.astype(program.config.dtype)
    model = jax.tree.map(cast, sharding.parameter_names(model), model)
    return transformer.unstack(model) if program.unroll_layers else model


def _weights_specs(program):
    shapes = lambda: _arrange(program, transformer.init(program.config, jax.random.key(0)))
    return sharding.parameter_specs(jax.eval_shape(shapes))


@functools.lru_cache(maxsize=32)
def _make_arrange(program):
    return jax.jit(functools.partial(_arrange, program),
                   out_shardings=sharding.named(program.mesh, _weights_specs(program)))


def place_weights(program, model):
    """`model` (a Transformer on the mesh) as the programs take it.

    A decode step costs what reading its weights costs: a cast in it would read twice as much, and a scan over stacked
    layers copies each layer's out of the stack on GPUs (`unstack`).
    """
    return _make_arrange(program)(model)


# ---------------------------------------------------------------- one iteration

def admit(state):
    """The state after the waiting request whose turn it is has moved to the first free slot, if there are both."""
    (slots, slots_kv), (staging, staging_kv) = state.slots, state.staging
    place, slot = jnp.argmin(staging.turn), jnp.argmin(slots.active)
    moves = (staging.turn[place] < NEVER) & ~slots.active[slot]
    to = jnp.where(moves, slot, slots.active.size)            # where nothing moves, writes fall outside and are dropped
    leaves = jnp.where(moves, place, staging.turn.size)
    copy = lambda kept, source: kept.at[to].set(source[place], mode="drop")
    copy_kv = lambda kept, source: copy(kept, source) if kept.ndim == 4 else jax.vmap(copy)(kept, source)
    slots = jax.tree.map(copy, slots, staging)
    slots = slots._replace(active=slots.active.at[to].set(True, mode="drop"))
    staging = staging._replace(turn=staging.turn.at[leaves].set(NEVER, mode="drop"),
                               request=staging.request.at[leaves].set(NOBODY, mode="drop"))
    return State(Rows(slots, jax.tree.map(copy_kv, slots_kv, staging_kv)), Rows(staging, staging_kv))


def somebody_waits(state):
    return state.staging.row.turn.min() < NEVER


def admit_all(program, state):
    """Admits as long as a slot is free and somebody waits (`fixed`: tries ADMISSIONS times)."""
    if program.fixed:
        for _ in range(min(ADMISSIONS, state.staging.row.turn.size)):
            state = admit(state)
        return state
    return lax.while_loop(lambda state: somebody_waits(state) & ~state.slots.row.active.all(), admit, state)


def no_events(program, *shape):
    """Events in which nothing happens."""
    ids, top = jnp.zeros(shape, jnp.int32), (*shape, program.top)
    return Events(ids + NOBODY, ids, ids, jnp.zeros(shape), jnp.zeros(top, jnp.int32), jnp.zeros(top))


def next_tokens(program, logits_BV, rows_B, position_B, asked_B):
    """Samples for rows whose logits are known. Returns (events [B], rows after it); the token will stand at `position`.

    `asked`: of which rows the result counts.
    """
    maybe = sampling.always if program.fixed else sampling.when
    token_B = sampling.choose(logits_BV, rows_B.sampling, rows_B.history, position_B, program.vocabulary, maybe)
    wanted_B = rows_B.logprobs & asked_B
    logprob_B, top_ids_BE, top_BE = maybe(wanted_B.any(), lambda _: sampling.log_probabilities(
        logits_BV, token_B, program.top, program.vocabulary), tuple(no_events(program, token_B.size)[3:]))
    stops_B = (rows_B.stops == token_B[:, None]).any(axis=1)
    remaining_B = rows_B.remaining - 1
    flag_B = jnp.where(asked_B, jnp.where(stops_B, STOP, jnp.where(remaining_B <= 0, LENGTH, TOKEN)), IDLE)
    events = Events(jnp.where(asked_B, rows_B.request, NOBODY), token_B, flag_B,
                    jnp.where(wanted_B, logprob_B, 0), top_ids_BE, top_BE)
    return events, rows_B._replace(
        token=token_B, position=position_B, remaining=remaining_B,
        history=sampling.remember(rows_B.history, token_B, asked_B))


def iterate(program, weights, state):
    """One iteration: (state, events [W])."""
    state = admit_all(program, state)
    slots, slots_kv = state.slots
    x_W1D, slots_kv = transformer.hidden(weights, program.config, slots.token[:, None], slots.position[:, None],
                                         cache=slots_kv, reduction=program.reduction)
    logits_WV = sharding.gather_vocabulary(transformer.logits(weights, program.config, x_W1D))[:, 0]
    events, slots = next_tokens(program, logits_WV, slots, slots.position + 1, slots.active)
    goes_on_W = events.flag == TOKEN
    slots = slots._replace(active=goes_on_W, request=jnp.where(goes_on_W, slots.request, NOBODY))
    return state._replace(slots=Rows(slots, slots_kv)), events


# ---------------------------------------------------------------- the programs

@functools.lru_cache(maxsize=32)
def make_chunk(program, iterations):
    """(weights, state, cancelled [C] request ids, steps) -> (state, events [K, W], waiting [R] request ids), compiled.

    `steps` (traced, up to K = `iterations`) bounds the iterations that run; a loop that is not `fixed` ends before that
    when nothing is active and nothing waits. `state` is donated.
    """
    def local(weights, state, cancelled_C, steps):
        state = cancel(state, cancelled_C)
        blank = no_events(program, iterations, state.slots.row.active.size)

        def step(i, state, events):
            state, new = iterate(program, weights, state)
            return state, jax.tree.map(lambda kept, x: lax.dynamic_update_index_in_dim(kept, x, i, 0), events, new)

        if program.fixed:
            state, events = lax.fori_loop(0, iterations, lambda i, carry: step(i, *carry), (state, blank))
        else:
            more = lambda carry: (carry[0] < steps) & (carry[1].slots.row.active.any() | somebody_waits(carry[1]))
            _, state, events = lax.while_loop(more, lambda carry: (carry[0] + 1, *step(*carry)),
                                              (jnp.int32(0), state, blank))
        return state, events, state.staging.row.request
    return _compiled(local, program, (_weights_specs(program), _specs(program), P(), P()),
                     (_specs(program), P(), P()), donate=1)


def cancel(state, cancelled_C):
    """The state without these requests, wherever they are."""
    def without(rows, **emptied):
        gone = (rows.row.request[:, None] == cancelled_C).any(axis=1) & (rows.row.request != NOBODY)
        empty = {name: jnp.where(gone, value, getattr(rows.row, name)) for name, value in emptied.items()}
        return rows._replace(row=rows.row._replace(**empty))
    return State(without(state.slots, active=False, request=NOBODY), without(state.staging, turn=NEVER, request=NOBODY))


@functools.lru_cache(maxsize=32)
def make_prefill(program):
    """(weights, staging, Prompts) -> (staging, events [P]), compiled: computes prompts into staging, P in one call.

    A piece attends to what earlier pieces, or a shared prefix, left in its place. With a prompt's last piece its first
    token is sampled and emitted, and the request waits from then on. `staging` is donated. The prompts' padded width C
    is how much of the cache the pieces see: they must lie within it.
    """
    def local(weights, staging, prompts):
        count, T = prompts.tokens.shape
        C, R = prompts.prompt.shape[1], staging.row.turn.size
        at = lambda x, rows: (*(slice(None),) * (x.ndim - 4), rows, slice(None), slice(C))     # of [.., R, K, S, H]
        rows_kv = jax.tree.map(lambda x: x[at(x, prompts.place.clip(0, R - 1))], staging.kv)
        positions_PT = prompts.start[:, None] + jnp.arange(T)
        last_P1 = (prompts.length - 1).clip(0)[:, None]
        x_P1D, rows_kv = transformer.hidden(weights, program.config, prompts.tokens, positions_PT, cache=rows_kv,
                                            read_BR=last_P1, reduction=program.reduction)
        kv = jax.tree.map(lambda kept, x: kept.at[at(kept, prompts.place)].set(x, mode="drop"), staging.kv, rows_kv)
        logits_PV = sharding.gather_vocabulary(transformer.logits(weights, program.config, x_P1D))[:, 0]
        row = prompts.row._replace(history=sampling.remember_prompt(prompts.prompt, program.config.vocab_size))
        events, row = next_tokens(program, logits_PV, row, prompts.start + prompts.length, prompts.last)
        place_P = jnp.where(events.flag == TOKEN, prompts.place, R)       # a request that is done already never waits
        return Rows(jax.tree.map(lambda kept, x: kept.at[place_P].set(x, mode="drop"), staging.row, row), kv), events
    return _compiled(local, program, (_weights_specs(program), _rows_specs(program), P()),
                     (_rows_specs(program), P()), donate=1, workload="prefill")


@functools.lru_cache(maxsize=32)
def make_read_block(program, size):
    """(staging, place, start) -> the keys and values of `size` tokens of a place, compiled."""
    def local(staging, place, start):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(
            lax.dynamic_slice_in_dim(x, place, 1, x.ndim - 4), start, size, x.ndim - 2), staging.kv)
    return _compiled(local, program, (_rows_specs(program), P(), P()), _kv_specs(program))


@functools.lru_cache(maxsize=32)
def make_write_block(program):
    """(staging, place, start, block) -> staging with what `make_read_block` read put there, compiled; donated."""
    def local(staging, place, start, block):
        def put(kept, x):
            at = [0] * kept.ndim
            at[-4], at[-2] = place, start
            return lax.dynamic_update_slice(kept, x, at)
        return staging._replace(kv=jax.tree.map(put, staging.kv, block))
    in_specs = _rows_specs(program), P(), P(), _kv_specs(program)
    return _compiled(local, program, in_specs, _rows_specs(program), donate=0)


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
    window = jnp.argmax(before[width:] - before[:W - width + 1]) + jnp.arange(width)
    outside_W = live_W.at[window].set(False)
    movers_W = jnp.argsort(~outside_W, stable=True)           # live slots outside the window, ascending, come first
    hole = ~live_W[window]
    nth = jnp.cumsum(hole) - 1
    return jnp.where(hole & (nth < outside_W.sum()), movers_W[nth.clip(0)], window)


@functools.partial(jax.jit, static_argnames="width")
def _reshape_rows(slots, width):
    plan = shuffle(slots.active, width)
    fresh = lambda x, value: jnp.where(plan < slots.active.size, x, value)
    taken = jax.tree.map(lambda x: jnp.take(x, plan, axis=0, mode="clip"), slots)
    return plan, taken._replace(active=fresh(taken.active, False), request=fresh(taken.request, NOBODY))


@functools.lru_cache(maxsize=256)
def _take(sharding, length):
    """(keys or values [..., B, K, S, H], rows or None) -> those rows, `length` of their tokens; compiled."""
    def take(x, rows):
        if rows is not None:
            x = jnp.take(x, rows, axis=x.ndim - 4, mode="clip")
        surplus = x.shape[-2] - length
        return x[..., :length, :] if surplus >= 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -surplus), (0, 0)])
    return jax.jit(take, out_shardings=sharding)


def reshape(state, width, length):
    """The state with `width` slots of `length` tokens. What is live must fit, or it is lost.

    Keys and values move array by array, and each old one is dropped on the way, so that little exists twice.
    """
    row, plan = state.slots.row, None
    if width != row.active.size:
        plan, row = _reshape_rows(row, width)

    def move(tree, rows):
        leaves, shape = jax.tree.flatten(tree)
        for i, leaf in enumerate(leaves):
            if rows is not None or length != leaf.shape[-2]:
                leaves[i] = _take(leaf.sharding, length)(leaf, rows)
                leaf.delete()
        return jax.tree.unflatten(shape, leaves)
    return State(Rows(row, move(state.slots.kv, plan)), Rows(state.staging.row, move(state.staging.kv, None)))
