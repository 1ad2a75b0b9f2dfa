"""What an engine is doing at one moment, as far as the host knows."""

import dataclasses
from typing import NamedTuple

from ladder_jax.serve.counters import Counters
from ladder_jax.serve.programs import Programs
from ladder_jax.serve.request_queue import RequestQueue
from ladder_jax.serve.scheduler import Phase
from ladder_jax.serve.stepper import Stepper


class SlotView(NamedTuple):
    """The request that a slot decodes."""

    request: int  # Request.number
    prompt_tokens: int
    tokens: int  # output tokens that have arrived on the host
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What an engine is doing at one moment, see Engine.snapshot."""

    # As many as the engine has at most: a slot that is not compiled now is empty, too.
    # They are those after the last chunk that the host has read.
    slots: tuple[SlotView | None, ...]
    waiting: int  # requests in the queue
    queue_size: int  # the most that can wait there
    prefilling: int  # requests whose prompts the device computes
    staged: int  # prefilled requests that wait for a slot
    staging_size: int  # the most that are prefilling or staged
    kv_used_bytes: int  # keys and values of unfinished requests, on one device
    kv_total_bytes: int  # the most that slots and staging hold, on one device
    prefix_used_bytes: int  # of the prefix cache, on one device
    counters: Counters  # a copy
    programs_compiled: int

    @property
    def busy_slots(self) -> int:
        """How many slots decode a request."""
        return sum(slot is not None for slot in self.slots)


def take(stepper: Stepper, queue: RequestQueue, programs: Programs) -> Snapshot:
    """Returns a Snapshot. Any thread may call it; it waits for no other and no device.

    A step may change the engine meanwhile, so the numbers can be of moments that are a
    few milliseconds apart.
    """
    tracker, capacity = stepper.tracker, stepper.capacity
    records = [record for record in tracker if record.phase is not Phase.DONE]
    phases = [record.phase for record in records]
    tokens = sum(
        record.computed + len(record.request.tokens) - record.generated
        for record in records
    )
    requests = {record.request.number: record.request for record in records}

    def view(number: int) -> SlotView | None:
        request = requests.get(number)
        if request is None or request.finish:
            return None
        return SlotView(
            number, len(request.prompt), len(request.tokens), request.max_tokens
        )

    slots = [view(number) for number in stepper.calls.slots]
    return Snapshot(
        slots=(*slots, *[None] * (capacity.slots - len(slots))),
        waiting=len(queue),
        queue_size=queue.size,
        prefilling=phases.count(Phase.PREFILLING),
        staged=phases.count(Phase.STAGED),
        staging_size=capacity.staging_size,
        kv_used_bytes=tokens * capacity.token_bytes,
        kv_total_bytes=capacity.memory["rows"],
        prefix_used_bytes=stepper.prefixes.used_bytes,
        counters=dataclasses.replace(stepper.counters),
        programs_compiled=programs.compiled()[0],
    )
