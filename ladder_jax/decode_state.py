"""What the decode programs keep on the device: the state, its types and its specs.

W slots, R staging rows, P prompts, T prompt tokens, C prompt width, S cache length,
V vocabulary, E entries of a list, K iterations, D drafted tokens. In the shape of a
cache: L layers, K key-value heads, H head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ladder_jax import kv_cache, pages, sampling, sharding, speculation
from ladder_jax.config import Model
from ladder_jax.sampling import Array

NO_REQUEST = -1  # the request id of an empty slot
NOT_WAITING = 2**31 - 1  # the admission order of an empty row of staging

# Flags of an event: no token, a token, the last one that max_tokens allows, a stop id.
# PREEMPTED carries no token: the request has lost its slot and its pages.
IDLE, TOKEN, LENGTH, STOP, PREEMPTED = range(5)


# ---------------------------------------------------------------- types


class SlotState(NamedTuple):
    """Everything that the device needs to decode requests, without keys and values.

    The first dimension of every array is that of the slots, or of the staging rows. The
    host builds the arrays of a new request with NumPy.
    """

    request: Array  # int32: the request's id, or NO_REQUEST
    active: Array  # bool: the request advances in this iteration (staging: False)
    admission_order: Array  # int32: the lowest one is admitted first; or NOT_WAITING
    token: Array  # int32: the last token, which the model has not seen yet
    position: Array  # int32: the index of that token in its sequence
    remaining: Array  # int32: how many tokens it may still emit
    required: Array  # int32: how many of its next tokens are no stop ids
    stops: Array  # int32 [., E]: ids that end it, padded with NO_REQUEST
    logprobs: Array  # bool: its events carry log-probabilities
    sampling: sampling.SamplingParams
    history: Array  # int32 [., V], see sampling.update_history
    table: Array  # int32 [., M]: its pages, see pages.py; M is 0 if it has a row
    drafting: speculation.Drafting | None = None  # None without decode.speculate


class Slots(NamedTuple):
    """The rows of all slots, or all rows of staging.

    Keys and values are a list of KVs [W or R, K, S, H], one a layer, if the layers are
    unrolled; else one KV [L, W or R, K, S, H]. With pages they are None, as all rows
    share a pool; calls that take one `Slots` alone get it with the pool.
    """

    state: SlotState
    kv: Any


class DecodeState(NamedTuple):
    """All that a decode program keeps on the device from call to call.

    pool: the pages of slots and staging; None if each row has its own array.
    """

    slots: Slots
    staging: Slots
    pool: pages.Pool | None

    def shared_staging(self) -> Slots:
        """Returns staging, with the pool if there is one."""
        if self.pool is None:
            return self.staging
        return Slots(self.staging.state, self.pool)

    def with_staging(self, staging: Slots) -> "DecodeState":
        """Returns the state with another `shared_staging`."""
        if self.pool is None:
            return self._replace(staging=staging)
        return self._replace(staging=Slots(staging.state, None), pool=staging.kv)


class Events(NamedTuple):
    """The events of the rows: arrays [K, W] of a chunk, [P] of a prefill call.

    With decode.speculate they are [K (1 + D), W]: 1 + D rows for each iteration. A slot
    that emits fewer tokens is IDLE in the last ones.
    """

    request: Array  # int32: a request id, or NO_REQUEST
    token: Array  # int32
    flag: Array  # int32: IDLE, TOKEN, LENGTH or STOP
    logprob: Array  # float32, before any sampling rule; 0 if not requested
    top_ids: Array  # int32 [..., E]: the likeliest ids
    top_logprobs: Array  # float32 [..., E]: their log-probabilities
    # int32: the drafted tokens of the iteration, in its first row; None without drafts
    drafted: Array | None = None


class Prompts(NamedTuple):
    """Pieces of P prompts for one prefill call, NumPy or device arrays."""

    tokens: Array  # int32 [P, T]: the piece, padded
    start: Array  # int32: where in its prompt the piece starts
    length: Array  # int32: tokens of the piece without padding
    staging_index: Array  # int32: its row of staging; R: this row is padding
    last: Array  # bool: the prompt ends with this piece
    # int32 [P, C]: the beginning of the prompt, padded with ids outside the vocabulary.
    # With `last`, it is the whole prompt.
    prompt: Array
    # The requests' states. Prefill sets token, position, history and active.
    state: SlotState
    # int32: tokens of the whole prompt. With its first piece it gets pages for all.
    size: Array
    # int32: how many of them, at its end, the request has generated itself, before it
    # lost its slot.
    generated: Array


class DecodeSpec(NamedTuple):
    """Everything, except array shapes, that an engine's compiled programs depend on.

    It is hashable: engines with equal specs share their compiled programs.
    """

    model_config: Model
    mesh: Mesh
    vocabulary: int  # only ids below it are sampled
    max_stop_ids: int  # stop ids that a request may have
    max_logit_bias: int  # ids that a request may bias
    max_logprobs: int  # likeliest ids that an event has room for
    kv_dtype: str  # one of kv_cache.DTYPES
    unroll_layers: bool  # one array a layer, not a stack of all layers
    fixed_trip_count: bool  # no branches, see ADMISSIONS_PER_STEP
    reduction: Any = "psum"  # see model.hidden
    page_size: int = 0  # tokens of a page; 0: each row has an array of its own
    page_kernel: str = "xla"  # of attention to pages, see page_kernels.kernel_for
    weights_dtype: str = "auto"  # see quantised.py; auto: the model's dtype
    speculate: int = 0  # D, the most drafted tokens, see speculation.py
    balance: int = speculation.BALANCE_ACCELERATOR  # it decides when drafts pay

    @property
    def most_tokens(self) -> int:
        """The most tokens that an iteration emits for a request."""
        return 1 + self.speculate


# ---------------------------------------------------------------- the state


def empty_slots(count: int, spec: DecodeSpec, length: int = 0) -> SlotState:
    """Returns a `SlotState` of `count` rows that belong to no request.

    length: the most tokens of a row.
    """
    zeros = functools.partial(jnp.zeros, count)
    return SlotState(
        request=jnp.full(count, NO_REQUEST, jnp.int32),
        active=zeros(bool),
        admission_order=jnp.full(count, NOT_WAITING, jnp.int32),
        token=zeros(jnp.int32),
        position=zeros(jnp.int32),
        remaining=zeros(jnp.int32),
        required=zeros(jnp.int32),
        stops=jnp.full((count, spec.max_stop_ids), NO_REQUEST, jnp.int32),
        logprobs=zeros(bool),
        sampling=sampling.neutral_params(count, spec.max_logit_bias),
        history=jnp.zeros((count, spec.model_config.vocab_size), jnp.int32),
        table=jnp.full((count, table_size(spec, length)), pages.NO_PAGE, jnp.int32),
        drafting=speculation.empty(count, length) if spec.speculate else None,
    )


def table_size(spec: DecodeSpec, length: int) -> int:
    """Returns how many pages a request of so many tokens has, at the most."""
    return -(-length // spec.page_size) if spec.page_size else 0


def kv_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of `Slots.kv`."""
    cache = sharding.CACHE
    if spec.page_size:
        is_joint = spec.page_kernel == "ragged"
        cache = sharding.JOINT_PAGES if is_joint else sharding.PAGES
    if not spec.unroll_layers:
        return cache
    return [P(*cache[1:])] * spec.model_config.layers


def slots_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of `Slots`: only keys and values are sharded.

    With pages, `Slots` has the pool.
    """
    kv = kv_specs(spec)
    if spec.page_size:
        kv = pages.Pool(kv, P())  # type: ignore[arg-type]  # specs for arrays
    return Slots(P(), kv)  # type: ignore[arg-type]


def state_specs(spec: DecodeSpec) -> Any:
    """Returns the PartitionSpecs of a `DecodeState`."""
    rows = slots_specs(spec)
    if not spec.page_size:
        return DecodeState(rows, rows, None)
    without_kv = rows._replace(kv=None)
    return DecodeState(without_kv, without_kv, rows.kv)


def empty(
    spec: DecodeSpec, width: int, staging_size: int, length: int, page_count: int = 0
) -> DecodeState:
    """Allocates a DecodeState without requests.

    Args:
      width: W, the number of slots.
      staging_size: R, the number of rows of staging.
      length: S, the tokens that each row's keys and values have room for.
      page_count: the pages of all rows, if the spec has pages.
    """
    return _make_empty(spec, width, staging_size, length, page_count)()


def abstract(
    spec: DecodeSpec, width: int, staging_size: int, length: int, page_count: int = 0
) -> DecodeState:
    """Returns the same state as shapes with shardings; nothing is allocated."""
    return jax.eval_shape(_make_empty(spec, width, staging_size, length, page_count))


@functools.lru_cache(maxsize=256)
def _make_empty(
    spec: DecodeSpec, width: int, staging_size: int, length: int, page_count: int
) -> Callable[[], DecodeState]:
    """Jits the function without arguments that allocates the state."""
    model_config = spec.model_config
    layers, heads = model_config.layers, model_config.kv_heads

    def empty_kv(make_layer: Callable[[], Any]) -> Any:
        if spec.unroll_layers:
            return [make_layer() for _ in range(layers)]
        one = jax.eval_shape(make_layer)
        return jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), one)

    def empty_rows(count: int) -> Slots:
        shape = count, heads, length, model_config.head_dim
        make_layer = functools.partial(kv_cache.empty, shape, spec.kv_dtype)
        kv = None if spec.page_size else empty_kv(make_layer)
        return Slots(empty_slots(count, spec, length), kv)

    def build() -> DecodeState:
        pool = None
        if spec.page_size:
            make_layer = functools.partial(
                pages.empty,
                heads,
                page_count,
                spec.page_size,
                model_config.head_dim,
                spec.kv_dtype,
                spec.page_kernel,
            )
            pool = pages.Pool(empty_kv(make_layer), jnp.zeros(page_count, jnp.int32))
        state = DecodeState(empty_rows(width), empty_rows(staging_size), pool)
        return without_weak_types(state)

    def spec_of_every_array(partition: P, subtree: Any) -> Any:
        return jax.tree.map(lambda _: partition, subtree)

    # `state_specs` has one PartitionSpec for a whole subtree. jit wants one per array.
    specs = jax.tree.map(
        spec_of_every_array,
        state_specs(spec),
        jax.eval_shape(build),
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.jit(build, out_shardings=sharding.named_shardings(spec.mesh, specs))


def without_weak_types(tree: Any) -> Any:
    """Returns the arrays of a tree with the same dtypes, none of them weakly typed."""
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), tree)
