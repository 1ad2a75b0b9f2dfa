"""Compiles an engine's programs before it has weights, several at a time.

XLA needs shapes alone. So an engine's memory is known before anything is allocated, and
programs compile while weights load. A later call of a program finds it compiled: JAX
keeps it under its function, its shapes and its shardings.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np

from ladder_jax import decode
from ladder_jax.serve.design import Design
from ladder_jax.serve.memory import ProgramMemory, abstract_state, abstract_weights
from ladder_jax.serve.programs import cancelled_ids, padding_prompts

MOST_THREADS = 16


class Job(NamedTuple):
    """One program to compile."""

    name: str
    is_largest: bool  # of its kind: it takes the most memory
    function: Any  # jitted
    arguments: tuple[Any, ...]  # shapes with shardings, and NumPy arrays

    def compile(self) -> ProgramMemory:
        """Compiles it; returns what it takes on a device."""
        compiled = self.function.lower(*self.arguments).compile()
        memory = compiled.memory_analysis()
        if memory is None:  # this backend does not say
            return ProgramMemory(0, 0)
        new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return ProgramMemory(
            memory.temp_size_in_bytes + max(new_outputs, 0),
            memory.generated_code_size_in_bytes,
        )


def jobs(design: Design) -> list[Job]:
    """Returns the chunks and prefill calls of an engine, and the iterations that carry
    pieces of prompts, the largest first.

    The programs that change the state's shape are not among them: they are small.
    """
    spec, capacity = design.spec, design.capacity
    weights = abstract_weights(design)
    chunks = {size: decode.make_chunk(spec, size) for size in capacity.chunk_sizes}
    cancelled = cancelled_ids(capacity, [])
    found = []
    for length in reversed(capacity.lengths):
        longest = length == capacity.lengths[-1]
        for width in reversed(capacity.widths):
            state = abstract_state(design, width, length)
            widest = longest and width == capacity.widths[-1]
            for steps in reversed(capacity.chunk_sizes):
                largest = widest and steps == capacity.chunk_sizes[-1]
                name = f"chunk of {steps} iterations, {width} x {length} tokens"
                inputs: tuple[Any, ...] = (weights, state, cancelled, np.int32(steps))
                found.append(Job(name, largest, chunks[steps], inputs))
            if capacity.carry_tokens:
                name = f"carry of {capacity.carry_tokens} tokens, {width} slots"
                context = capacity.context_lengths(length)[0]
                shape = context, 1, capacity.carry_tokens
                inputs = cancelled, padding_prompts(spec, capacity, *shape)
                function = decode.make_carry(spec)
                found.append(Job(name, widest, function, (weights, state, *inputs)))
        staging = abstract_state(design, capacity.widths[-1], length).shared_staging()
        plain = capacity.prefill_shapes(length)
        most_rows = max(count for _, count, _ in plain)
        most_tokens = max(count * width for _, count, width in plain)
        scored = capacity.scored_shapes(length)
        for prefill, shapes in (
            (decode.make_prefill(spec), plain),
            (decode.make_prefill(spec, scored=True), scored),
        ):
            for context, count, width in reversed(shapes):
                # With scores, a call has logits of all tokens, else one row a prompt.
                is_long = longest and context == length
                largest = is_long and (
                    width == capacity.pieces[-1]
                    if shapes is scored
                    else count == most_rows or count * width == most_tokens
                )
                kind = "scored prefill" if shapes is scored else "prefill"
                name = f"{kind} of {count} x {width} tokens, of {context}"
                prompts = padding_prompts(spec, capacity, context, count, width)
                inputs = weights, staging, prompts
                found.append(Job(name, largest, prefill, inputs))
    return sorted(found, key=lambda job: not job.is_largest)


@contextlib.contextmanager
def compiling(
    jobs: Sequence[Job], done: Callable[[Job], object], threads: int | None = None
) -> Iterator[Callable[[], list[ProgramMemory]]]:
    """Compiles jobs in threads while the block runs.

    Args:
      done: gets each job that is compiled, from several threads.
      threads: None: one for each processor of this process.
    The block gets a function that waits for all and returns their memory, in the order
    of `jobs`; it raises the first error. If the block ends by an exception, jobs that
    have not begun never do.
    """

    def run(job: Job) -> ProgramMemory:
        memory = job.compile()
        done(job)
        return memory

    count = threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
    with ThreadPoolExecutor(count, "ladder_jax compile") as pool:
        futures = [pool.submit(run, job) for job in jobs]

        def results() -> list[ProgramMemory]:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures]

        try:
            yield results
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def compile_all(
    jobs: Sequence[Job], done: Callable[[Job], object], threads: int | None = None
) -> list[ProgramMemory]:
    """Compiles jobs, see `compiling`; returns their memory."""
    with compiling(jobs, done, threads) as results:
        return results()
