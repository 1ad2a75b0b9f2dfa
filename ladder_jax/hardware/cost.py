"""How long a collective takes, and a GPU's kernels: closed formulas of bytes, hops, bandwidths and latencies.

XLA:TPU writes its own estimate of every computation into the schedule, but none of communication; XLA:GPU none at all.
"""

import math
from typing import NamedTuple

SLICES, UPDATES = (
    ("dynamic-slice", "gather", "slice"),
    ("dynamic-update-slice", "scatter"),
)
RING = {"all-reduce": 2}  # times round the ring; other collectives: once


class Transfer(NamedTuple):
    """What a collective takes, all its devices at once. Seconds."""

    latency: float  # however short the message is
    flow: float  # bytes over bandwidth: so long its links are taken
    links: frozenset = frozenset()

    @property
    def seconds(self):
        return self.latency + self.flow


class Network:
    """How a target's devices are connected.

    Args:
      chip: a chips.Chip.
      places: the coordinates of logical device 0, 1, ... (TPU), or the node of each (GPU).
      all_reduce: seconds of a GPU's all-reduce of a short message, where another library than NCCL makes it.
    """

    def __init__(self, chip, places, all_reduce=None):
        self.chip, self.places, self.all_reduce = chip, places, all_reduce
        self.shape = (
            [max(place[d] for place in places) + 1 for d in range(len(places[0]))]
            if chip.wrap
            else []
        )

    def collective(self, kind, groups, size):
        """The `Transfer` of a collective of XLA's own.

        Args:
          kind: XLA's opcode.
          groups: of logical devices, or (source, target) pairs for a collective-permute.
          size: bytes of the whole message on one device (all-gather: of the result).
        """
        if kind != "collective-permute" and len(groups[0]) == 1:
            return Transfer(0.0, 0.0)
        return (self._tpu if self.chip.wrap else self._gpu)(kind, groups, size)

    # TPU: links to neighbours

    def _tpu(self, kind, groups, size):
        chip = self.chip
        if kind == "collective-permute":
            hops, load = self._load(groups)
            return Transfer(
                chip.launch + hops * chip.hop_latency,
                max(load.values(), default=0) * size / chip.link_bandwidth,
                frozenset(load),
            )
        # A ring through the group's chips, both directions at once, each with half the bytes: XLA:TPU's StrategyRing.
        n = len(groups[0])
        ring = [(group[i], group[(i + 1) % n]) for group in groups for i in range(n)]
        links = (
            self._load(ring)[1].keys() | self._load([(b, a) for a, b in ring])[1].keys()
        )
        steps = RING.get(kind, 1) * (n - 1)
        return Transfer(
            chip.launch + steps * chip.hop_latency,
            steps * size / n / 2 / chip.link_bandwidth,
            frozenset(links),
        )

    def _load(self, pairs):
        """(longest path, messages by link) of messages from every source to its target."""
        load, hops = {}, 0
        for source, target in pairs:
            path = list(self._route(source, target))
            hops = max(hops, len(path))
            for link in path:
                load[link] = load.get(link, 0) + 1
        return hops, load

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

    # GPU: a switch in the node, a network between nodes; one collective at a time

    def _gpu(self, kind, groups, size):
        chip, permute = self.chip, kind == "collective-permute"
        devices = (
            sorted({device for group in groups for device in group})
            if permute
            else groups[0]
        )
        far = len({self.places[device] for device in devices}) > 1
        flow = size / (chip.far_bandwidth if far else chip.link_bandwidth)
        if permute:
            latency, flow = chip.launch + chip.hop_latency, flow / 2
        elif kind == "all-reduce" and self.all_reduce and not far:
            latency = self.all_reduce
        else:
            near = min(
                len(devices),
                sum(
                    self.places[device] == self.places[devices[0]] for device in devices
                ),
            )
            share = RING.get(kind, 1) / 2
            latency, flow = (
                share * (chip.launch + (near - 1) * chip.hop_latency),
                share * flow,
            )
        return Transfer(
            0.0, latency + far * chip.far_latency + flow, frozenset(["network"])
        )


def traffic(module, instruction, body):
    """Bytes of main memory that an instruction reads and writes, each of its arrays once.

    Of an array that is only sliced or gathered from, what is taken counts; of one that is updated in place, the update.
    """
    inside = instruction.named("calls") if instruction.opcode == "fusion" else None
    outputs = [array for array in instruction.outputs if array.space == 0]
    operands = [
        body[name].outputs if name in body else () for name in instruction.operands
    ]
    if inside is None:
        if instruction.opcode in SLICES:
            return 2 * sum(array.bytes for array in outputs)
        if instruction.opcode in UPDATES:
            return 2 * sum(array.bytes for array in operands[-1])
        return sum(
            array.bytes
            for array in (*outputs, *(a for arrays in operands for a in arrays))
            if array.space == 0
        )
    fused = module.computations[inside]
    users = {}
    for inner in fused.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    total, updated = 0, set()
    for inner in fused.values():
        if inner.opcode in UPDATES:
            update = fused[
                inner.operands[-1 if inner.opcode == "scatter" else 1]
            ].outputs[0]
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
        found.extend(
            _through(users, user.name)
            if user.opcode in ("bitcast", "reshape")
            else [user]
        )
    return found


def flops(module, instruction, body):
    """Floating-point operations of the matrix products in an instruction."""
    if instruction.opcode == "dot":
        left = body[instruction.operands[0]].outputs[0].dims
        return (
            2
            * math.prod(instruction.outputs[0].dims)
            * math.prod(left[d] for d in instruction.dims)
        )
    if instruction.opcode == "custom-call" and "cublas" in instruction.text:
        left, right = (body[name].outputs[0] for name in instruction.operands[:2])
        out = math.prod(instruction.outputs[0].dims)
        # [m, k] x [k, n] -> [m, n]: m k * k n = k^2 * m n
        return 2 * math.sqrt(math.prod(left.dims) * math.prod(right.dims) * out)
    inside = (
        instruction.named("calls") if instruction.opcode in ("fusion", "call") else None
    )
    if not inside:
        return 0
    fused = module.computations[inside]
    return sum(flops(module, inner, fused) for inner in fused.values())
