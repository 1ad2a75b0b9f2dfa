"""Takes the steps of an engine: admission, prefill calls, chunks, and their events."""

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
from ladder_jax.serve.events import hand_out
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.programs import Programs, slot_state
from ladder_jax.serve.request import Request
from ladder_jax.serve.request_queue import RequestQueue
from ladder_jax.serve.scheduler import Limits, Load, Phase, Scheduler, Step
from ladder_jax.serve.submission import TICKETS
from ladder_jax.serve.tracker import Chunk, Record, Tracker, work_of

log = logging.getLogger(__name__)
PATIENCE = 4  # steps that a smaller shape must suffice for before the state shrinks


@dataclasses.dataclass
class UnreadChunk(Chunk):
    """A chunk that the host has started, and its results on the device."""

    width: int
    prefills: list[decode.Events]  # [P] each, of the prefill calls before it
    events: decode.Events  # [K, W]
    waiting: jax.Array  # [R], request numbers in staging after it


class Stepper:
    """Moves requests from a queue through the device, one step after another.

    One thread at a time may call its methods, but for `cancel`.

    Args:
      options: config.Decode, with the number of slots filled in.
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
        self._cancels: deque[Request] = deque()
        self.tracker = Tracker(capacity.places)
        self._tickets = 0  # given to requests in the order of their admission
        self._changing = False
        self._start_afresh()

    def cancel(self, request: Request) -> None:
        """Ends a request. Any thread may call it at any time."""
        if request.put(finish="cancelled"):
            self.queue.remove(request)
            self._cancels.append(request)

    def step(self) -> bool:
        """Takes one step; returns whether there was anything to do.

        If the device raises an exception, the requests that it works on fail, and the
        engine continues with an empty state and the queued requests. The same holds if
        a KeyboardInterrupt, or another exception that is not an Exception, has ended
        the step before this one while it changed the state. An exception is raised
        again if there is no request to fail with it.
        """
        if self._changing:
            self._fail(RuntimeError("a step of the engine was interrupted halfway"))
            return True
        try:
            self._changing = True
            worked = self._step()
            self._changing = False
            return worked
        except Exception as error:  # any: the device's state may be lost
            log.exception("a decode step failed: its requests fail")
            if not self._fail(error):
                raise
            return True

    def _step(self) -> bool:
        self._read_cancels()
        candidates = self._candidates()
        step = self._plan(candidates)
        self._smaller_steps = step.smaller_steps
        admitted = self._admit(candidates[: step.admit])
        self.counters.reshapes += self.programs.reshape(step.width, step.length)
        for record in admitted:
            self._copy_prefix(record)
        started = self._start_chunk(self._prefill())
        prefilling = bool(self.tracker.phase(Phase.PREFILLING))
        # The new chunk stays unread while the device runs it.
        stay_unread = 1 if started and self.pipelined else 0
        read = len(self._unread) > stay_unread
        while len(self._unread) > stay_unread:
            self._read_chunk(self._unread[0])
        return started or prefilling or read

    def _candidates(self) -> list[Request]:
        """Returns the queued requests that staging has room for."""
        free = len(self.tracker.free_places())
        if self._tickets + free > TICKETS:
            # The tickets start again at 1 when no request in staging has one.
            if free < self.capacity.places:
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
            cancelled=tracker.cancelled(),
            unread_chunks=len(unread),
            unread_prefills=len(self._prefill_events),
            prefill_spent=prefill_spent,
            width=self.programs.width,
            length=self.programs.length,
            smaller_steps=self._smaller_steps,
        )
        return self.scheduler(load, self.limits)

    def _start_afresh(self) -> None:
        """Puts an empty decode state in place, without any request."""
        self._unread: deque[UnreadChunk] = deque()
        self._prefill_events: list[decode.Events] = []  # no chunk has taken them along
        self.tracker = Tracker(self.capacity.places)
        self._tickets = 0  # given to requests in the order of their admission
        self._chunks_started = 0
        self._smaller_steps = 0
        self.prefixes.clear()
        self.programs.reset()
        # Whether the fields above and the device's state may disagree.
        self._changing = False

    def _fail(self, error: Exception) -> bool:
        """Ends all requests on the device, whose state is lost.

        Returns whether there were any.
        """
        self.counters.failures += 1
        live = self.tracker.live()
        for record in live:
            ended = record.request.put(finish="error", error=error)
            self.counters.finished += ended
        self.queue.remove_finished()
        self._start_afresh()
        return bool(live)

    def _read_cancels(self) -> None:
        while self._cancels:
            request = self._cancels[0]
            if record := self.tracker.get(request.number):
                self.tracker.finish(record, device_knows=False)
            self.counters.finished += 1
            self._cancels.popleft()

    # ------------------------------------------------------------ admission, prefill

    def _admit(self, requests: list[Request]) -> list[Record]:
        """Gives requests a place in staging; returns their records."""
        admitted = []
        for index, request in zip(self.tracker.free_places(), requests):
            self._tickets += 1
            # It is in both for a moment: after an interrupt it must be in one of them.
            record = self.tracker.admit(request, index, self._tickets)
            if self.queue.remove(request):
                admitted.append(record)
            else:  # cancelled since the step was planned
                self.tracker.finish(record, device_knows=False)
        return admitted

    def _copy_prefix(self, record: Record) -> None:
        """Copies the keys and values of a cached prefix of its prompt to its place."""
        assert record.staging_index is not None
        blocks, size = self.prefixes.find(record.request.prompt), self.prefixes.size
        for i, block in enumerate(blocks):
            self.programs.write_block(record.staging_index, i * size, block)
        record.computed = len(blocks) * size
        self.counters.prefix_tokens += record.computed

    def _prefill(self) -> Step:
        """Starts the prefill calls of a step; returns the plan for its chunk."""
        spent = 0
        while True:
            step = self._plan([], spent)
            if not step.prefill_budget:
                return step
            computed = self._prefill_call(step.prefill_budget)
            if not computed:  # the rest of the budget is below the smallest width
                return step
            spent += computed

    def _prefill_call(self, budget: int) -> int:
        """Computes the next pieces of prompts; returns the tokens, with padding."""
        records = {r.staging_index: r for r in self.tracker.phase(Phase.PREFILLING)}
        waiting = [
            (index, record.computed, len(record.request.prompt))
            for index, record in records.items()
            if index is not None
        ]
        pieces, width = packing.pick_pieces(waiting, self.capacity.pieces, budget)
        if not pieces:
            return 0
        picked = [records[piece.staging_index] for piece in pieces]
        seen = round_up(
            self.capacity.seen(self.programs.length),
            max(piece.stop for piece in pieces),
        )
        prompts = self.programs.pack(
            pieces,
            width,
            seen,
            [record.request.prompt for record in picked],
            [self._slot_state(record) for record in picked],
        )
        events = self.programs.run_prefill(prompts)
        jax.copy_to_host_async(events)
        self._prefill_events.append(events)
        self.counters.prefill_calls += 1
        self.counters.prefill_tokens += sum(piece.length for piece in pieces)
        self.counters.prefill_padded += prompts.tokens.size
        for piece, record in zip(pieces, picked):
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
        assert record.staging_index is not None
        for start, key in self.prefixes.missing(record.request.prompt):
            block = self.programs.read_block(record.staging_index, start)
            self.prefixes.add(key, block)

    # ------------------------------------------------------------ chunks

    def _start_chunk(self, step: Step) -> bool:
        """Starts a chunk if the plan has one; returns whether it did."""
        if not step.steps:
            return False
        cancelled = self.tracker.take_cancelled(self.programs.most_cancelled)
        events, waiting = self.programs.run_chunk(cancelled, step.steps)
        jax.copy_to_host_async((events, waiting))
        self._unread.append(
            UnreadChunk(
                number=self._chunks_started,
                steps=step.steps,
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
        """Waits for the oldest unread chunk and hands out its events."""
        self._changing = False  # an interrupt during the wait loses nothing
        prefills, events, waiting = jax.device_get(
            (chunk.prefills, chunk.events, chunk.waiting)
        )
        self._changing = True
        tracker, counters = self.tracker, self.counters
        counters.syncs += 1
        for prefill in prefills:
            hand_out(jax.tree.map(lambda x: x[None], prefill), tracker, counters)
        self._count_iterations(chunk, events)
        hand_out(events, tracker, counters)
        self.tracker.read(chunk, waiting.tolist())
        self._unread.popleft()

    def _count_iterations(self, chunk: UnreadChunk, events: Any) -> None:
        busy = events.flag != decode.IDLE
        iterations = len(busy)
        if not self.limits.fixed_trip_count:  # it ended with the last event
            iterations = int(np.flatnonzero(busy.any(axis=1)).max(initial=-1)) + 1
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
