"""Plays a scheduled program back on a clock, to see what its communication hides behind.

A device issues the instructions of its program one after another. A synchronous collective stops it until it has ended;
an asynchronous one occupies links, in the order in which such collectives are started, while the instructions between
its start and its done are computed; its done waits for what is left. Two that share a link send one after the other,
the second's latency behind the first's bytes.

  window     what is computed, or waited for from HBM, between a collective's start and its done
  exposed    the part of a collective's transfer during which the device waits for it alone
  hidden     the rest of its transfer: the device is at work meanwhile

On TPU, weights are prefetched from HBM into VMEM by asynchronous copies: these get the HBM bandwidth that the
instructions meanwhile leave, and their done waits for what is left in the same way. While a collective is waited for,
HBM goes on; what a prefetch therefore need not be waited for later, that collective has not cost. So the exposed time
of asynchronous collectives is what the step would save if they took no time. A synchronous one is exposed in full.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ladder_jax.hardware.cost import traffic
from ladder_jax.planner import hlo

FREE = {
    "parameter",
    "constant",
    "bitcast",
    "get-tuple-element",
    "tuple",
    "partition-id",
    "replica-id",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
}


@dataclass
class Collective:
    """One collective of the schedule; times in seconds, of one execution."""

    name: str
    kind: str
    scope: str
    bytes: int
    groups: list
    arrays: (
        int  # how many results it has: more than one where XLA merged several into it
    )
    asynchronous: bool
    seconds: float
    count: float = 1.0  # executions that it stands for
    window: float = 0.0
    exposed: float = 0.0
    start: float = 0.0  # on the clock, when its transfer begins
    end: float = 0.0
    alone: float = 0.0  # of `seconds`, what is not the time of a transfer that began before it on other links

    @property
    def hidden(self):
        return max(self.seconds - self.exposed, 0.0)


@dataclass
class Stall:
    """A wait for asynchronous collectives, as far as it is exposed. Seconds."""

    start: float
    end: float
    left: float
    weight: float
    scope: str
    shares: list  # of (collective, its transfer meanwhile)


class Span(NamedTuple):
    """A stretch of the compute lane."""

    name: str
    scope: str
    start: float
    end: float
    count: float


@dataclass
class Timeline:
    """What the clock saw. Totals weigh every instruction by the executions that it stands for."""

    collectives: list[Collective] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    compute: float = 0.0  # seconds
    stalled: float = 0.0  # seconds waiting for collectives
    prefetch: float = 0.0  # seconds waiting for prefetched weights


def play(
    module,
    seconds,
    hbm_seconds,
    collective,
    count=lambda scope: 1.0,
    trips=lambda loop: loop.trips or 1,
):
    """The `Timeline` of a scheduled module.

    Args:
      module: an hlo.Module.
      seconds: (instruction, computation's instructions) -> how long it computes.
      hbm_seconds: bytes -> how long HBM takes for them at full bandwidth.
      collective: (kind, groups, bytes) -> cost.Transfer.
      count: how many executions an instruction stands for, by its scope.
      trips: a while instruction -> the trips that it stands for.
    """
    return _Player(module, seconds, hbm_seconds, collective, count, trips).run()


class _Player:
    def __init__(self, module, seconds, hbm_seconds, collective, count, trips):
        self.module, self.seconds, self.hbm_seconds = module, seconds, hbm_seconds
        self.cost, self.count, self.trips = collective, count, trips
        self.timeline = Timeline()
        self.now = self.busy = 0.0
        self.free = {}  # link -> when it is free
        self.flying = {}  # name of the start -> (collective, busy time at its start)
        self.copies = {}  # name of the start -> seconds of HBM that are left, in order
        self.unaided = {}  # the same, had no asynchronous collective been waited for
        self.stalls = []
        self.weight, self.scope = 1.0, ""

    def run(self):
        self.computation(self.module.entry, 1.0)
        reached = 0.0
        for made in sorted(self.timeline.collectives, key=lambda made: made.start):
            made.alone = max(0.0, made.end - max(made.start, reached))
            reached = max(reached, made.end)
        self.timeline.spans.sort(key=lambda span: span.start)
        return self.timeline

    def computation(self, name, weight):
        body = self.module.computations[name]
        for instruction in body.values():
            self.scope = instruction.scope or self.scope
            self.weight = weight * self.count(self.scope)
            self.step(instruction, body)

    def step(self, instruction, body):
        opcode = instruction.opcode
        if opcode == "while":
            self.computation(
                instruction.named("body"), self.weight * self.trips(instruction)
            )
        elif opcode in ("call", "async-start") and not self.module.collective(
            instruction, None
        ):
            self.computation(
                instruction.named("to_apply") or instruction.named("calls"), self.weight
            )
        elif opcode == "conditional":
            # the branch that computes most
            names = re.findall(
                r"%([\w.\-]+)",
                (
                    re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
                    or re.match("", "")
                )[0],
            ) or [
                instruction.named("true_computation"),
                instruction.named("false_computation"),
            ]
            longest = max(
                names,
                key=lambda n: sum(
                    self.seconds(i, self.module.computations[n])
                    for i in self.module.computations[n].values()
                ),
            )
            self.computation(longest, self.weight)
        elif opcode in ("copy-start", "slice-start"):
            moved = (
                instruction.outputs[1]
                if opcode == "slice-start"
                else instruction.outputs[0]
            )
            self.copies[instruction.name] = self.unaided[instruction.name] = (
                self.hbm_seconds(moved.bytes)
            )
        elif opcode in ("copy-done", "slice-done"):
            self.finish_copy(instruction.operands[0])
        elif _is_done(instruction):
            self.finish(instruction, body)
        elif (found := self.module.collective(instruction, None)) and (
            opcode != "fusion" or instruction.name.startswith("async-collective-start")
        ):
            kind, inner, where = found
            self.start(
                instruction,
                kind,
                inner,
                self.module.computations[where] if where else body,
            )
        elif opcode not in FREE:
            self.compute(instruction, body)

    def compute(self, instruction, body):
        duration = self.seconds(instruction, body)
        if not duration:
            return
        own = min(duration, self.hbm_seconds(traffic(self.module, instruction, body)))
        self.drain(duration - own, self.copies, self.unaided)
        self.timeline.spans.append(
            Span(
                instruction.name, self.scope, self.now, self.now + duration, self.weight
            )
        )
        self.now += duration
        self.busy += duration
        self.timeline.compute += duration * self.weight

    # prefetches

    def drain(self, spare, *queues):
        """Gives `spare` seconds of HBM to the copies under way, the oldest first."""
        for queue in queues:
            rest = spare
            for name, left in queue.items():
                used = min(left, rest)
                queue[name] -= used
                rest -= used

    def finish_copy(self, name):
        waited, unaided = (
            _finish(queue, name) for queue in (self.copies, self.unaided)
        )
        if waited:
            self.timeline.spans.append(
                Span("prefetch", self.scope, self.now, self.now + waited, self.weight)
            )
            self.now += waited
            self.busy += waited
            self.timeline.compute += waited * self.weight
            self.timeline.prefetch += waited * self.weight
        self.forgive(unaided - waited)

    def forgive(self, seconds):
        """So long a prefetch would have been waited for now, had collectives not been: they are not to blame for it."""
        while seconds > 0 and self.stalls:
            stall = self.stalls[-1]
            spent = min(seconds, stall.left)
            for made, share in stall.shares:
                made.exposed -= share * spent / (stall.end - stall.start)
                made.window += share * spent / (stall.end - stall.start)
            stall.left -= spent
            seconds -= spent
            self.timeline.spans.append(
                Span(
                    "prefetch",
                    stall.scope,
                    stall.start + stall.left,
                    stall.start + stall.left + spent,
                    stall.weight,
                )
            )
            self.timeline.stalled -= spent * stall.weight
            self.timeline.compute += spent * stall.weight
            self.timeline.prefetch += spent * stall.weight
            if not stall.left:
                self.stalls.pop()

    # collectives

    def start(self, instruction, kind, inner, inside):
        groups = hlo.groups(inner) or [list(range(self.module.devices))]
        size = sum(
            buffer.bytes for name in inner.operands for buffer in inside[name].outputs
        )
        if kind == "all-gather":
            size *= len(groups[0])
        paired = inner.opcode.endswith("-start") or instruction.opcode in hlo.WRAPPED
        asynchronous = paired and '"is_sync":true' not in instruction.text
        transfer = self.cost(kind, groups, size)
        made = Collective(
            instruction.name,
            kind,
            self.scope,
            size,
            groups,
            len(inner.operands),
            asynchronous,
            transfer.seconds,
            self.weight,
        )
        made.start = max(
            [self.now, *(self.free.get(link, 0.0) for link in transfer.links)]
        )
        made.end = made.start + transfer.seconds
        self.free |= dict.fromkeys(transfer.links, made.start + transfer.bandwidth_s)
        self.timeline.collectives.append(made)
        self.flying[instruction.name] = made, self.busy
        if not asynchronous:
            self.wait(made)
            if not paired:
                del self.flying[instruction.name]

    def finish(self, instruction, body):
        name = self._started_by(instruction, body)
        made, busy = self.flying.pop(name)
        made.window += self.busy - busy
        self.wait(made)

    def wait(self, made):
        if made.end <= self.now:
            return
        length, shares = made.end - self.now, []
        for other in self.timeline.collectives:
            if (share := min(other.end, made.end) - max(other.start, self.now)) > 0:
                other.exposed += share
                shares.append((other, share))
        self.drain(length, self.copies)
        if made.asynchronous:
            self.stalls.append(
                Stall(self.now, made.end, length, self.weight, self.scope, shares)
            )
        else:
            self.drain(length, self.unaided)
        self.timeline.stalled += length * self.weight
        self.now = made.end

    def _started_by(self, instruction, body):
        """The name of the start that a done belongs to: its operand, perhaps through tuples and fused continuations."""
        queue = list(instruction.operands)
        while queue:
            name = queue.pop(0)
            if name in self.flying:
                return name
            queue.extend(body[name].operands if name in body else ())
        raise ValueError(
            f"the schedule ends a collective that it did not start: {instruction.name}"
        )


def _finish(copies, name):
    """Ends copy `name` and those before it; the seconds that they had left."""
    waited = 0.0
    for other in copies:
        waited += copies[other]
        copies[other] = 0.0
        if other == name:
            break
    copies.pop(name, None)
    return waited


def _is_done(instruction):
    return (
        instruction.opcode.removesuffix("-done") in hlo.COLLECTIVES
        and instruction.opcode.endswith("-done")
        or instruction.opcode in ("async-done", "custom-call-done")
        or instruction.opcode == "fusion"
        and instruction.name.startswith("async-collective-done")
    )
