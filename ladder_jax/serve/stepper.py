"""Takes the steps of an engine: admits requests, runs prefill calls and chunks."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ladder_jax import decode
from ladder_jax.config import Decode
from ladder_jax.serve import packing
from ladder_jax.serve.buckets import round_up
from ladder_jax.serve.capacity import Capacity
from ladder_jax.serve.counters import Counters
from ladder_jax.serve.events import deliver_events
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.programs import Programs, slot_state
from ladder_jax.serve.request import Request
from ladder_jax.serve.request_queue import RequestQueue
from ladder_jax.serve.scheduler import Limits, Load, Phase, Scheduler, Step
from ladder_jax.serve.submission import TICKETS
from ladder_jax.serve.tracker import Chunk, Record, Tracker, work_of

log = logging.getLogger(__name__)
# For how many steps a smaller shape must suffice before the state shrinks.
PATIENCE = 4


@dataclasses.dataclass
class UnreadChunk(Chunk):
    """A chunk that the host has started and not read, and its results on the device."""

    width: int
    prefills: list[decode.Events]  # [P] each, of the prefill calls since the last one
    events: decode.Events  # [K, W]
    waiting: jax.Array  # [R], request numbers in staging after it


class Stepper:
    """Moves requests from the queue through the phases, one step after another.

    Only one thread at a time may call its methods; `cancel` is safe from any thread.

    Args:
      options: config.Decode; its `slots` is a number.
      queue: the requests that wait on the host.
      scheduler, trace, pipelined: see Engine.
    """

    def __init__(
        self,
        options: Decode,
        capacity: Capacity,
        programs: Programs,
        prefixes: PrefixCache,
        queue: RequestQueue,
        scheduler: Scheduler,
        trace: bool,
        pipelined: bool,
    ) -> None:
        self.options, self.capacity, self.programs = options, capacity, programs
        self.prefixes, self.queue, self.scheduler = prefixes, queue, scheduler
        self.trace, self.pipelined = trace, pipelined
        self.limits = Limits(
            slots=capacity.slots,
            steps_per_call=options.steps_per_call,
            prefill_budget=options.prefill_budget,
            widths=capacity.widths,
            lengths=capacity.lengths,
            chunk_sizes=capacity.chunk_sizes,
            fit_shapes=options.fit_shapes,
            fixed_trip_count=programs.spec.fixed_trip_count,
            patience=PATIENCE,
        )
        self.counters = Counters()
        self.history: list[tuple[float, np.ndarray]] = []
        # Requests that clients have cancelled since the last step.
        self._cancelled: deque[Request] = deque()
        self._tickets = 0  # the last ticket, see TICKETS
        # Whether a step is changing this object and the device's state: if an interrupt
        # ends the step, they may disagree.
        self._changing = False
        self._reset()

    def cancel(self, request: Request) -> None:
        """Ends a request. Any thread may call it at any time."""
        if request.put(finish="cancelled"):
            self.queue.remove(request)
            self._cancelled.append(request)

    def step(self) -> bool:
        """Takes one step; returns whether there was anything to do.

        If the step raises an exception, the requests on the device fail, and the engine
        continues with an empty state and the queued requests. If there is no request on
        the device, the step raises the exception. The requests also fail if an
        interrupt (KeyboardInterrupt or another exception that is not an Exception)
        ended the step before this one while it changed the state.
        """
        if self._changing:
            self._fail(RuntimeError("a step of the engine was interrupted halfway"))
            return True
        try:
            self._changing = True
            had_work = self._step()
            self._changing = False
            return had_work
        except Exception as error:  # after any exception the state may be lost
            log.exception("a decode step failed: its requests fail")
            if not self._fail(error):
                raise
            return True

    def _step(self) -> bool:
        """Takes one step; it is not safe against exceptions, see `step`."""
        self._finish_cancelled()
        candidates = self._candidates()
        step = self._plan(candidates)
        self._smaller_steps = step.smaller_steps
        admitted = self._admit(candidates[: step.admit])
        self.counters.reshapes += self.programs.reshape(step.width, step.length)
        for record in admitted:
            self._copy_prefix(record)
        has_started = self._start_chunk(self._prefill())
        has_prefilling = bool(self.tracker.in_phase(Phase.PREFILLING))
        # The new chunk stays unread while the device runs it.
        stay_unread = 1 if has_started and self.pipelined else 0
        has_unread = len(self._unread) > stay_unread
        while len(self._unread) > stay_unread:
            self._read_chunk(self._unread[0])
        return has_started or has_prefilling or has_unread

    def _candidates(self) -> list[Request]:
        """Returns the queued requests that staging has room for."""
        free = len(self.tracker.free_staging_indices())
        if self._tickets + free > TICKETS:
            # The tickets start again at 1 once staging is empty.
            if free < self.capacity.staging_size:
                return []
            self._tickets = 0
        if any(request.finish for request in self.queue.first(free)):
            self.queue.remove_finished()
        return self.queue.first(free)

    def _plan(self, candidates: list[Request], prefill_spent: int = 0) -> Step:
        """Asks the scheduler what to do next."""
        tracker, unread = self.tracker, self._unread
        load = Load(
            queued=len(self.queue),
            candidates=tuple(map(work_of, candidates)),
            prefilling=tracker.work(Phase.PREFILLING, unread),
            staged=tracker.work(Phase.STAGED, unread),
            decoding=tracker.work(Phase.DECODING, unread),
            cancelled=tracker.cancelled_count(),
            unread_chunks=len(unread),
            unread_prefills=len(self._prefill_events),
            prefill_spent=prefill_spent,
            width=self.programs.width,
            length=self.programs.length,
            smaller_steps=self._smaller_steps,
        )
        return self.scheduler(load, self.limits)

    def _reset(self) -> None:
        """Replaces the decode state by an empty one, and forgets all its requests."""
        self._unread: deque[UnreadChunk] = deque()
        # Of the prefill calls since the last chunk.
        self._prefill_events: list[decode.Events] = []
        self.tracker = Tracker(self.capacity.staging_size)
        self._tickets = 0
        self._chunks_started = 0
        self._smaller_steps = 0
        self.prefixes.clear()
        self.programs.reset()
        self._changing = False

    def _fail(self, error: Exception) -> bool:
        """Ends all requests on the device and resets its state, which may be damaged.

        Returns whether there were any requests.
        """
        self.counters.failures += 1
        live = self.tracker.live()
        for record in live:
            ended = record.request.put(finish="error", error=error)
            self.counters.finished += ended
        self.queue.remove_finished()
        self._reset()
        return bool(live)

    def _finish_cancelled(self) -> None:
        """Makes the next chunk remove the cancelled requests from the device."""
        while self._cancelled:
            request = self._cancelled[0]
            if record := self.tracker.get(request.number):
                self.tracker.finish(record, device_ended=False)
            self.counters.finished += 1
            self._cancelled.popleft()

    # ------------------------------------------------------------ admission, prefill

    def _admit(self, requests: list[Request]) -> list[Record]:
        """Gives each request a row of staging; returns their records."""
        records = []
        for index, request in zip(self.tracker.free_staging_indices(), requests):
            self._tickets += 1
            # For a moment, the request is in the tracker and in the queue: an interrupt
            # between the two lines does not lose it.
            record = self.tracker.admit(request, index, self._tickets)
            if self.queue.remove(request):
                records.append(record)
            else:  # the client has cancelled it since the step was planned
                self.tracker.finish(record, device_ended=False)
        return records

    def _copy_prefix(self, record: Record) -> None:
        """Copies the cached blocks that its prompt begins with to its staging row."""
        assert record.staging_index is not None
        blocks, size = self.prefixes.find(record.request.prompt), self.prefixes.size
        for i, block in enumerate(blocks):
            self.programs.write_block(record.staging_index, i * size, block)
        record.computed = len(blocks) * size
        self.counters.prefix_tokens += record.computed

    def _prefill(self) -> Step:
        """Starts the prefill calls of a step; returns the plan for its chunk."""
        computed = 0
        while True:
            step = self._plan([], computed)
            if not step.prefill_budget:
                return step
            tokens = self._prefill_call(step.prefill_budget)
            if not tokens:  # the rest of the budget is below the smallest width
                return step
            computed += tokens

    def _prefill_call(self, budget: int) -> int:
        """Starts one prefill call; returns its number of tokens, padding included."""
        prefilling = self.tracker.in_phase(Phase.PREFILLING)
        records = {record.staging_index: record for record in prefilling}
        waiting = [
            (index, record.computed, len(record.request.prompt))
            for index, record in records.items()
            if index is not None
        ]
        pieces, width = packing.pick_pieces(waiting, self.capacity.pieces, budget)
        if not pieces:
            return 0
        piece_records = [records[piece.staging_index] for piece in pieces]
        context = round_up(
            self.capacity.context_lengths(self.programs.length),
            max(piece.stop for piece in pieces),
        )
        prompts = self.programs.pack(
            pieces,
            width,
            context,
            [record.request.prompt for record in piece_records],
            [self._slot_state(record) for record in piece_records],
        )
        events = self.programs.run_prefill(prompts)
        jax.copy_to_host_async(events)
        self._prefill_events.append(events)
        self.counters.prefill_calls += 1
        self.counters.prefill_tokens += sum(piece.length for piece in pieces)
        self.counters.prefill_padded += prompts.tokens.size
        for piece, record in zip(pieces, piece_records):
            record.computed = piece.stop
            if piece.last:
                self.tracker.stage(record, self._chunks_started)
                self._cache_prefix(record)
        return prompts.tokens.size

    def _slot_state(self, record: Record) -> decode.SlotState:
        request = record.request
        order = record.ticket - request.priority * TICKETS
        return slot_state(
            request.number, request.submission, order, self.options.max_stop_ids
        )

    def _cache_prefix(self, record: Record) -> None:
        """Stores the blocks of its prompt that the prefix cache does not have yet."""
        assert record.staging_index is not None
        for start, key in self.prefixes.missing(record.request.prompt):
            block = self.programs.read_block(record.staging_index, start)
            self.prefixes.add(key, block)

    # ------------------------------------------------------------ chunks

    def _start_chunk(self, step: Step) -> bool:
        """Starts a chunk if the plan has one; returns whether it did."""
        if not step.chunk_steps:
            return False
        cancelled = self.tracker.take_cancelled(self.programs.most_cancelled)
        events, waiting = self.programs.run_chunk(cancelled, step.chunk_steps)
        jax.copy_to_host_async((events, waiting))
        self._unread.append(
            UnreadChunk(
                number=self._chunks_started,
                steps=step.chunk_steps,
                width=self.programs.width,
                prefills=self._prefill_events,
                events=events,
                waiting=waiting,
            )
        )
        self._prefill_events = []
        self._chunks_started += 1
        self.counters.chunks += 1
        return True

    def _read_chunk(self, chunk: UnreadChunk) -> None:
        """Waits for the oldest unread chunk and delivers its events to the requests."""
        self._changing = False  # an interrupt during the wait loses nothing
        prefills, events, waiting = jax.device_get(
            (chunk.prefills, chunk.events, chunk.waiting)
        )
        self._changing = True
        tracker, counters = self.tracker, self.counters
        counters.syncs += 1
        for prefill in prefills:
            one_iteration = jax.tree.map(lambda x: x[None], prefill)  # [1, P]
            deliver_events(one_iteration, tracker, counters)
        self._count_iterations(chunk, events)
        deliver_events(events, tracker, counters)
        tracker.leave_staging(chunk, waiting.tolist())
        self._unread.popleft()

    def _count_iterations(self, chunk: UnreadChunk, events: Any) -> None:
        """Adds a chunk's iterations to the counters, and to the history if traced."""
        busy = events.flag != decode.IDLE
        iterations = len(busy)
        if not self.limits.fixed_trip_count:  # the loop ended after the last event
            busy_iterations = np.flatnonzero(busy.any(axis=1))
            iterations = int(busy_iterations.max(initial=-1)) + 1
        self.counters.iterations += iterations
        self.counters.slot_iterations += iterations * chunk.width
        self.counters.busy += int(busy.sum())
        if self.trace:
            requests = np.where(busy, events.request, -1)[:iterations]
            self.history.append((time.perf_counter(), requests))

    def warm_up(self, progress: Callable[[list[Any]], Any]) -> None:
        """Compiles every program, see Engine.warm_up."""
        if self.tracker.live() or self._unread:
            raise RuntimeError(
                "the device works on requests: call warm_up before the first"
            )
        self._changing = True
        self.programs.warm_up(progress)
        self._changing = False
