"""Decides what one step of the engine does, from counts alone: no device, no requests.

    queued -> prefilling -> staged -> decoding -> done

A request is *queued* on the host, *prefilling* while the device computes its prompt in
staging, *staged* while it waits there for a slot, and *decoding* in a slot. The host
reads a chunk's events after it has started the next chunk, so a staged request may
decode already; it counts as staged until the host has read that it left staging.

`Engine(scheduler=...)` takes any function like `plan_step`.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ladder_jax.serve.buckets import round_up


class Phase(enum.Enum):
    """Where a request is, in the order in which it passes through."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    STAGED = "staged"
    DECODING = "decoding"
    DONE = "done"


class Work(NamedTuple):
    """The size and the progress of one request, in tokens."""

    prompt: int
    max_tokens: int
    computed: int = 0  # prompt tokens whose keys and values are in staging
    emitted: int = 0  # output tokens that the host has read
    unread_steps: int = 0  # iterations of unread chunks that may have advanced it
    submitted: float = 0.0  # seconds, of time.perf_counter


@dataclass(frozen=True)
class Limits:
    """What an engine is compiled and configured for; see config.Decode and Capacity."""

    slots: int
    steps_per_call: int
    prefill_budget: int  # tokens of one prefill call, and of all between two chunks
    widths: Sequence[int]  # compiled numbers of slots, ascending
    lengths: Sequence[int]  # compiled numbers of tokens of a row, ascending
    chunk_sizes: Sequence[int]  # compiled numbers of iterations, ascending
    fit_shapes: bool  # whether width and length follow the load
    fixed_trip_count: bool  # a chunk always runs all iterations it is compiled for
    patience: (
        int  # steps that a smaller shape must suffice for before the state shrinks
    )


@dataclass(frozen=True)
class Load:
    """What there is to do when a step begins, or after a prefill call of it."""

    queued: int = 0  # requests that wait on the host
    candidates: tuple[Work, ...] = ()  # the next of them, as many as staging has room
    prefilling: tuple[Work, ...] = ()
    staged: tuple[Work, ...] = ()
    decoding: tuple[Work, ...] = ()
    cancelled: int = 0  # requests that the next chunk must take off the device
    unread_chunks: int = 0
    unread_prefills: int = 0  # prefill calls whose events no chunk has brought along
    prefill_spent: int = 0  # tokens computed by this step's prefill calls so far
    width: int = 1  # of the decode state, slots
    length: int = 1  # of the decode state, tokens
    smaller_steps: int = (
        0  # steps in a row that a smaller shape would have sufficed for
    )

    @property
    def on_device(self) -> tuple[Work, ...]:
        """Requests that the device works on."""
        return self.prefilling + self.staged + self.decoding


class Step(NamedTuple):
    """What a step does: admits, gives the state a shape, prefills, starts a chunk."""

    admit: int  # the first `admit` candidates get a place in staging
    width: int  # shape of the decode state, slots
    length: int  # and tokens
    smaller_steps: int  # for the next step's Load
    prefill_budget: int  # tokens of the next prefill call; 0: the chunk comes next
    steps: int  # iterations of the next chunk; 0: no chunk


Scheduler = Callable[[Load, Limits], Step]


def plan_step(load: Load, limits: Limits) -> Step:
    """Plans the step for a load, as if every candidate could be admitted.

    The engine plans once at the beginning of a step, and again after the admission and
    after every prefill call, then without candidates, until `prefill_budget` is 0.
    """
    width, length, smaller_steps = fit_shape(load, limits)
    admitted = len(load.candidates)
    return Step(
        admit=admitted,
        width=width,
        length=length,
        smaller_steps=smaller_steps,
        prefill_budget=next_prefill_budget(load, limits),
        steps=next_chunk_steps(load, limits),
    )


# ---------------------------------------------------------------- shape


def fit_shape(load: Load, limits: Limits) -> tuple[int, int, int]:
    """Returns (width, length, smaller_steps): the shape that the next chunk needs.

    It grows at once. It shrinks when no request is on the device, or when a smaller
    shape has sufficed for more than `patience` steps.
    """
    works = load.on_device + load.candidates
    # An upper bound: some may have finished in chunks that the host has not read.
    count = len(works) + load.cancelled
    if not limits.fit_shapes or not count:
        return load.width, load.length, load.smaller_steps
    steps = limits.steps_per_call * (load.unread_chunks + 1)
    longest = max((reach(work, steps) for work in works), default=0)
    width = round_up(limits.widths, min(count, limits.slots))
    length = round_up(limits.lengths, longest)
    grown = max(width, load.width), max(length, load.length)
    smaller_steps = load.smaller_steps + 1 if (width, length) != grown else 0
    idle = not load.on_device and not load.cancelled
    if idle or smaller_steps > limits.patience:
        return width, length, 0
    return *grown, smaller_steps


def reach(work: Work, steps: int) -> int:
    """Returns how many tokens a request can have after so many more iterations."""
    first_token = 1  # by prefill, not by an iteration
    return work.prompt + min(work.max_tokens, work.emitted + steps + first_token)


# ---------------------------------------------------------------- prefill


def next_prefill_budget(load: Load, limits: Limits) -> int:
    """Returns how many prompt tokens, padding included, the next call may compute."""
    if not load.prefilling and not load.candidates:
        return 0
    if not load.staged and not load.decoding:  # no request waits for a chunk
        return limits.prefill_budget
    if enough_staged(load, limits):
        return 0
    return max(limits.prefill_budget - load.prefill_spent, 0)


def enough_staged(load: Load, limits: Limits) -> bool:
    """Whether prefill can wait, so that more prompts share a call.

    It can if staging holds a request for every free slot, for every slot whose request
    runs out of tokens within the unread chunks and the next one, and for at least a
    quarter of all slots, since a stop can end a request at any time.
    """
    steps = limits.steps_per_call * (load.unread_chunks + 1)
    works = load.on_device + load.candidates
    ending = sum(work.max_tokens - work.emitted <= steps for work in works)
    free_slots = max(limits.slots - len(load.decoding), 0)
    quarter = -(-limits.slots // 4)
    return len(load.staged) - free_slots >= max(ending, quarter)


# ---------------------------------------------------------------- chunk


def next_chunk_steps(load: Load, limits: Limits) -> int:
    """Returns the iterations of the next chunk, 0 if there is nothing for it to do.

    It has no more iterations than tokens are left to emit. It has fewer in proportion
    to the empty slots that the next prefill call could fill, so that this call comes
    soon.
    """
    left = tokens_left(load)
    if not (left or load.cancelled or load.unread_prefills):
        return 0
    holders = len(load.staged) + len(load.decoding)
    nearly_prefilled = sum(
        work.prompt - work.computed <= limits.prefill_budget
        for work in load.prefilling + load.candidates
    )
    queued = load.queued - len(load.candidates)
    fillable = min(nearly_prefilled + queued, max(limits.slots - holders, 0))
    share = limits.steps_per_call * holders // max(holders + fillable, 1)
    steps = max(min(share, left), 1)
    return round_up(limits.chunk_sizes, steps) if limits.fixed_trip_count else steps


def tokens_left(load: Load) -> int:
    """Returns the most tokens that one request has left to decode after all chunks.

    "After all chunks" means after those that the host has started. A staged request
    counts as not advanced by them if not all requests fit into the slots.
    """
    crowded = len(load.staged) + len(load.decoding) > load.width

    def left(work: Work, unread_steps: int) -> int:
        emitted = max(work.emitted, 1)  # the first token comes with prefill
        return work.max_tokens - emitted - unread_steps

    staged = [left(work, 0 if crowded else work.unread_steps) for work in load.staged]
    decoding = [left(work, work.unread_steps) for work in load.decoding]
    return max([0, *staged, *decoding])
