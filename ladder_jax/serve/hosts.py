"""One engine over the devices of several processes: process 0 decides, all follow.

Clients submit to the engine of process 0. A step depends on nothing but the requests
that the step before left, those that have arrived or were cancelled since then, and how
many iterations fit in decode.burst_ms. So process 0 sends its arrivals and what fits by
its clock before each step, and every process takes the same step. Nobody waits for an
answer: the devices' collectives keep the processes together.

    process 0 | send 1 | step 1 | send 2 | step 2 |
    process 1     | get 1 | step 1 | get 2 | step 2

An engine without work sends nothing, and the others wait. A step that fails in one
process ends all of them: their states would differ.
"""

import dataclasses
import logging
from typing import Any, NamedTuple

from flax import serialization

from ladder_jax.hardware.channel import Channel, Watch
from ladder_jax.sampling import SamplingParams
from ladder_jax.serve.engine import Engine
from ladder_jax.serve.request import Request
from ladder_jax.serve.submission import Submission

log = logging.getLogger(__name__)
BLOCK = 64  # messages that are deleted together
POLL = 1.0  # seconds that a process waits at a time, so that it notices signals


class Arrivals(NamedTuple):
    """What process 0 sends before a step."""

    submitted: list[tuple[int, Submission]]  # with the numbers of their requests
    cancelled: list[int]  # numbers of requests
    fitting: dict[int, int]  # Pace.fitting of process 0
    end: str | None = None  # no step follows; the reason if it is an error, or ""


def encode(arrivals: Arrivals) -> bytes:
    """Returns arrivals as bytes. They hold numbers and text, never code."""
    values = dict(
        submitted=[(number, _to_dict(x)) for number, x in arrivals.submitted],
        cancelled=arrivals.cancelled,
        fitting=list(arrivals.fitting.items()),
        end=arrivals.end,
    )
    return serialization.msgpack_serialize(_with_lists(values))


def decode(message: bytes) -> Arrivals:
    """The inverse of `encode`."""
    values = serialization.msgpack_restore(message)
    submitted = [(number, _from_dict(x)) for number, x in values["submitted"]]
    fitting = dict(values["fitting"])
    return Arrivals(submitted, values["cancelled"], fitting, values["end"])


def _to_dict(submission: Submission) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(submission)]
    values = {name: getattr(submission, name) for name in fields}
    return values | dict(params=submission.params._asdict())


def _from_dict(values: dict[str, Any]) -> Submission:
    params = SamplingParams(**values.pop("params"))
    fields = {name: _with_tuples(value) for name, value in values.items()}
    return Submission(**fields, params=params)


def _with_lists(value: Any) -> Any:
    """msgpack has lists, but no tuples."""
    if isinstance(value, (list, tuple)):
        return [_with_lists(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_lists(item) for name, item in value.items()}
    return value


def _with_tuples(value: Any) -> Any:
    """A submission has tuples, but no lists."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------- process 0


class LeadingEngine(Engine):
    """The engine of process 0, which clients use like any other engine.

    `close` also ends the engines of the other processes; it cannot be started again.
    A cancelled request ends at the next step, not at once.

    Args:
      channel: to the other processes. watch: notes when one is lost.
      arguments, options: those of Engine.
    """

    def __init__(
        self, channel: Channel, watch: Watch, *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._channel, self._watch = channel, watch
        # Since the last step, under self._lock.
        self._arrived: list[Request] = []
        self._cancelled: list[Request] = []
        self._has_work = self._has_ended = False
        self._deleted = 0  # blocks of messages
        self.stepper.most_errors, self.stepper.explain = 1, self._explain
        watch.on_lost = self._lose

    @property
    def waiting(self) -> int:
        """How many requests wait on the host."""
        return len(self._queue) + len(self._arrived)

    def _check_thread(self) -> None:
        if self._has_ended:
            raise RuntimeError("the engine of several processes was closed for good")

    def _accept(self, request: Request) -> None:
        self._queue.check_room(len(self._arrived))
        self._arrived.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request at the next step; at once, if it waits for its first step."""
        with self._lock:
            if request in self._arrived:
                self._arrived.remove(request)
                self.counters.finished += request.put(finish="cancelled")
            elif not request.finish:
                self._cancelled.append(request)
        self._wake.set()

    def step(self, wait: bool = False) -> bool:
        """Takes one step with all processes; returns whether there was anything to do.

        wait: has no effect, since the other processes do not know how long.
        An exception ends the engine, see `failed`, and those of the other processes.
        """
        with self._stepping:
            if self.failed is not None or self._has_ended:
                return False
            arrived, cancelled = self._take_arrivals()
            if not (arrived or cancelled or self._has_work):
                return False
            failures = self.counters.failures
            fitting = dict(self.stepper.pace.fitting)
            try:
                self._send(
                    Arrivals(
                        [(request.number, request.submission) for request in arrived],
                        [request.number for request in cancelled],
                        fitting,
                    )
                )
                for request in arrived:
                    self._queue.add(request)
                for request in cancelled:
                    self.stepper.cancel(request)
                self._has_work = self.stepper.step(fitting)
            except Exception as error:
                self.stepper.end(self._explain(error))
                for request in arrived:
                    request.put(finish="error", error=self.failed)
            if self.failed is None and self.counters.failures > failures:
                self.stepper.end(RuntimeError("a step failed"))
            if self.failed is not None:
                self._end(self.failed)
            return self._has_work

    def _take_arrivals(self) -> tuple[list[Request], list[Request]]:
        with self._lock:
            taken = self._arrived, self._cancelled
            self._arrived, self._cancelled = [], []
        return taken

    def _send(self, arrivals: Arrivals) -> None:
        """Sends the message of a step, and deletes those that all have read."""
        step = self._watch.step
        self._channel.put(_key(step), encode(arrivals))
        self._watch.step = step + 1
        read = self._watch.least_step()
        while self._deleted < read // BLOCK:
            self._channel.delete(f"steps/{self._deleted}")
            self._deleted += 1

    def _explain(self, error: BaseException) -> BaseException:
        """Returns why a step failed: it may take a while to notice a lost process.

        An error of the devices' network is often all that is left of it.
        """
        lost = self._watch.wait_for_lost()
        return RuntimeError(lost) if lost else error

    def _lose(self, reason: str) -> None:
        """Fails all requests, whatever the engine's thread waits for."""
        log.error("%s: the server ends", reason)
        error = RuntimeError(reason)
        self.stepper.failed = error
        self._queue.close(error)
        live = [record.request for record in self.stepper.tracker]
        for request in [*self._queue, *live]:
            request.put(finish="error", error=error)
        self._end(error)

    def close(self) -> None:
        """Ends the engine's thread, and the engines of the other processes."""
        if self._watch.lost is None:
            super().close()
        else:  # the thread may wait for the devices for ever
            self._closing = True
            self._wake.set()
        self._end(self.failed)

    def _end(self, error: BaseException | None) -> None:
        """Tells the other processes to end, and why if it is an error."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
            arrived, self._arrived = self._arrived, []
        for request in arrived if error else []:
            request.put(finish="error", error=error)
        reason = "" if error is None else " ".join(str(error).split())
        try:
            self._send(Arrivals([], [], {}, reason))
        except Exception:  # then the network is lost, and they notice that
            log.exception("the other processes cannot be told to end")


def _key(step: int) -> str:
    return f"steps/{step // BLOCK}/{step % BLOCK}"


# ---------------------------------------------------------------- the others


class FollowingEngine(Engine):
    """The engine of another process: it takes the steps of process 0's engine.

    Its arguments are those of LeadingEngine. All processes must make their engines with
    the same ones, and compile them with `warm_up` at the same time.
    """

    def __init__(
        self, channel: Channel, watch: Watch, *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._channel, self._watch = channel, watch
        self._requests: dict[int, Request] = {}  # some of them may have ended
        self._forget_at = BLOCK
        self.stepper.most_errors = 1

    def follow(self) -> None:
        """Takes steps until process 0 ends.

        Raises RuntimeError, one line, if process 0 ended by an error, or if this
        process has one.
        """
        while (arrivals := self._next()).end is None:
            failures = self.counters.failures
            with self._stepping:
                self._apply(arrivals)
                self.stepper.step(arrivals.fitting)
            if self.failed is not None or self.counters.failures > failures:
                raise RuntimeError(f"a step failed: {self.failed or 'see the log'}")
        if arrivals.end:
            raise RuntimeError(f"process 0 ended: {arrivals.end}")

    def _next(self) -> Arrivals:
        """Waits for the message of the next step."""
        while True:
            try:
                message = self._channel.get(_key(self._watch.step), POLL)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:100]
                raise RuntimeError(f"process 0 is lost: {reason}") from error
            if message is not None:
                self._watch.step += 1
                return decode(message)

    def _apply(self, arrivals: Arrivals) -> None:
        for number, submission in arrivals.submitted:
            request = Request(self, number, submission, self._text_filter(submission))
            self._requests[number] = request
            self._queue.add(request)
            self.counters.submitted += 1
        for number in arrivals.cancelled:
            if number in self._requests:  # else it has ended
                self.stepper.cancel(self._requests[number])
        if len(self._requests) > self._forget_at:
            live = {n: x for n, x in self._requests.items() if not x.finish}
            self._requests, self._forget_at = live, 2 * len(live) + BLOCK
