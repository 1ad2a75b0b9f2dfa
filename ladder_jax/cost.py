"""How long a collective takes, and a GPU's kernels: closed formulas of bytes, hops, bandwidths and latencies.

XLA:TPU writes its own estimate of every computation into the schedule, but none of communication; XLA:GPU none at all.
"""
import math
from typing import NamedTuple

LAUNCH = 1.5e-6      # seconds from one GPU kernel to the next in a CUDA graph
SLICES, UPDATES = ("dynamic-slice", "gather", "slice"), ("dynamic-update-slice", "scatter")


class Link(NamedTuple):
    """One direction of one link. TPU: from a chip, along a dimension, up or down. GPU: a device's port, in or out."""
    device: int
    dimension: int
    direction: int


class Network:
    """How a target's devices are connected. `places`: the coordinates of logical device 0, 1, ... (TPU)."""

    def __init__(self, target, places):
        self.target, self.chip, self.places = target, target.chip, places
        self.shape = [max(place[d] for place in places) + 1 for d in range(len(places[0]))] if places else []

    def permute(self, pairs, size):
        """(seconds, links) of sending `size` bytes from every source to its target, all at once."""
        if self.target.platform == "gpu":
            return self.chip.launch + self.chip.hop_latency + size / self._port(pairs), frozenset([Link(0, 0, 0)])
        load, hops = {}, 0
        for source, target in pairs:
            path = list(self._route(source, target))
            hops = max(hops, len(path))
            for link in path:
                load[link] = load.get(link, 0) + 1
        worst = max(load.values(), default=0)
        seconds = self.chip.launch + hops * self.chip.hop_latency + worst * size / self.chip.link_bandwidth
        return seconds, frozenset(load)

    def _port(self, pairs):
        return self.chip.link_bandwidth

    def _route(self, source, target):
        """The links from one device to another: dimension by dimension, the shorter way around where there is one."""
        here, there = list(self.places[source]), self.places[target]
        for d, side in enumerate(self.shape):
            distance = there[d] - here[d]
            if side >= self.chip.wrap and abs(distance) > side / 2:
                distance -= math.copysign(side, distance)
            step = 1 if distance > 0 else -1
            for _ in range(abs(int(distance))):
                yield (*here, d, step)
                here[d] = (here[d] + step) % side

    def collective(self, kind, groups, size):
        """(seconds, links) of a collective of XLA's own.

        Args:
          kind: XLA's opcode.
          groups: of logical devices, or pairs for a collective-permute.
          size: bytes of the whole message on one device (all-gather: of the result).
        """
        if kind == "collective-permute":
            return self.permute(groups, size)
        n = len(groups[0])
        rounds = {"all-reduce": 2}.get(kind, 1)
        if n == 1:
            return 0.0, frozenset()
        if self.target.platform == "gpu":
            latency = 12e-6 * rounds
            return latency + rounds * size * (n - 1) / n / self.chip.link_bandwidth, frozenset([Link(0, 0, 0)])
        # A ring through the group's chips, both directions at once, each with half the bytes: XLA:TPU's StrategyRing.
        ring = [(group[i], group[(i + 1) % n]) for group in groups for i in range(n)]
        _, links = self.permute(ring, 0)
        steps = rounds * (n - 1)
        seconds = self.chip.launch + steps * (self.chip.hop_latency + size / n / 2 / self.chip.link_bandwidth)
        return seconds, links | self.permute([(b, a) for a, b in ring], 0)[1]


def traffic(module, instruction, body):
    """Bytes of main memory that an instruction reads and writes, each of its arrays once.

    Of an array that is only sliced or gathered from, what is taken counts; of one that is updated in place, the update.
    """
    inside = instruction.named("calls") if instruction.opcode == "fusion" else None
    outputs = [array for array in instruction.outputs if array.space == 0]
    operands = [body[name].outputs if name in body else () for name in instruction.operands]
    if inside is None:
        if instruction.opcode in SLICES:
            return 2 * sum(array.bytes for array in outputs)
        if instruction.opcode in UPDATES:
            return 2 * sum(array.bytes for array in operands[-1])
        return sum(array.bytes for array in (*outputs, *(a for arrays in operands for a in arrays)) if array.space == 0)
    fused = module.computations[inside]
    users = {}
    for inner in fused.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    total, updated = 0, set()
    for inner in fused.values():
        if inner.opcode in UPDATES:
            update = fused[inner.operands[-1 if inner.opcode == "scatter" else 1]].outputs[0]
            total += 2 * update.bytes
            updated.add(inner.outputs[0].dims)
    parameters = [inner for inner in fused.values() if inner.opcode == "parameter"]
    for parameter in parameters:
        for array in parameter.outputs:
            reached = _through(users, parameter.name)
            if array.space or (array.dims in updated):
                continue
            if reached and all(user.opcode in SLICES for user in reached):
                total += sum(user.outputs[0].bytes for user in reached)
            else:
                total += array.bytes
    return total + sum(array.bytes for array in outputs if array.dims not in updated)


def _through(users, name):
    """The instructions that use a fused parameter, looking through bitcasts."""
    found = []
    for user in users.get(name, ()):
        found.extend(_through(users, user.name) if user.opcode in ("bitcast", "reshape") else [user])
    return found


def flops(module, instruction, body):
    """Floating-point operations of the matrix products in an instruction."""
    if instruction.opcode == "dot":
        left = body[instruction.operands[0]].outputs[0].dims
        return 2 * math.prod(instruction.outputs[0].dims) * math.prod(left[d] for d in instruction.dims)
    if instruction.opcode == "custom-call" and "cublas" in instruction.text:
        left, right = (body[name].outputs[0] for name in instruction.operands[:2])
        out = math.prod(instruction.outputs[0].dims)
        # [m, k] x [k, n] -> [m, n]: m k * k n = k^2 * m n
        return 2 * math.sqrt(math.prod(left.dims) * math.prod(right.dims) * out)
    inside = instruction.named("calls") if instruction.opcode in ("fusion", "call") else None
    if not inside:
        return 0
    fused = module.computations[inside]
    return sum(flops(module, inner, fused) for inner in fused.values())
