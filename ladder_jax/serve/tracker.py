"""Tracks the phase of every request that an engine has admitted to staging."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ladder_jax.serve.request import Request
from ladder_jax.serve.scheduler import Phase, Work

NEVER = 2**62  # no chunk has this number


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
    prompt: np.ndarray  # int32; with the tokens that it had generated before
    generated: int  # how many they are: it has lost its slot before
    computed: int = 0  # prompt tokens whose keys and values are in staging
    first_chunk: int = 0  # the number of the first chunk that can move it to a slot
    cancel: bool = False  # the next chunk must remove it from the device
    # Of the prefix cache: those that begin its prompt.
    blocks: list[Any] = dataclasses.field(default_factory=list)

    @property
    def is_scored(self) -> bool:
        """Whether prefill gives the log-probabilities of its prompt to the request."""
        return self.request.wants_scores and not self.generated


class Tracker:
    """The records of one engine. Only its methods change their phase.

    The record of a finished request stays until the device has no data of the request.
    """

    def __init__(self, staging_size: int, has_pages: bool = False) -> None:
        self.staging_size = staging_size  # rows
        # Whether a chunk must remove a prompt that is half computed: it has pages.
        self.has_pages = has_pages
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
        record = Record(
            request,
            Phase.PREFILLING,
            staging_index,
            ticket,
            whole_prompt(request),
            generated=len(request.tokens),
        )
        self._records[request.number] = record
        return record

    def stage(self, record: Record, first_chunk: int) -> None:
        """prefilling -> staged: the device computes the last piece of its prompt."""
        record.computed = len(record.prompt)
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
            if self.has_pages and record.computed:  # but has pages for it
                record.cancel, record.first_chunk = True, NEVER
            else:
                record.staging_index = None
        elif record.phase is not Phase.DONE:
            record.cancel = not device_ended
        record.phase = Phase.DONE
        self._forget(record)

    def free_row(self, record: Record) -> None:
        """Frees the row of staging of a request that is done without ever waiting."""
        record.staging_index = None
        self._forget(record)

    def preempt(self, record: Record) -> None:
        """Any phase -> queued: the device has taken its slot and its pages."""
        self._records.pop(record.request.number, None)

    def take_cancelled(self, most: int, chunk_number: int) -> list[int]:
        """Returns up to `most` request numbers for a chunk, the next one, to cancel."""
        records = [record for record in self if record.cancel][:most]
        for record in records:
            record.cancel = False
            if record.first_chunk == NEVER:
                record.first_chunk = chunk_number
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
        return tuple(self.all_work(unread, self.in_phase(phase)))

    def all_work(
        self, unread: Iterable[Chunk], records: Iterable[Record] | None = None
    ) -> list[Work]:
        """Returns the work of these records, or of all that the device may have."""
        chunks = list(unread)

        def unread_steps(record: Record) -> int:
            if record.phase is Phase.PREFILLING:
                return 0
            first = record.first_chunk if record.phase is Phase.STAGED else 0
            return sum(chunk.steps for chunk in chunks if chunk.number >= first)

        return [
            record_work(record, unread_steps(record))
            for record in (self if records is None else records)
        ]


def whole_prompt(request: Request) -> np.ndarray:
    """Returns its prompt and the tokens that it has generated, int32."""
    output = np.asarray(request.tokens, np.int32)
    return np.concatenate([np.asarray(request.prompt, np.int32), output])


def work_of(request: Request) -> Work:
    """Returns what the scheduler needs to know of a queued request.

    What it has generated, before it lost its slot, is a part of its prompt.
    """
    generated = len(request.tokens)
    return Work(
        prompt=len(request.prompt) + generated,
        max_tokens=request.max_tokens - generated,
        submitted=request.submitted,
    )


def record_work(record: Record, unread_steps: int) -> Work:
    """Returns what the scheduler needs to know of an admitted request."""
    request = record.request
    return Work(
        prompt=len(record.prompt),
        max_tokens=request.max_tokens - record.generated,
        computed=record.computed,
        emitted=len(request.tokens) - record.generated,
        unread_steps=unread_steps,
        submitted=request.submitted,
    )
