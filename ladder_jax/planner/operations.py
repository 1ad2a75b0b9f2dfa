"""Turns a scheduled program into a list of the operations that a device issues.

The list has the operations of loops and calls in place of the loops and calls. Every
operation has its duration and the number of executions that it stands for. timeline.py
simulates such a list.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ladder_jax.hardware.cost import Transfer, traffic
from ladder_jax.planner import hlo
from ladder_jax.planner.hlo import Body, Instruction, Module

# Opcodes that take no time on the device.
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


@dataclass(frozen=True)
class Operation:
    """Something that the device does. Each kind is a subclass."""

    name: str  # of the instruction
    scope: str  # JAX's name stack; without one, the previous operation's
    count: float  # executions in a full step that this one stands for


class Interference(NamedTuple):
    """By how much an asynchronous collective slows an instruction that runs beside it.

    The collective takes cores and HBM bandwidth.
    """

    share: float = 0.0  # seconds added for each second that both run
    seconds: float = 0.0  # added once


@dataclass(frozen=True)
class Compute(Operation):
    """The device computes for `seconds`. HBM is idle for `spare_hbm` seconds of
    them."""

    seconds: float
    spare_hbm: float
    interference: Interference = Interference()

    def slowed(self, beside: float) -> float:
        """Seconds that collectives add which run for `beside` more seconds."""
        if beside <= 0:
            return 0.0
        share, seconds = self.interference.share, self.seconds
        seconds += self.interference.seconds
        # If they run longer than the instruction, they slow all of it.
        both = min(beside, seconds / (1 - share))
        return self.interference.seconds + share * both


@dataclass(frozen=True)
class StartPrefetch(Operation):
    """Starts an asynchronous copy. HBM needs `seconds` for it at full bandwidth."""

    seconds: float


@dataclass(frozen=True)
class EndPrefetch(Operation):
    """Waits for the copy that operation `started` started, and for all older copies."""

    started: str


@dataclass(frozen=True)
class StartCollective(Operation):
    """Starts a collective; the device waits for its end if it is synchronous."""

    kind: str  # XLA's opcode
    bytes: int  # of the whole message on one device
    groups: hlo.Groups
    arrays: int  # results; more than one where XLA merged several collectives
    asynchronous: bool
    transfer: Transfer


@dataclass(frozen=True)
class EndCollective(Operation):
    """Waits for the collective that operation `started` started."""

    started: str


@dataclass(frozen=True)
class Costs:
    """How long the parts of a program take, and how often they run.

    Attributes:
      seconds: (instruction, its computation) -> how long it computes.
      hbm_seconds: bytes -> how long HBM takes for them at full bandwidth.
      collective: (kind, groups, bytes) -> how long a collective takes.
      interference: (instruction, its computation) -> how collectives slow it.
      growth: an instruction outside all loops -> by how much its arrays are larger in
        the deep model, where they have a row for every layer.
      count: a scope -> how many executions an instruction in it stands for. It is
        called in the order of issue.
      trips: a while instruction -> how often its body runs.
    """

    seconds: Callable[[Instruction, Body], float]
    hbm_seconds: Callable[[int], float]
    collective: Callable[[str, hlo.Groups, int], Transfer]
    count: Callable[[str], float] = lambda scope: 1.0
    trips: Callable[[Instruction], float] = lambda loop: loop.trips or 1
    interference: Callable[[Instruction, Body], Interference] = (
        lambda instruction, body: Interference()
    )
    growth: Callable[[Instruction], float] = lambda instruction: 1.0


def operations(module: Module, costs: Costs) -> list[Operation]:
    """Lists the operations of a scheduled module in the order of their issue."""
    return list(_Lister(module, costs).computation(module.entry, 1.0))


class _Lister:
    """Lists a module's operations. Remembers the last scope, and which collectives have
    started and not ended."""

    def __init__(self, module: Module, costs: Costs) -> None:
        self.module, self.costs = module, costs
        self.scope, self.growth = "", 1.0  # of the instruction that is listed
        self.open: set[str] = set()  # names of collectives that have not ended

    def computation(self, name: str, runs: float) -> Iterator[Operation]:
        """The operations of a computation that runs `runs` times."""
        body = self.module.computations[name]
        for instruction in body.values():
            self.scope = instruction.scope or self.scope
            is_outside = name == self.module.entry and instruction.opcode != "while"
            self.growth = self.costs.growth(instruction) if is_outside else 1.0
            yield from self.instruction(
                instruction, body, runs * self.costs.count(self.scope)
            )

    def instruction(
        self, instruction: Instruction, body: Body, count: float
    ) -> Iterator[Operation]:
        """The operations of one instruction; of a loop or a call, those of its body."""
        opcode = instruction.opcode
        place = instruction.name, self.scope, count
        inner = self.module.collective(instruction, body)
        if opcode == "while":
            yield from self.computation(
                instruction.called("body"), count * self.costs.trips(instruction)
            )
        elif opcode in ("call", "async-start") and inner is None:
            target = instruction.named("to_apply") or instruction.called("calls")
            yield from self.computation(target, count)
        elif opcode == "conditional":
            yield from self.computation(self._longest_branch(instruction), count)
        elif opcode in ("copy-start", "slice-start"):
            # copy-start lists its result first, slice-start its operand.
            copied = instruction.outputs[opcode == "slice-start"]
            size = round(self.growth * copied.bytes)
            yield StartPrefetch(*place, self.costs.hbm_seconds(size))
        elif opcode in ("copy-done", "slice-done"):
            yield EndPrefetch(*place, instruction.operands[0])
        elif _ends_collective(instruction):
            started = self._started_by(instruction, body)
            self.open.remove(started)
            yield EndCollective(*place, started)
        elif inner is not None and _starts_collective(instruction):
            yield self._start(instruction, inner, count)
        elif opcode not in FREE and (duration := self.costs.seconds(instruction, body)):
            moved = self.costs.hbm_seconds(traffic(self.module, instruction, body))
            spare, slowed = max(duration - moved, 0.0), self.costs.interference
            times = self.growth * duration, self.growth * spare
            yield Compute(*place, *times, slowed(instruction, body))

    def _start(
        self,
        instruction: Instruction,
        inner: hlo.WrappedCollective,
        count: float,
    ) -> StartCollective:
        groups = hlo.groups(inner.instruction)
        groups = groups or [list(range(self.module.devices))]
        operands = [inner.body[name] for name in inner.instruction.operands]
        size = sum(buffer.bytes for one in operands for buffer in one.outputs)
        if inner.kind == "all-gather":
            size *= len(groups[0])
        size = round(self.growth * size)
        has_done = (
            inner.instruction.opcode.endswith("-start")
            or instruction.opcode in hlo.WRAPPED
        )
        if has_done:
            self.open.add(instruction.name)
        return StartCollective(
            instruction.name,
            self.scope,
            count,
            inner.kind,
            size,
            groups,
            len(operands),
            has_done and '"is_sync":true' not in instruction.text,
            self.costs.collective(inner.kind, groups, size),
        )

    def _started_by(self, instruction: Instruction, body: Body) -> str:
        """The name of the start that a done belongs to.

        The done's operand is the start, or a chain of tuples and fused continuations
        that leads to it.
        """
        queue = list(instruction.operands)
        while queue:
            name = queue.pop(0)
            if name in self.open:
                return name
            queue.extend(body[name].operands if name in body else ())
        raise ValueError(
            "the schedule ends a collective that it did not start: " + instruction.name
        )

    def _longest_branch(self, instruction: Instruction) -> str:
        """The name of the branch of a conditional that computes longest."""

        def duration(name: str) -> float:
            body = self.module.computations[name]
            return sum(self.costs.seconds(one, body) for one in body.values())

        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
        if listed:
            branches = re.findall(r"%([\w.\-]+)", listed[1])
        else:
            branches = [
                instruction.called("true_computation"),
                instruction.called("false_computation"),
            ]
        return max(branches, key=duration)


def _starts_collective(instruction: Instruction) -> bool:
    """Whether an instruction that contains a collective starts it.

    XLA:TPU fuses collectives into products: of such a chain of fusions, the first is
    named async-collective-start.
    """
    return instruction.opcode != "fusion" or instruction.name.startswith(
        "async-collective-start"
    )


def _ends_collective(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode == "fusion":
        return instruction.name.startswith("async-collective-done")
    if opcode in ("async-done", "custom-call-done"):
        return True
    return opcode.endswith("-done") and (
        opcode.removesuffix("-done") in hlo.COLLECTIVES
    )
