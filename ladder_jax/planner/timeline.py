"""Simulates a scheduled program, to find which communication overlaps with compute.

A device issues its operations one after another. A synchronous collective stops the
device until the transfer has ended. An asynchronous one is two operations, `start` and
`done`. Its transfer uses links while the device computes the operations between the
two, and `done` waits for the rest of the transfer:

    device   | start | product ............ | done: wait | next product
    links            | transfer ........................ |
                       hidden                 exposed

Two collectives that share a link send one after the other; the latency of the second
passes while the first still sends.

On TPU, XLA prefetches weights from HBM into VMEM by asynchronous copies. A copy uses
the HBM bandwidth that the running instructions leave free, the oldest copy first, and
its `done` waits for the rest. Copies continue while the device waits for a collective,
so that such a wait may shorten a later wait for a prefetch.

Hence `play` simulates the program twice: once as scheduled, and once with asynchronous
collectives that take no time.

    exposed   the time by which waits are shorter in the second simulation, plus the
              whole time of synchronous collectives
    interference   the time by which asynchronous collectives slow down the instructions
              that run beside them: they take a GPU's cores and HBM bandwidth
    compute   the rest of the step: instructions, and waits for prefetched weights

The program has few layers and stands for one with many, so that the operations of one
layer may count more often than those of another (`Operation.count`). The difference of
the two total times would mix such layers. So `attribute` compares the simulations wait
by wait, and each wait counts as often as its own layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ladder_jax.hardware.cost import Transfer
from ladder_jax.planner import hlo
from ladder_jax.planner import operations as ops
from ladder_jax.planner.hlo import Module


@dataclass
class Period:
    """From `start` to `end`, in seconds from the start of the program."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Collective(Period):
    """The transfer of one collective of the schedule. Times are of one execution."""

    operation: ops.StartCollective
    window: float = 0.0  # time that the device works between `start` and `done`
    exposed: float = 0.0  # time that the device waits during the transfer
    unoverlapped: float = 0.0  # time of the transfer in which no earlier one runs

    @property
    def name(self) -> str:
        return self.operation.name

    @property
    def kind(self) -> str:
        return self.operation.kind

    @property
    def scope(self) -> str:
        return self.operation.scope

    @property
    def bytes(self) -> int:
        return self.operation.bytes

    @property
    def groups(self) -> hlo.Groups:
        return self.operation.groups

    @property
    def asynchronous(self) -> bool:
        return self.operation.asynchronous

    @property
    def count(self) -> float:
        return self.operation.count

    @property
    def hidden(self) -> float:
        return max(self.seconds - self.exposed, 0.0)


class Span(NamedTuple):
    """A period in which the device works, or waits for prefetched weights."""

    name: str  # of the instruction, or "prefetch"
    scope: str
    start: float
    end: float
    executions: float  # in a full step


@dataclass
class Event(Period):
    """A period in which the device works or waits. A wait may have length 0."""

    # "compute": the device works. "prefetch", "collective": it waits for one.
    kind: str
    operation: ops.Operation
    # Seconds of a wait for a collective that `attribute` counts as exposed.
    exposed: float = 0.0
    interference: float = 0.0  # seconds that collectives add to an instruction


@dataclass
class Timeline:
    """The simulated step of a program. Totals are in seconds, and count every operation
    as often as its `count` says."""

    collectives: list[Collective]
    events: list[Event]

    @property
    def step(self) -> float:
        return sum(event.seconds * event.operation.count for event in self.events)

    @property
    def exposed(self) -> float:
        """The time that communication adds to the step."""
        return sum(event.exposed * event.operation.count for event in self.events)

    @property
    def interference(self) -> float:
        """The time by which communication slows down what runs beside it."""
        return sum(event.interference * event.operation.count for event in self.events)

    @property
    def compute(self) -> float:
        """Instructions and waits for prefetched weights."""
        return self.step - self.exposed - self.interference

    @property
    def prefetch(self) -> float:
        """Waits for prefetched weights."""
        return sum(
            (span.end - span.start) * span.executions
            for span in self.spans
            if span.name == "prefetch"
        )

    @property
    def spans(self) -> list[Span]:
        """The periods in which the device works or waits for prefetched weights.

        The part of a wait for a collective that is not exposed counts as a prefetch:
        without communication the device would wait for weights instead.
        """
        return list(self._spans())

    def _spans(self) -> Iterator[Span]:
        for event in self.events:
            name, start = event.kind, event.start
            if event.kind == "compute":
                name = event.operation.name
            elif event.kind == "collective":
                name, start = "prefetch", event.start + event.exposed
            if event.end > start:
                operation = event.operation
                yield Span(name, operation.scope, start, event.end, operation.count)

    @property
    def waits(self) -> list[tuple[float, float]]:
        """(start, end) of the exposed part of every wait for a collective."""
        return [
            (event.start, event.start + event.exposed)
            for event in self.events
            if event.exposed > 0
        ]


def play(module: Module, costs: ops.Costs) -> Timeline:
    """Simulates a scheduled module."""
    listed = ops.operations(module, costs)
    real, free = _Clock(), _Clock(asynchronous_is_free=True)
    for operation in listed:
        real.run(operation)
        free.run(operation)
    attribute(real.events, free.events, real.collectives)
    _find_unoverlapped(real.collectives)
    return Timeline(real.collectives, real.events)


# ---------------------------------------------------------------- the clock


@dataclass
class _Clock:
    """The state of one simulation."""

    asynchronous_is_free: bool = False  # asynchronous collectives take no time
    now: float = 0.0
    busy: float = 0.0  # `now` without the waits for collectives
    sending_until: float = 0.0  # the end of the collectives that have started
    events: list[Event] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    links: dict[object, float] = field(default_factory=dict)  # when each is free
    # By the name of the start operation: the collective, and `busy` at its start.
    started: dict[str, tuple[Collective, float]] = field(default_factory=dict)
    # By the name of the start operation, the oldest first: the seconds that HBM still
    # needs for the prefetch.
    prefetches: dict[str, float] = field(default_factory=dict)

    def run(self, operation: ops.Operation) -> None:
        match operation:
            case ops.Compute():
                self.drain(operation.spare_hbm)
                slowed = operation.slowed(self.sending_until - self.now)
                self.spend("compute", operation, operation.seconds + slowed)
                self.events[-1].interference = slowed
            case ops.StartPrefetch():
                self.prefetches[operation.name] = operation.seconds
            case ops.EndPrefetch():
                left = self.end_prefetch(operation.started)
                self.spend("prefetch", operation, left)
            case ops.StartCollective():
                self.start(operation)
            case ops.EndCollective():
                collective, busy = self.started.pop(operation.started)
                collective.window += self.busy - busy
                self.wait(operation, collective)

    def spend(self, kind: str, operation: ops.Operation, seconds: float) -> None:
        """Advances the clock, and records what the device does in that time."""
        end = self.now + seconds
        self.events.append(Event(self.now, end, kind, operation))
        self.now = end
        if kind != "collective":
            self.busy += seconds

    def drain(self, spare: float) -> None:
        """Gives `spare` seconds of HBM to the prefetches, the oldest first."""
        for name, left in self.prefetches.items():
            used = min(left, spare)
            self.prefetches[name] -= used
            spare -= used

    def end_prefetch(self, name: str) -> float:
        """Ends a prefetch and all older ones. Returns the seconds that HBM needed."""
        waited = 0.0
        for other in self.prefetches:
            waited += self.prefetches[other]
            self.prefetches[other] = 0.0
            if other == name:
                break
        self.prefetches.pop(name, None)
        return waited

    def start(self, operation: ops.StartCollective) -> None:
        transfer = operation.transfer
        if operation.asynchronous and self.asynchronous_is_free:
            transfer = Transfer(0.0, 0.0)
        free = [self.links.get(link, 0.0) for link in transfer.links]
        start = max([self.now, *free])
        collective = Collective(start, start + transfer.seconds, operation)
        self.sending_until = max(self.sending_until, collective.end)
        self.links |= dict.fromkeys(transfer.links, start + transfer.bandwidth_s)
        self.collectives.append(collective)
        self.started[operation.name] = collective, self.busy
        if not operation.asynchronous:
            self.wait(operation, collective)

    def wait(self, operation: ops.Operation, collective: Collective) -> None:
        """Waits for the end of a collective, while HBM continues the prefetches."""
        seconds = max(collective.end - self.now, 0.0)
        self.drain(seconds)
        self.spend("collective", operation, seconds)


# ---------------------------------------------------------------- attribution


def attribute(
    real: list[Event], free: list[Event], collectives: list[Collective]
) -> None:
    """Sets the exposed time of every wait (`Event.exposed`) and of every collective
    (`Collective.exposed`, `window`).

    Both simulations have the same operations, and so the same events. A wait for a
    collective is exposed, unless a later wait for a prefetch is shorter in `real` than
    in `free`: then the device would have waited for HBM in any case. What the later
    wait saves is subtracted from the latest exposed waits first.

    Args:
      real: the events of the schedule.
      free: the events where asynchronous collectives take no time.
      collectives: the collectives of `real`.
    """
    exposed: list[Event] = []
    for event, other in zip(real, free, strict=True):
        if event.kind == "collective" and event.seconds > 0:
            event.exposed = event.seconds
            # A synchronous collective is exposed in full: no saving reduces it.
            if isinstance(event.operation, ops.EndCollective):
                exposed.append(event)
        elif event.kind == "prefetch":
            saved = other.seconds - event.seconds
            while saved > 0 and exposed:
                taken = min(saved, exposed[-1].exposed)
                exposed[-1].exposed -= taken
                saved -= taken
                if not exposed[-1].exposed:
                    exposed.pop()
    for event in real:
        if event.kind == "collective" and event.seconds > 0:
            _share(event, collectives)


def _share(wait: Event, collectives: list[Collective]) -> None:
    """Adds a wait to the collectives whose transfers run during it."""
    exposed = wait.exposed / wait.seconds
    for collective in collectives:
        end, start = min(collective.end, wait.end), max(collective.start, wait.start)
        if end > start:
            collective.exposed += (end - start) * exposed
            collective.window += (end - start) * (1 - exposed)


def _find_unoverlapped(collectives: list[Collective]) -> None:
    """Sets `Collective.unoverlapped`: simultaneous transfers count once."""
    reached = 0.0
    for collective in sorted(collectives, key=lambda one: one.start):
        start = max(collective.start, reached)
        collective.unoverlapped = max(0.0, collective.end - start)
        reached = max(reached, collective.end)
