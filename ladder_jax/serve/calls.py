"""Starts calls of the device for the admitted requests, and reads their results.

The host starts a call and goes on. It reads the results later: first those of the
prefill calls before a chunk, so that first tokens do not wait for the chunk, and then
those of the chunk.
"""

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ladder_jax import decode_scores, decode_state
from ladder_jax.config import Decode
from ladder_jax.serve import packing
from ladder_jax.serve.buckets import round_up
from ladder_jax.serve.capacity import Capacity
from ladder_jax.serve.counters import Counters, TracedChunk
from ladder_jax.serve.events import deliver_events, deliver_scores
from ladder_jax.serve.pace import Pace
from ladder_jax.serve.page_budget import PageBudget
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.programs import Programs, slot_state
from ladder_jax.serve.request import Request
from ladder_jax.serve.scheduler import Phase, Step
from ladder_jax.serve.submission import TICKETS
from ladder_jax.serve.tracker import Chunk, Record, Tracker

POLL_S = 1e-3  # how often a wait asks whether a chunk has ended before its time


@dataclasses.dataclass
class PrefillCall:
    """A prefill call that the host has started and not read."""

    pieces: list[packing.Piece]
    records: list[Record]  # of the request of each piece
    events: decode_state.Events  # [P]
    scores: decode_scores.Scores | None  # [P, T], if the requests want them


@dataclasses.dataclass
class UnreadChunk(Chunk):
    """A chunk that the host has started and not read, and the prefill calls before it.

    Without iterations (`steps` 0) it is no call of the device: its prefill calls are
    read alone.
    """

    width: int
    length: int  # tokens that each row has memory for
    pages: int  # the most that requests and stored prefixes have; 0: not traced
    prefills: list[PrefillCall]  # that have not been delivered
    events: decode_state.Events | None  # [K, W], or [K (1 + D), W]
    waiting: jax.Array | None  # [R], request numbers in staging after it
    started: float  # seconds of the clock
    # How many programs had been compiled, and shapes changed, before it was started.
    compiled: tuple[int, int]
    carries: bool  # it is one iteration, which carried the last of `prefills`


class Calls:
    """The calls of the device since its state was empty.

    Args:
      options: config.Decode; its `slots` is a number.
      counters: it counts what it does in them.
      pace: gets the times of chunks.
      history: gets an entry for every chunk, see Engine; None: it is not recorded.
      put_back: queues a request again that the device has preempted.

    tracker: the phases of the requests. slots: the request number in each slot after
    the last chunk that the host has read, or decode_state.NO_REQUEST. unread: the
    chunks that the host has not read, the oldest first.
    """

    def __init__(
        self,
        options: Decode,
        capacity: Capacity,
        programs: Programs,
        prefixes: PrefixCache,
        counters: Counters,
        pace: Pace,
        history: list[TracedChunk] | None,
        put_back: Callable[[Request], None],
    ) -> None:
        self.options, self.capacity, self.programs = options, capacity, programs
        self.prefixes, self.counters, self.history = prefixes, counters, history
        self.put_back, self.pace = put_back, pace
        self.tracker = Tracker(capacity.staging_size, bool(capacity.page_size))
        self.slots: list[int] = []
        self.unread: deque[UnreadChunk] = deque()
        self._prefills: list[PrefillCall] = []  # since the last chunk
        # What the next chunk carries.
        self._carried: tuple[list[packing.Piece], list[Record]] | None = None
        self._tickets = 0  # the last ticket, see TICKETS
        self._chunks_started = 0
        self._device_free = -math.inf  # when the last call that was read had ended
        self._waited = False  # whether the host waited for the last chunk

    # ------------------------------------------------------------ admission

    def room(self) -> int:
        """Returns how many requests staging has room for."""
        free = len(self.tracker.free_staging_indices())
        if self._tickets + free > TICKETS:
            # The tickets start again at 1 once staging is empty.
            if free < self.capacity.staging_size:
                return 0
            self._tickets = 0
        return free

    def fitting(self, candidates: list[Request]) -> list[Request]:
        """Returns the first of these requests whose prompts there are pages for."""
        if not self.capacity.page_size:
            return candidates
        return list(itertools.takewhile(self._page_budget().take, candidates))

    def _page_budget(self) -> PageBudget:
        return PageBudget(self.capacity, self.tracker, self.unread, self.prefixes)

    def admit(self, request: Request) -> Record:
        """Gives a request a row of staging."""
        self._tickets += 1
        index = self.tracker.free_staging_indices()[0]
        return self.tracker.admit(request, index, self._tickets)

    def copy_prefix(self, record: Record) -> None:
        """Copies the cached blocks that its prompt begins with to its staging row.

        The blocks have no scores: a request that wants them computes its whole prompt.
        """
        assert record.staging_index is not None
        if record.is_scored:
            return
        blocks, size = self.prefixes.find(record.prompt), self.prefixes.size
        for i, block in enumerate(blocks):
            self.programs.write_block(
                record.staging_index, i * size, block, record.request.number
            )
        record.blocks = blocks
        record.computed = len(blocks) * size
        self.counters.prefix_tokens += record.computed

    # ------------------------------------------------------------ prefill

    def prefill(self, budget: int, may_carry: bool = False) -> int:
        """Starts one prefill call; returns its number of tokens, padding included.

        It is 0, and there is no call, if no compiled width fits the budget, or if there
        may be too few pages before other requests end. A call computes one prompt with
        scores, or several without.

        may_carry: whether the next chunk may carry the one piece of the call. If that
        saves time, there is no call, either.
        """
        prefilling = self.tracker.in_phase(Phase.PREFILLING)
        if self.capacity.page_size:
            prefilling = self._page_budget().startable(prefilling)
            if not prefilling:
                return 0
        scored = prefilling[0].is_scored
        prefilling = [r for r in prefilling if r.is_scored == scored]
        if scored:
            prefilling = prefilling[:1]
        by_index = {record.staging_index: record for record in prefilling}
        waiting = [
            (index, record.computed, len(record.prompt))
            for index, record in by_index.items()
            if index is not None
        ]
        pieces, width = packing.pick_pieces(waiting, self.capacity.pieces, budget)
        if not pieces:
            return 0
        records = [by_index[piece.staging_index] for piece in pieces]
        saved = self.programs.carry_saves.get((self.programs.width, width), 0.0)
        if may_carry and len(pieces) == 1 and not scored and saved > 0:
            self._carried = pieces, records
            return 0
        prompts = self._pack(pieces, records, width, scored)
        events, scores = self.programs.run_prefill(prompts, scored)
        self._note_prefill(PrefillCall(pieces, records, events, scores))
        return self._count_padded(prompts)

    def _pack(
        self,
        pieces: list[packing.Piece],
        records: list[Record],
        width: int,
        scored: bool = False,
    ) -> decode_state.Prompts:
        """Returns these pieces, padded to a width, as arguments of a call."""
        contexts = self.capacity.context_lengths(self.programs.length, scored)
        return self.programs.pack(
            pieces,
            width,
            round_up(contexts, max(piece.stop for piece in pieces)),
            [packing.Prompt(r.prompt, r.generated) for r in records],
            [self._slot_state(record) for record in records],
        )

    def _note_prefill(self, call: PrefillCall) -> None:
        """Notes a call that was started: the next chunk may admit from it."""
        jax.copy_to_host_async((call.events, call.scores))
        self._prefills.append(call)
        self.counters.prefill_calls += 1
        self.counters.prefill_tokens += sum(piece.length for piece in call.pieces)
        for piece, record in zip(call.pieces, call.records):
            record.computed = piece.stop
            if piece.last:
                self.tracker.stage(record, self._chunks_started)
                self._cache_prefix(record)

    def _count_padded(self, prompts: decode_state.Prompts) -> int:
        size = int(prompts.tokens.size)
        self.counters.prefill_padded += size
        return size

    def _slot_state(self, record: Record) -> decode_state.SlotState:
        request = record.request
        order = record.ticket - request.priority * TICKETS
        return slot_state(
            request.number,
            request.submission,
            order,
            self.options.max_stop_ids,
            record.generated,
            drafts=bool(self.options.speculate),
        )

    def _cache_prefix(self, record: Record) -> None:
        """Stores the blocks of its prompt that the prefix cache does not have yet."""
        assert record.staging_index is not None
        for start, key in self.prefixes.missing(record.prompt):
            block = self.programs.read_block(record.staging_index, start)
            record.blocks.append(block)
            self.prefixes.add(key, block)

    # ------------------------------------------------------------ chunks

    def start_chunk(self, step: Step) -> bool:
        """Starts a chunk if the plan has one; returns whether there is more to read."""
        events, waiting = None, None
        started, compiled = self.pace.clock(), self._compiled()
        number, carried = self._chunks_started, self._carried
        if step.chunk_steps:
            cancelled = self.tracker.take_cancelled(
                self.programs.most_cancelled, number
            )
            self._chunks_started += 1
            self.counters.chunks += 1
            if carried is None:
                events, waiting = self.programs.run_chunk(cancelled, step.chunk_steps)
            else:
                events, waiting = self._run_carry(cancelled, *carried)
            jax.copy_to_host_async((events, waiting))
        elif not self._prefills:
            return False
        self.unread.append(
            UnreadChunk(
                number=number,
                steps=1 if carried else step.chunk_steps,
                width=self.programs.width,
                length=self.programs.length,
                pages=0,
                prefills=self._prefills,
                events=events,
                waiting=waiting,
                started=started,
                compiled=compiled,
                carries=carried is not None,
            )
        )
        self._prefills, self._carried = [], None
        if self.history is not None and self.capacity.page_size:
            self.unread[-1].pages = self._page_budget().used
        return True

    def _run_carry(
        self, cancelled: list[int], pieces: list[packing.Piece], records: list[Record]
    ) -> tuple[decode_state.Events, jax.Array]:
        """Starts the iteration that carries these pieces, instead of a chunk."""
        prompts = self._pack(pieces, records, self.capacity.carry_tokens)
        events, waiting, first = self.programs.run_carry(cancelled, prompts)
        self._note_prefill(PrefillCall(pieces, records, first, None))
        self._count_padded(prompts)
        self.counters.carried += 1
        return events, waiting

    def fetch_prefills(self) -> Any:
        """Waits for the prefill calls before the oldest unread chunk.

        Returns their results for `deliver_prefills`. An interrupt during the wait loses
        nothing.
        """
        calls = [(call.events, call.scores) for call in self.unread[0].prefills]
        if not calls:
            return []
        jax.block_until_ready(calls[-1])
        self._device_free = self.pace.clock()  # the time of the iterations starts here
        return jax.device_get(calls)

    def deliver_prefills(self, results: Any) -> None:
        """Delivers these results to the requests: first tokens, and scores."""
        chunk = self.unread[0]
        self.counters.syncs += bool(results)
        for events, scores in results:
            self._deliver_prefill(chunk.prefills.pop(0), events, scores)

    def fetch(self) -> Any:
        """Waits for the oldest unread chunk; returns its results for `deliver`.

        Its prefill calls must have been delivered. An interrupt during the wait loses
        nothing.
        """
        chunk = self.unread[0]
        if not chunk.steps:
            return None, None
        self._waited = not has_ended(chunk.waiting)
        return jax.device_get((chunk.events, chunk.waiting))

    def deliver(self, results: Any) -> None:
        """Delivers the results of the oldest unread chunk to the requests."""
        chunk, (events, waiting) = self.unread[0], results
        seconds = self._end_of_wait(chunk)
        if chunk.steps:
            self.counters.syncs += 1
            iterations = self._count_iterations(chunk, events)
            if seconds is not None:
                self.pace.add(chunk.width, iterations, seconds, self._waited)
            preempted = deliver_events(events, self.tracker, self.counters)
            for record in preempted:
                # For a moment it is in the queue and on the device: an interrupt
                # between the two lines does not lose it.
                self.put_back(record.request)
                self.tracker.preempt(record)
            self.counters.preempted += len(preempted)
            self.tracker.leave_staging(chunk, waiting.tolist())
        self.unread.popleft()

    def wait_until_nearly_done(self) -> None:
        """Waits until the oldest unread chunk will end soon, as far as Pace knows.

        Its prefill calls must have been delivered, unless it carries the last of them.
        Any thread may call it.
        """
        if not (unread := list(self.unread)):
            return
        chunk = unread[0]
        start = max(chunk.started, self._device_free)
        until = self.pace.nearly_done(chunk.width, chunk.steps, start)
        while not has_ended(chunk.waiting):
            left = until - self.pace.clock()
            if left <= 0:
                return
            time.sleep(min(left, POLL_S))

    def _end_of_wait(self, chunk: UnreadChunk) -> float | None:
        """Returns the seconds that a chunk took which the host has just waited for.

        The device works on one call after another. None: the host, too, did something
        long after it had started the chunk, or the chunk carried a piece of a prompt.
        """
        start = max(chunk.started, self._device_free)
        self._device_free = self.pace.clock()
        if chunk.carries or self._compiled() != chunk.compiled:
            return None
        return self._device_free - start

    def _compiled(self) -> tuple[int, int]:
        return self.programs.compiled()[0], self.counters.reshapes

    def _deliver_prefill(self, call: PrefillCall, events: Any, scores: Any) -> None:
        """Delivers the scores, and the first tokens of prompts that are complete."""
        if scores is not None:
            deliver_scores(scores, call.pieces, call.records, self.counters)
        if (events.flag == decode_state.PREEMPTED).any():
            raise RuntimeError("the device had too few pages for an admitted prompt")
        one_iteration = jax.tree.map(lambda x: x[None], events)  # [1, P]
        deliver_events(one_iteration, self.tracker, self.counters)
        for piece, record, flag in zip(call.pieces, call.records, events.flag):
            if piece.last and flag != decode_state.TOKEN:  # it never waits for a slot
                self.tracker.finish(record, device_ended=True)
                self.tracker.free_row(record)

    def _count_iterations(self, chunk: UnreadChunk, events: Any) -> int:
        """Adds a chunk's iterations to the counters, and to the history if traced.

        Returns how many there were. It also notes which requests are in the slots after
        the chunk.
        """
        # Of each iteration: 1 + D rows if the engine drafts tokens, else one.
        rows = self.programs.spec.most_tokens
        flag_KTW = events.flag.reshape(-1, rows, events.flag.shape[1])
        request_KW = events.request[::rows]
        emitted_KTW = (flag_KTW != decode_state.IDLE) & (
            flag_KTW != decode_state.PREEMPTED
        )
        busy = emitted_KTW[:, 0]
        iterations = len(busy)
        busy_iterations = np.flatnonzero(busy.any(axis=1))
        last_busy = int(busy_iterations.max(initial=-1))
        if not self.programs.spec.fixed_trip_count:  # it ended after the last event
            iterations = last_busy + 1
        is_last_TW = np.isin(
            flag_KTW[last_busy], (decode_state.LENGTH, decode_state.STOP)
        )
        stays = busy[last_busy] & ~is_last_TW.any(axis=0)
        numbers = np.where(stays, request_KW[last_busy], decode_state.NO_REQUEST)
        self.slots = numbers.tolist()
        self.counters.iterations += iterations
        self.counters.slot_iterations += iterations * chunk.width
        self.counters.busy += int(busy.sum())
        if events.drafted is not None:
            self.counters.drafted += int(events.drafted.sum())
            self.counters.accepted += int(emitted_KTW[:, 1:].sum())
        if self.history is not None:
            requests = np.where(busy, request_KW, -1)[:iterations]
            self.history.append(
                TracedChunk(time.perf_counter(), requests, chunk.length, chunk.pages)
            )
        return iterations


def has_ended(result: Any) -> bool:
    """Whether the device has computed an array; True if it is None."""
    return result is None or result.is_ready()
