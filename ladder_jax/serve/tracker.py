"""Keeps the phase of every request that an engine has admitted to the device."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ladder_jax.serve.request import Request
from ladder_jax.serve.scheduler import Phase, Work


@dataclasses.dataclass
class Chunk:
    """A chunk that runs, or that the host has not read yet: its number and size."""

    number: int
    steps: int


@dataclasses.dataclass
class Record:
    """Where one admitted request is."""

    request: Request
    phase: Phase
    staging_index: int | None  # None: it has left staging
    ticket: int  # it was the engine's ticket-th admission
    computed: int = 0  # prompt tokens whose keys and values are in staging
    first_chunk: int = 0  # the number of the first chunk that can admit it to a slot
    cancel: bool = False  # the next chunk must take it off the device


class Tracker:
    """All records of one engine, and the only place that changes their phase.

    A record stays after its request is done until the device holds nothing of it.
    """

    def __init__(self, places: int) -> None:
        self.places = places  # in staging
        self._records: dict[int, Record] = {}  # by request number, in admission order

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, number: int) -> Record | None:
        """Returns the record of a request number."""
        return self._records.get(number)

    def phase(self, phase: Phase) -> list[Record]:
        """Returns the records in a phase, in the order of their admission."""
        return [r for r in self._records.values() if r.phase is phase]

    def live(self) -> list[Record]:
        """Returns the records of the requests that are not done."""
        return [r for r in self._records.values() if r.phase is not Phase.DONE]

    def free_places(self) -> list[int]:
        """Returns the indices in staging that no request holds."""
        taken = {record.staging_index for record in self._records.values()}
        return [index for index in range(self.places) if index not in taken]

    # ------------------------------------------------------------ transitions

    def admit(self, request: Request, staging_index: int, ticket: int) -> Record:
        """queued -> prefilling: gives a request a place in staging."""
        record = Record(request, Phase.PREFILLING, staging_index, ticket)
        self._records[request.number] = record
        return record

    def stage(self, record: Record, first_chunk: int) -> None:
        """prefilling -> staged: its whole prompt is computed."""
        record.computed = len(record.request.prompt)
        record.phase, record.first_chunk = Phase.STAGED, first_chunk

    def read(self, chunk: Chunk, waiting: Sequence[int]) -> None:
        """staged -> decoding, for those that a chunk has admitted to a slot.

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

    def finish(self, record: Record, device_knows: bool) -> None:
        """-> done. Unless the device ended it itself, the next chunk must cancel it."""
        if record.phase is Phase.PREFILLING:  # the device does not decode it yet
            record.staging_index = None
        elif record.phase is not Phase.DONE:
            record.cancel = not device_knows
        record.phase = Phase.DONE
        self._forget(record)

    def take_cancelled(self, most: int) -> list[int]:
        """Returns up to `most` request numbers for the next chunk to cancel."""
        records = [record for record in self if record.cancel][:most]
        for record in records:
            record.cancel = False
            self._forget(record)
        return [record.request.number for record in records]

    def cancelled(self) -> int:
        """Returns how many requests the next chunks must cancel."""
        return sum(record.cancel for record in self._records.values())

    def _forget(self, record: Record) -> None:
        done = record.phase is Phase.DONE
        if done and record.staging_index is None and not record.cancel:
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
            for record in self.phase(phase)
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
