"""Takes an engine's steps, as the scheduler plans them, and recovers from errors."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ladder_jax.config import Decode
from ladder_jax.serve import carrying
from ladder_jax.serve.calls import Calls
from ladder_jax.serve.capacity import Capacity
from ladder_jax.serve.counters import Counters, TracedChunk
from ladder_jax.serve.pace import Pace
from ladder_jax.serve.prefix_cache import PrefixCache
from ladder_jax.serve.programs import Programs
from ladder_jax.serve.request import Request
from ladder_jax.serve.request_queue import RequestQueue
from ladder_jax.serve.scheduler import Limits, Load, Phase, Scheduler, Step
from ladder_jax.serve.tracker import Record, Tracker, work_of

log = logging.getLogger(__name__)
# For how many steps a smaller shape must suffice before the state shrinks.
PATIENCE = 4
# After so many errors in a row, without a chunk that succeeded between them, the engine
# ends.
MOST_ERRORS = 3


class Stepper:
    """Moves requests from the queue through the phases, one step after another.

    Only one thread at a time may call its methods; `cancel` is safe from any thread.

    Args:
      options: config.Decode; its `slots` is a number.
      queue: the requests that wait on the host.
      scheduler, trace, pipelined: see Engine.

    failed: see Engine.failed. pace: measures the time of the iterations.
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
            tokens_per_step=programs.spec.most_tokens,
        )
        self.counters = Counters()
        self.pace = Pace(options.burst_ms, options.steps_per_call, capacity.widths)
        self._fitting: Mapping[int, int] = {}  # of the present step
        self._expects_arrivals = False
        self.history: list[TracedChunk] = []
        # Requests that clients have cancelled since the last step.
        self._cancelled: deque[Request] = deque()
        self.most_errors = MOST_ERRORS
        # Gets the error that ends the engine; returns the one to report.
        self.explain: Callable[[BaseException], BaseException] = lambda error: error
        self._errors = 0  # since the last chunk that succeeded
        self._waits = False  # whether wait_for_arrivals waits
        self._waited_until: float | None = None  # of the step before, if it waited
        self.failed: BaseException | None = None
        # Whether a step is changing this object and the device's state: if an interrupt
        # ends the step, they may disagree.
        self._changing = False
        self._reset()

    @property
    def tracker(self) -> Tracker:
        """The phases of the requests on the device."""
        return self.calls.tracker

    def cancel(self, request: Request) -> None:
        """Ends a request. Any thread may call it at any time."""
        if request.put(finish="cancelled"):
            self.queue.remove(request)
            self._cancelled.append(request)

    # ------------------------------------------------------------ a step

    def step(self, fitting: Mapping[int, int], wait: bool = False) -> bool:
        """Takes one step; returns whether there was anything to do.

        wait: whether `wait_for_arrivals` follows. Chunks are then short while slots are
        free, see scheduler.next_chunk_steps.

        fitting: {width: iterations that fit in decode.burst_ms}, as in Pace. A width
        that it lacks has no limit.

        If the step raises an exception, the requests on the device fail, and the engine
        continues with an empty state and the queued requests. If there is no request on
        the device, the step raises the exception. After MOST_ERRORS exceptions in a row
        the engine ends, see `end`; a step then does nothing.

        The requests also fail if an interrupt (KeyboardInterrupt or another exception
        that is not an Exception) ended the step before this one while it changed the
        state.
        """
        if self.failed is not None:
            self.end(self.failed)  # an interrupt may have ended it halfway
            return False
        if self._changing:
            self.counters.failures += 1
            self._fail(RuntimeError("a step of the engine was interrupted halfway"))
            self._restart()
            return True
        try:
            self._changing = True
            self._fitting, self._expects_arrivals = fitting, wait
            had_work = self._step()
            if wait:
                self._prepare_wait()
            self._changing = False
            return had_work
        except Exception as error:  # after any exception the state may be lost
            log.exception("a decode step failed: its requests fail")
            self.counters.failures += 1
            was_reported = self._fail(error)
            self._count_error(error)
            self._restart()
            if not was_reported and self.failed is None:
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
            self.calls.copy_prefix(record)
        has_started = self.calls.start_chunk(self._prefill())
        if self._waited_until is not None:
            self.pace.add_host(self.pace.clock() - self._waited_until)
            self._waited_until = None
        has_prefilling = bool(self.tracker.in_phase(Phase.PREFILLING))
        # The new chunk stays unread while the device runs it.
        stay_unread = 1 if has_started and self.pipelined else 0
        has_unread = len(self.calls.unread) > stay_unread
        while len(self.calls.unread) > stay_unread:
            self._read_prefills()
            self._changing = False  # an interrupt during the wait loses nothing
            results = self.calls.fetch()
            self._changing = True
            self.calls.deliver(results)
            self._errors = 0
        return has_started or has_prefilling or has_unread

    def _read_prefills(self) -> None:
        """Delivers the results of the prefill calls before the oldest unread chunk."""
        self._changing = False
        results = self.calls.fetch_prefills()
        self._changing = True
        self.calls.deliver_prefills(results)

    def _prepare_wait(self) -> None:
        """Decides whether `wait_for_arrivals` waits. Delivers first tokens."""
        live, unread = self.tracker.live(), self.calls.unread
        is_full = len(live) >= self.capacity.slots or len(self.queue) > 0
        if not (self.pipelined and unread) or is_full or self._cancelled:
            return
        if not self.tracker.in_phase(Phase.PREFILLING):
            # What a chunk carries ends with it: the next one starts before.
            if not unread[0].carries:
                self._read_prefills()
            self._waits = True

    def wait_for_arrivals(self) -> None:
        """Waits after a step(wait=True) until the device has nearly ended its chunk.

        The next chunk starts then, no earlier: a request that arrives meanwhile need
        not wait for one more chunk. There is no wait if such a request could not start,
        since others wait or fill the slots. Other methods may be called meanwhile.
        """
        if self._waits:
            self._waits = False
            self.calls.wait_until_nearly_done()
            self._waited_until = self.pace.clock()

    def _finish_cancelled(self) -> None:
        """Makes the next chunk remove the cancelled requests from the device."""
        while self._cancelled:
            request = self._cancelled[0]
            if record := self.tracker.get(request.number):
                self.tracker.finish(record, device_ended=False)
            self.counters.finished += 1
            self._cancelled.popleft()

    def _candidates(self) -> list[Request]:
        """Returns the first queued requests that staging has rows and pages for."""
        room = self.calls.room()
        if any(request.finish for request in self.queue.first(room)):
            self.queue.remove_finished()
        return self.calls.fitting(self.queue.first(room))

    def _plan(self, candidates: list[Request], prefill_spent: int = 0) -> Step:
        """Asks the scheduler what to do next."""
        tracker, unread, width = self.tracker, self.calls.unread, self.programs.width
        load = Load(
            queued=len(self.queue),
            candidates=tuple(map(work_of, candidates)),
            prefilling=tracker.work(Phase.PREFILLING, unread),
            staged=tracker.work(Phase.STAGED, unread),
            decoding=tracker.work(Phase.DECODING, unread),
            cancelled=tracker.cancelled_count(),
            unread_chunks=sum(chunk.steps > 0 for chunk in unread),
            prefill_spent=prefill_spent,
            width=width,
            length=self.programs.length,
            fitting_steps=self._fitting.get(width),
            hiding_steps=self.pace.hiding(width) if self._expects_arrivals else None,
            smaller_steps=self._smaller_steps,
        )
        return self.scheduler(load, self.limits)

    def _admit(self, requests: list[Request]) -> list[Record]:
        """Gives each request a row of staging; returns their records."""
        records = []
        for request in requests:
            # For a moment, the request is on the device and in the queue: an interrupt
            # between the two lines does not lose it.
            record = self.calls.admit(request)
            if self.queue.remove(request):
                if request.admitted is None:  # it has not lost a slot before
                    request.admitted = time.perf_counter()
                records.append(record)
            else:  # the client has cancelled it since the step was planned
                self.tracker.finish(record, device_ended=False)
        return records

    def _prefill(self) -> Step:
        """Starts the prefill calls of a step; returns the plan for its chunk."""
        computed = 0
        while True:
            step = self._plan([], computed)
            if not step.prefill_budget:
                return step
            decoding = bool(step.chunk_steps and self.tracker.in_phase(Phase.DECODING))
            tokens = self.calls.prefill(step.prefill_budget, may_carry=decoding)
            # The rest of the budget is below the smallest width, or a chunk carries.
            if not tokens:
                return step
            computed += tokens

    # ------------------------------------------------------------ recovery

    def end(self, error: BaseException) -> None:
        """Ends the engine: all its requests fail, and the queue accepts no more."""
        self.failed = error
        self.queue.close(error)
        self._fail(error)
        for request in self.queue:
            self.counters.finished += request.put(finish="error", error=error)
            self.queue.remove(request)
        self.calls = self._no_calls()

    def _fail(self, error: BaseException) -> bool:
        """Ends all requests on the device, whose state may be damaged.

        Returns whether there were any requests.
        """
        live = self.tracker.live()
        for record in live:
            ended = record.request.put(finish="error", error=error)
            self.counters.finished += ended
        self.queue.remove_finished()
        return bool(live)

    def _count_error(self, error: Exception) -> None:
        """Ends the engine after too many errors in a row."""
        self._errors += 1
        if self._errors >= self.most_errors:
            log.error("the engine ends after %d errors in a row", self._errors)
            self.end(self.explain(error))

    def _restart(self) -> None:
        """Resets the state. The device may refuse to allocate an empty one, too."""
        while self.failed is None:
            try:
                return self._reset()
            except Exception as error:
                log.exception("an empty decode state cannot be allocated")
                self._count_error(error)

    def _reset(self) -> None:
        """Replaces the decode state by an empty one, and forgets all its requests."""
        self.calls = self._no_calls()
        self._smaller_steps = 0
        self.prefixes.clear()
        self.programs.reset()
        self._changing = False

    def _no_calls(self) -> Calls:
        return Calls(
            self.options,
            self.capacity,
            self.programs,
            self.prefixes,
            self.counters,
            self.pace,
            self.history if self.trace else None,
            self.queue.put_back,
        )

    def warm_up(self, progress: Callable[[list[Any]], Any]) -> None:
        """Compiles every program, see Engine.warm_up."""
        if self.tracker.live() or self.calls.unread:
            raise RuntimeError(
                "the device works on requests: call warm_up before the first"
            )
        self._changing = True
        self.programs.warm_up(progress)
        if self.capacity.carry_tokens:
            self.programs.carry_saves = carrying.measure(self.programs)
        self._changing = False
