"""Counts of an engine's work: requests, tokens, chunks, prefill calls."""

from dataclasses import dataclass, fields


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
