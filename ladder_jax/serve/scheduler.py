"""Decides what one step of the engine does, from counts alone.

    queued -> prefilling -> staged -> decoding -> done

A request is *queued* on the host, *prefilling* while the device computes its prompt in
staging, *staged* while it waits there for a slot, and *decoding* in a slot. The host
reads a chunk's events after it has started the next chunk, so the device may have moved
a staged request into a slot already. The request counts as staged until the host has
read the events of that chunk.

A step of the engine is not a step of a chunk: the latter is one iteration of the decode
loop.

To schedule otherwise, give `Engine(scheduler=...)` a function like `plan_step`.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ladder_jax.serve.buckets import round_up


class Phase(enum.Enum):
    """The phases of a request, in their order."""

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
    """Limits of an engine, from config.Decode and from Capacity."""

    slots: int
    steps_per_call: int
    prefill_budget: int  # the most prompt tokens to compute between two chunks
    widths: Sequence[int]  # compiled numbers of slots, ascending
    lengths: Sequence[int]  # compiled numbers of tokens of a row, ascending
    chunk_sizes: Sequence[int]  # compiled numbers of iterations, ascending
    fit_shapes: bool  # whether width and length change with the load
    fixed_trip_count: bool  # a chunk always runs all iterations it is compiled for
    # For how many steps of the engine a smaller shape must suffice before the state
    # shrinks.
    patience: int
    tokens_per_step: int = 1  # the most tokens that a request gets in an iteration


@dataclass(frozen=True)
class Load:
    """The work of an engine when a step begins, or after a prefill call of the step."""

    queued: int = 0  # requests that wait on the host
    candidates: tuple[Work, ...] = ()  # the first of them that staging has room for
    prefilling: tuple[Work, ...] = ()
    staged: tuple[Work, ...] = ()
    decoding: tuple[Work, ...] = ()
    cancelled: int = 0  # requests that the next chunk must remove from the device
    unread_chunks: int = 0
    prefill_spent: int = 0  # tokens that this step's prefill calls have computed
    width: int = 1  # slots of the decode state
    length: int = 1  # tokens of its rows
    # How many iterations of this width fit in decode.burst_ms; None: no limit.
    fitting_steps: int | None = None
    # How many iterations hide the host's work for a chunk; None: not known.
    hiding_steps: int | None = None
    # For how many steps of the engine in a row a smaller shape would have sufficed.
    smaller_steps: int = 0

    @property
    def on_device(self) -> tuple[Work, ...]:
        """Requests that the device works on."""
        return self.prefilling + self.staged + self.decoding


class Step(NamedTuple):
    """The plan of one step of the engine."""

    admit: int  # how many candidates, from the first on, get a row of staging
    width: int  # slots of the decode state
    length: int  # tokens of its rows
    smaller_steps: int  # for the next step's Load
    prefill_budget: int  # tokens of the next prefill call; 0: the chunk comes next
    chunk_steps: int  # iterations of the next chunk; 0: no chunk


Scheduler = Callable[[Load, Limits], Step]


def plan_step(load: Load, limits: Limits) -> Step:
    """Returns the plan of a step, which admits every candidate.

    The engine calls this function when a step begins. It calls it again, without
    candidates, after the admission and after every prefill call, until
    `prefill_budget` is 0.
    """
    width, length, smaller_steps = fit_shape(load, limits)
    return Step(
        admit=len(load.candidates),
        width=width,
        length=length,
        smaller_steps=smaller_steps,
        prefill_budget=next_prefill_budget(load, limits),
        chunk_steps=next_chunk_steps(load, limits),
    )


# ---------------------------------------------------------------- shape


def fit_shape(load: Load, limits: Limits) -> tuple[int, int, int]:
    """Returns (width, length, smaller_steps) for the next chunk.

    The shape grows at once. It shrinks when no request is on the device, or when a
    smaller shape has sufficed for more than `patience` steps of the engine.
    """
    works = load.on_device + load.candidates
    # An upper bound: some requests may have ended in chunks that the host has not read.
    count = len(works) + load.cancelled
    if not limits.fit_shapes or not count:
        return load.width, load.length, load.smaller_steps
    steps = limits.steps_per_call * (load.unread_chunks + 1) * limits.tokens_per_step
    longest = max((most_tokens(work, steps) for work in works), default=0)
    width = round_up(limits.widths, min(count, limits.slots))
    length = round_up(limits.lengths, longest)
    larger_width = max(width, load.width)
    larger_length = max(length, load.length)
    is_smaller = (width, length) != (larger_width, larger_length)
    smaller_steps = load.smaller_steps + 1 if is_smaller else 0
    is_idle = not load.on_device and not load.cancelled
    if is_idle or smaller_steps > limits.patience:
        return width, length, 0
    return larger_width, larger_length, smaller_steps


def most_tokens(work: Work, steps: int) -> int:
    """Returns the most tokens that a request has after so many more iterations.

    steps: iterations that emit a token each; of one that may emit several, as many.
    """
    first_token = 1  # prefill emits it, no iteration does
    return work.prompt + min(work.max_tokens, work.emitted + steps + first_token)


# ---------------------------------------------------------------- prefill


def next_prefill_budget(load: Load, limits: Limits) -> int:
    """Returns how many tokens, padding included, the next prefill call may compute."""
    if not load.prefilling and not load.candidates:
        return 0
    if not load.staged and not load.decoding:  # a chunk would have nothing to decode
        return limits.prefill_budget
    if enough_staged(load, limits):
        return 0
    return max(limits.prefill_budget - load.prefill_spent, 0)


def enough_staged(load: Load, limits: Limits) -> bool:
    """Returns whether staging holds enough requests until the next step.

    Prefill then waits, so that more prompts share a call. Staging must hold:

    - a request for every free slot;
    - beside these, a request for every request that reaches its `max_tokens` in the
      unread chunks or the next one, but no fewer than a quarter of the slots, since a
      stop id or a stop string can end a request at any time.
    """
    steps = most_steps(load, limits) * (load.unread_chunks + 1)
    works = load.on_device + load.candidates
    ending = sum(work.max_tokens - work.emitted <= steps for work in works)
    free_slots = max(limits.slots - len(load.decoding), 0)
    quarter = -(-limits.slots // 4)
    return len(load.staged) - free_slots >= max(ending, quarter)


# ---------------------------------------------------------------- chunk


def next_chunk_steps(load: Load, limits: Limits) -> int:
    """Returns the iterations of the next chunk; 0 if there is nothing for it to do.

    The host then reads the results of prefill calls without a chunk.

    They are at most the tokens that the longest request has left, and at most those
    that `most_steps` returns. If the next prefill call can fill empty slots, the chunk
    is shorter, so that this call starts soon: it has the share of `most_steps` that
    full slots have of full and fillable slots. If a request that arrives now could get
    a slot, the chunk has at most the `hiding_steps`, so that it need not wait long.
    """
    left = tokens_left(load)
    if not (left or load.cancelled):
        return 0
    full = len(load.staged) + len(load.decoding)
    nearly_prefilled = sum(
        work.prompt - work.computed <= limits.prefill_budget
        for work in load.prefilling + load.candidates
    )
    queued = load.queued - len(load.candidates)
    fillable = min(nearly_prefilled + queued, max(limits.slots - full, 0))
    share = most_steps(load, limits) * full // max(full + fillable, 1)
    has_room = len(load.on_device) + load.queued < limits.slots
    if has_room and load.hiding_steps is not None:
        share = min(share, load.hiding_steps)
    steps = max(min(share, left), 1)
    return round_up(limits.chunk_sizes, steps) if limits.fixed_trip_count else steps


def most_steps(load: Load, limits: Limits) -> int:
    """Returns the most iterations of the next chunk, whatever its requests need.

    They are those that fit in decode.burst_ms, from 1 to `steps_per_call`. A loop that
    cannot end early has the largest compiled number that fits, or else the smallest.
    """
    if load.fitting_steps is None:
        return limits.steps_per_call
    if limits.fixed_trip_count:
        sizes = [size for size in limits.chunk_sizes if size <= load.fitting_steps]
        return max(sizes, default=limits.chunk_sizes[0])
    return min(max(load.fitting_steps, 1), limits.steps_per_call)


def tokens_left(load: Load) -> int:
    """Returns the most tokens that a request has left after the unread chunks.

    The unread chunks advance every decoding request. They may not have admitted a
    staged request if there are more requests than slots: it then has all tokens left.
    """
    all_have_slots = len(load.staged) + len(load.decoding) <= load.width

    def left(work: Work, is_decoding: bool) -> int:
        emitted = max(work.emitted, 1)  # prefill emits the first token
        unread_steps = work.unread_steps if is_decoding else 0
        return work.max_tokens - emitted - unread_steps

    staged = [left(work, all_have_slots) for work in load.staged]
    decoding = [left(work, True) for work in load.decoding]
    return max([0, *staged, *decoding])
