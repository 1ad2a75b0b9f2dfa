"""Tracks the phase of every request that an engine has admitted to staging."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ladder_jax.serve.request import Request
from ladder_jax.serve.scheduler import Phase, Work


@dataclasses.dataclass
class Chunk:
    """A chunk that the host has started."""

    number: int  # from 0
    steps: int  # iterations


@dataclasses.dataclass
class Record:
    """The phase of one admitted request, and its row of staging."""

    request: Request
    phase: Phase
    staging_index: int | None  # None: it has left staging
    ticket: int  # the number of its admission, see submission.TICKETS
    computed: int = 0  # prompt tokens whose keys and values are in staging
    first_chunk: int = 0  # the number of the first chunk that can move it to a slot
    cancel: bool = False  # the next chunk must remove it from the device


class Tracker:
    """The records of one engine. Only its methods change their phase.

    The record of a finished request stays until the device has no data of the request.
    """

    def __init__(self, staging_size: int) -> None:
        self.staging_size = staging_size  # rows
        self._records: dict[int, Record] = {}  # by request number, in admission order

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, number: int) -> Record | None:
        """Returns the record of a request number."""
        return self._records.get(number)

    def in_phase(self, phase: Phase) -> list[Record]:
        """Returns the records in a phase, in the order of their admission."""
        return [r for r in self._records.values() if r.phase is phase]

    def live(self) -> list[Record]:
        """Returns the records of the requests that are not done."""
        return [r for r in self._records.values() if r.phase is not Phase.DONE]

    def free_staging_indices(self) -> list[int]:
        """Returns the rows of staging that no request has."""
        in_use = {record.staging_index for record in self._records.values()}
        return [index for index in range(self.staging_size) if index not in in_use]

    # ------------------------------------------------------------ transitions

    def admit(self, request: Request, staging_index: int, ticket: int) -> Record:
        """queued -> prefilling: gives a request a row of staging."""
        record = Record(request, Phase.PREFILLING, staging_index, ticket)
        self._records[request.number] = record
        return record

    def stage(self, record: Record, first_chunk: int) -> None:
        """prefilling -> staged: the device computes the last piece of its prompt."""
        record.computed = len(record.request.prompt)
        record.phase, record.first_chunk = Phase.STAGED, first_chunk

    def leave_staging(self, chunk: Chunk, waiting: Sequence[int]) -> None:
        """staged -> decoding: for the requests that a chunk has moved to a slot.

        waiting: [R], the request numbers in staging after the chunk.
        """
        for record in self:
            index = record.staging_index
            if index is None or record.phase is Phase.PREFILLING:
                continue
            if record.first_chunk > chunk.number:
                continue
            if waiting[index] != record.request.number:
                record.staging_index = None
                if record.phase is Phase.STAGED:
                    record.phase = Phase.DECODING
                self._forget(record)

    def finish(self, record: Record, device_ended: bool) -> None:
        """Any phase -> done.

        device_ended: whether the device has ended it; if not, the next chunk must.
        """
        if record.phase is Phase.PREFILLING:  # the device does not decode it yet
            record.staging_index = None
        elif record.phase is not Phase.DONE:
            record.cancel = not device_ended
        record.phase = Phase.DONE
        self._forget(record)

    def take_cancelled(self, most: int) -> list[int]:
        """Returns up to `most` request numbers for the next chunk to cancel."""
        records = [record for record in self if record.cancel][:most]
        for record in records:
            record.cancel = False
            self._forget(record)
        return [record.request.number for record in records]

    def cancelled_count(self) -> int:
        """Returns how many requests the next chunks must cancel."""
        return sum(record.cancel for record in self._records.values())

    def _forget(self, record: Record) -> None:
        """Removes a record if its request is done and not on the device any more."""
        is_done = record.phase is Phase.DONE
        if is_done and record.staging_index is None and not record.cancel:
            self._records.pop(record.request.number, None)

    # ------------------------------------------------------------ load

    def work(self, phase: Phase, unread: Iterable[Chunk]) -> tuple[Work, ...]:
        """Returns the work of the requests in a phase, for the scheduler.

        unread: the chunks that the host has started and not read.
        """
        chunks = list(unread)

        def unread_steps(record: Record) -> int:
            first = record.first_chunk if phase is Phase.STAGED else 0
            return sum(chunk.steps for chunk in chunks if chunk.number >= first)

        return tuple(
            work_of(record.request, record.computed, unread_steps(record))
            for record in self.in_phase(phase)
        )


def work_of(request: Request, computed: int = 0, unread_steps: int = 0) -> Work:
    """Returns what the scheduler needs to know of a request."""
    return Work(
        prompt=len(request.prompt),
        max_tokens=request.max_tokens,
        computed=computed,
        emitted=len(request.tokens),
        unread_steps=unread_steps,
        submitted=request.submitted,
    )
