"""Counts of an engine's work, and its trace: what every chunk did."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np


@dataclass
class Counters:
    """Counts of one engine since its start, or since `reset`."""

    submitted: int = 0  # requests
    finished: int = 0  # requests, however they ended
    tokens: int = 0  # output tokens that the device emitted
    chunks: int = 0
    syncs: int = 0  # times that the host waited for the device
    iterations: int = 0  # of the decode loop
    slot_iterations: int = 0  # the sum over iterations of the compiled width
    busy: int = 0  # the slot iterations that emitted a token
    drafted: int = 0  # tokens that speculation has guessed
    accepted: int = 0  # of these, the tokens that were emitted
    prefill_calls: int = 0
    prefill_tokens: int = 0  # computed, without padding
    prefill_padded: int = 0  # computed, with padding
    carried: int = 0  # of the prefill calls: pieces that an iteration has carried
    prefix_tokens: int = 0  # copied from a shared prefix, not computed
    reshapes: int = 0  # changes of the compiled shape
    preempted: int = 0  # times that a request lost its slot, as pages ran out
    failures: int = 0  # steps that an exception or an interrupt ended

    @property
    def occupancy(self) -> float:
        """The share of slot iterations that emitted a token."""
        return self.busy / max(self.slot_iterations, 1)

    @property
    def accepted_length(self) -> float:
        """The mean number of tokens that a request emitted in an iteration."""
        return (self.busy + self.accepted) / max(self.busy, 1)

    def reset(self) -> None:
        """Sets every count to 0."""
        for field in fields(self):
            setattr(self, field.name, 0)


class TracedChunk(NamedTuple):
    """What a chunk did: an entry of Engine.history."""

    seconds: float  # of the clock, when the host had read it
    # [K, W]: the number of the request that each slot decoded in each iteration, or -1.
    requests: np.ndarray
    length: int  # tokens that each row has memory for
    # The most pages that requests and stored prefixes may have had when it ended; 0
    # without pages.
    pages: int
