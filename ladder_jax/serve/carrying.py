"""Measures where an iteration that carries a piece of a prompt saves time.

A piece of a prompt has a prefill call of its own, or an iteration of the slots carries
it (decode_prompts.carry). One forward pass reads the weights once, two read them twice:
that is what carrying saves, if reading takes the time and not computing.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from ladder_jax.serve.programs import Programs

ROUNDS = 3  # runs of each program; the fastest counts, as other work only slows it


def measure(programs: Programs) -> dict[tuple[int, int], float]:
    """Returns {(slots, width of a prefill call): seconds saved by carrying its piece}.

    The programs must be compiled, and no request on the device; it resets the state.
    The slots have few keys and values, as both ways read the same.
    """
    capacity = programs.capacity
    context = capacity.context_lengths(capacity.length)[0]
    own = {
        width: _fastest(programs, partial(programs.run_padding, context, 1, width))
        for width in capacity.pieces
        if width <= capacity.carry_tokens
    }
    saves: dict[tuple[int, int], float] = {}
    steps = capacity.chunk_sizes[0] if programs.spec.fixed_trip_count else 1
    for slots in capacity.widths:
        programs.reshape(slots, capacity.length)
        _fill_slots(programs)
        alone = _fastest(programs, partial(programs.run_chunk, [], steps)) / steps
        carried = _fastest(programs, programs.run_carry_padding)
        saves |= {(slots, w): alone + seconds - carried for w, seconds in own.items()}
    programs.reset()
    return saves


def _fastest(programs: Programs, run: Callable[[], Any]) -> float:
    """Returns the fewest seconds of a run."""
    seconds = []
    for _ in range(ROUNDS):
        jax.block_until_ready(programs.state)
        start = time.perf_counter()
        run()
        jax.block_until_ready(programs.state)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _fill_slots(programs: Programs) -> None:
    """Makes every slot decode for many iterations: an empty one has nothing to do."""
    state = programs.state
    slots = state.slots.state

    def filled(old: jax.Array, value: int) -> jax.Array:
        return jax.device_put(np.full(old.shape, value, old.dtype), old.sharding)

    slots = slots._replace(
        active=filled(slots.active, True), remaining=filled(slots.remaining, 10**6)
    )
    programs.state = state._replace(slots=state.slots._replace(state=slots))
