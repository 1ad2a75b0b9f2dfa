"""Formulas for the time of a collective, and for the bytes and FLOPs of a GPU's kernel.

XLA:TPU writes an estimate of each computation's time into its schedule, but none of
communication; XLA:GPU writes no estimates.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ladder_jax.hardware.chips import Chip

SLICES = ("dynamic-slice", "gather", "slice")
UPDATES = ("dynamic-update-slice", "scatter")
RING = {"all-reduce": 2}  # how often a message goes around the ring; others: once

Groups = Sequence[Sequence[int]]  # of logical devices, or pairs (source, target)


class Transfer(NamedTuple):
    """The time of a collective, which all its devices run at once."""

    latency_s: float  # the part that does not depend on the message's size
    bandwidth_s: float  # bytes over bandwidth: `links` are busy for this time
    links: frozenset[Any] = frozenset()

    @property
    def seconds(self) -> float:
        return self.latency_s + self.bandwidth_s


class Line(NamedTuple):
    """A latency, then a bandwidth."""

    latency_s: float
    bandwidth: float  # bytes/s

    def seconds(self, size: float) -> float:
        return self.latency_s + size / self.bandwidth


def interpolate(points: Sequence[tuple[float, float]], size: float) -> float:
    """The seconds of `size` bytes, from measured (bytes, seconds), sorted by bytes.

    Between two points it is on their line. Shorter messages take as long as the
    shortest measured one, longer ones go on along the last two points' line; a lone
    point's bandwidth is that of longer messages.
    """
    if size <= points[0][0]:
        return points[0][1]
    if len(points) == 1:
        return points[0][1] * size / points[0][0]
    end = next((i for i, (most, _) in enumerate(points) if size <= most), -1)
    (left, left_s), (right, right_s) = points[end - 1], points[end]
    slope = max(right_s - left_s, 0.0) / (right - left)
    return left_s + slope * (size - left)


class Network:
    """How a target's devices are connected.

    Args:
      chip: the chip of every device; it must be `modelled`.
      places: for each logical device, its coordinates (TPU) or its node's number (GPU).
      all_reduce: seconds of a short message's all-reduce within a GPU node, where
        kernels over symmetric memory run it (`Chip.symmetric_bandwidth`), not NCCL's.
    """

    def __init__(
        self, chip: Chip, places: Sequence[Any], all_reduce: float | None = None
    ) -> None:
        self.chip, self.places, self.all_reduce = chip, places, all_reduce
        self.shape: list[int] = []  # sides of the smallest box that holds the devices
        if chip.is_tpu:
            dimensions = range(len(places[0]))
            self.shape = [max(place[d] for place in places) + 1 for d in dimensions]

    def collective(self, kind: str, groups: Groups, size: float) -> Transfer:
        """The time of one of XLA's collectives.

        Args:
          kind: XLA's opcode.
          groups: groups of logical devices; for a collective-permute, (source, target)
            pairs.
          size: bytes of the whole message on one device (all-gather: of the result).
        """
        if kind != "collective-permute" and len(groups[0]) == 1:
            return Transfer(0.0, 0.0)
        if self.chip.is_tpu:
            return self._tpu(kind, groups, size)
        return self._gpu(kind, groups, size)

    # TPU: links to neighbours

    def _tpu(self, kind: str, groups: Groups, size: float) -> Transfer:
        chip = self.chip
        if kind == "collective-permute":
            hops, load = self._load(groups)
            busiest = max(load.values(), default=0)
            return Transfer(
                chip.collective_launch_s + hops * chip.hop_latency_s,
                busiest * size / chip.link_bandwidth,
                frozenset(load),
            )
        # A ring through the group's chips, both directions at once, each with half
        # the bytes: XLA:TPU's StrategyRing.
        n = len(groups[0])
        ring = [(group[i], group[(i + 1) % n]) for group in groups for i in range(n)]
        back = [(b, a) for a, b in ring]
        links = self._load(ring)[1].keys() | self._load(back)[1].keys()
        steps = RING.get(kind, 1) * (n - 1)
        return Transfer(
            chip.collective_launch_s + steps * chip.hop_latency_s,
            steps * size / n / 2 / chip.link_bandwidth,
            frozenset(links),
        )

    def _load(self, pairs: Groups) -> tuple[int, dict[Any, int]]:
        """(longest path in hops, messages on each link) for one message a pair."""
        load: dict[Any, int] = {}
        hops = 0
        for source, target in pairs:
            path = list(self.route(source, target))
            hops = max(hops, len(path))
            for link in path:
                load[link] = load.get(link, 0) + 1
        return hops, load

    def route(self, source: int, target: int) -> Iterator[tuple[int, ...]]:
        """The links from one device to another, as (*coordinates, dimension, step).

        The path goes dimension by dimension. In a dimension that is a ring it takes the
        shorter way around.
        """
        here, there = list(self.places[source]), self.places[target]
        for d, side in enumerate(self.shape):
            distance = there[d] - here[d]
            if side >= self.chip.torus_min_side and abs(distance) > side / 2:
                distance -= math.copysign(side, distance)
            step = 1 if distance > 0 else -1
            for _ in range(abs(int(distance))):
                yield (*here, d, step)
                here[d] = (here[d] + step) % side

    # GPU: a switch in each node, a network between nodes; one collective at a time

    def _gpu(self, kind: str, groups: Groups, size: float) -> Transfer:
        is_permute = kind == "collective-permute"
        devices: Sequence[int] = groups[0]
        if is_permute:
            devices = sorted({device for pair in groups for device in pair})
        nodes = [self.places[device] for device in devices]
        crosses_nodes, inside = len(set(nodes)) > 1, nodes.count(nodes[0])
        if is_permute:
            seconds = self._exchange_s(crosses_nodes, size)
        elif crosses_nodes:
            # A gather or scatter goes around the ring once, an all-reduce twice.
            count = len(set(nodes))
            seconds = (
                RING.get(kind, 1) / 2 * self._far_all_reduce_s(inside, count, size)
            )
            seconds += (1 - RING.get(kind, 1) / 2) * self.chip.internode_latency_s
        elif kind == "all-reduce":
            seconds = self._all_reduce_s(inside, size)
        else:
            seconds = self._gather_s(inside, size)
        return Transfer(0.0, seconds, frozenset(["network"]))

    def _exchange_s(self, crosses_nodes: bool, size: float) -> float:
        """Seconds of a collective-permute: half of an all-reduce's bytes."""
        chip = self.chip
        bandwidth = chip.internode_bandwidth if crosses_nodes else chip.link_bandwidth
        latency_s = chip.collective_launch_s + chip.hop_latency_s
        latency_s += crosses_nodes * chip.internode_latency_s
        return latency_s + size / bandwidth / 2

    def _latency_s(self, devices: int) -> float:
        """Seconds of the shortest all-reduce of so many GPUs of a node: around a ring,
        of more than eight with a hop more for every doubling (a tree)."""
        chip = self.chip
        hops = devices - 1 if devices <= 8 else 7 + math.log2(devices / 8)
        return chip.collective_launch_s + hops * chip.hop_latency_s

    def _all_reduce_s(self, devices: int, size: float) -> float:
        """Seconds of an all-reduce of so many GPUs of a node: NCCL takes the fastest of
        its protocols."""
        chip = self.chip
        if chip.all_reduce_points:
            return interpolate(chip.all_reduce_points, size)
        ways = [Line(self._latency_s(devices), chip.link_bandwidth)]
        if self.all_reduce:
            ways = [Line(self.all_reduce, chip.symmetric_bandwidth)]
        if chip.long_all_reduce:
            ways.append(Line(*chip.long_all_reduce))
        seconds = [line.seconds(size) for line in ways]
        if chip.long_gather:
            seconds.append(2 * self._long_gather_s(devices, size))
        return min(seconds)

    def _gather_s(self, devices: int, size: float) -> float:
        """Seconds of an all-gather or a reduce-scatter in a node: half an all-reduce's
        where messages are short."""
        short = Line(self._latency_s(devices), self.chip.link_bandwidth)
        seconds = [short.seconds(size) / 2]
        if self.chip.long_gather:
            seconds.append(self._long_gather_s(devices, size))
        return min(seconds)

    def _long_gather_s(self, devices: int, size: float) -> float:
        """`_gather_s` of long messages: each of n GPUs sends (n - 1) / n of the bytes.

        The published bandwidth is of 8 GPUs, 7 / 8 of which each of them sends.
        """
        latency_s, bandwidth = self.chip.long_gather
        return latency_s + (devices - 1) / devices * size / (bandwidth * 7 / 8)

    def _far_all_reduce_s(self, inside: int, nodes: int, size: float) -> float:
        """Seconds of an all-reduce between nodes, `inside` GPUs in each.

        The bytes that leave a node go around a ring of nodes, through the links of
        these GPUs alone.
        """
        chip = self.chip
        latency_s = math.log2(nodes) * chip.internode_latency_s
        latency_s += self._latency_s(inside)
        seconds = [latency_s + size / chip.internode_bandwidth]
        if chip.long_internode:
            seconds.append(Line(*chip.long_internode).seconds(size))
        links = inside * chip.nic_bandwidth
        sent_s = RING["all-reduce"] * (nodes - 1) / nodes * size / links if links else 0
        return max(min(seconds), latency_s + sent_s)


def between_slices_s(chip: Chip, size: float, slices: int) -> float:
    """Seconds of a sum over TPU slices, `size` bytes on each chip: a ring."""
    if slices == 1:
        return 0.0
    return RING["all-reduce"] * (slices - 1) / slices * size / chip.slice_bandwidth


# The bytes and FLOPs of an instruction. `module` is a planner.hlo.Module, `instruction`
# one of its instructions, `body` the instructions beside it, by name.


def traffic(module: Any, instruction: Any, body: Mapping[str, Any]) -> int:
    """Bytes of main memory that an instruction reads and writes, each array once.

    A slice or gather counts only the bytes that it takes from its operand, an in-place
    update only the bytes that it changes; other operands count in full. Arrays outside
    main memory (`space` not 0) do not count.
    """
    outputs = [array for array in instruction.outputs if array.space == 0]
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.named("calls")]
        return _fusion_traffic(fused, outputs)
    if instruction.opcode in SLICES:
        return 2 * sum(array.bytes for array in outputs)
    operands = [
        body[name].outputs if name in body else () for name in instruction.operands
    ]
    if instruction.opcode in UPDATES:
        return 2 * sum(array.bytes for array in operands[-1])
    inputs = [array for arrays in operands for array in arrays if array.space == 0]
    return sum(array.bytes for array in (*outputs, *inputs))


def _fusion_traffic(fused: Mapping[str, Any], outputs: Sequence[Any]) -> int:
    """`traffic` of a fusion; `fused` has its instructions by name."""
    users: dict[str, list[Any]] = {}
    for inner in fused.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    total, updated_dims = 0, set()
    for inner in fused.values():
        if inner.opcode in UPDATES:
            index = -1 if inner.opcode == "scatter" else 1
            update = fused[inner.operands[index]].outputs[0]
            total += 2 * update.bytes
            updated_dims.add(inner.outputs[0].dims)
    for parameter in fused.values():
        if parameter.opcode != "parameter":
            continue
        readers = _readers(users, parameter.name)
        only_sliced = readers and all(reader.opcode in SLICES for reader in readers)
        for array in parameter.outputs:
            # An array of an update's shape is taken for the one updated in place.
            if array.space or array.dims in updated_dims:
                continue
            if only_sliced:
                total += sum(reader.outputs[0].bytes for reader in readers)
            else:
                total += array.bytes
    new_outputs = [array for array in outputs if array.dims not in updated_dims]
    return total + sum(array.bytes for array in new_outputs)


def _readers(users: Mapping[str, Sequence[Any]], name: str) -> list[Any]:
    """The instructions that use a fused parameter, directly or after a bitcast."""
    readers = []
    for user in users.get(name, ()):
        if user.opcode in ("bitcast", "reshape"):
            readers += _readers(users, user.name)
        else:
            readers.append(user)
    return readers


class Product(NamedTuple):
    """A matrix product, or several of one shape."""

    flops: float
    depth: int  # the length that is summed over


def flops(module: Any, instruction: Any, body: Mapping[str, Any]) -> float:
    """Floating-point operations of the matrix products in an instruction."""
    return sum(one.flops for one in products(module, instruction, body))


def products(module: Any, instruction: Any, body: Mapping[str, Any]) -> list[Product]:
    """The matrix products in an instruction."""
    if instruction.opcode == "dot":
        left = body[instruction.operands[0]].outputs[0].dims
        depth = math.prod(left[d] for d in instruction.dims)
        return [Product(2 * math.prod(instruction.outputs[0].dims) * depth, depth)]
    if instruction.opcode == "custom-call" and "cublas" in instruction.text:
        left, right = (body[name].outputs[0] for name in instruction.operands[:2])
        out = math.prod(instruction.outputs[0].dims)
        # [m, k] x [k, n] -> [m, n]: m k * k n = k^2 * m n
        depth = math.sqrt(math.prod(left.dims) * math.prod(right.dims) / out)
        return [Product(2 * depth * out, round(depth))]
    computation = instruction.named("calls")
    if instruction.opcode not in ("fusion", "call") or not computation:
        return []
    fused = module.computations[computation]
    return [one for inner in fused.values() for one in products(module, inner, fused)]


TILE = 128  # rows and columns of the result that a GPU's core computes at a time


def product_seconds(chip: Chip, product: Product) -> tuple[float, float]:
    """(seconds of a product on a GPU, seconds of them in which cores are idle).

    A GPU's cores compute tiles of the result in waves. On average half of the last wave
    has no work. A product of fewer tiles than cores is split along its depth, so that
    its idle time is at most half of its own.
    """
    rate = chip.product_efficiency * chip.peak_flops
    busy_s = product.flops / rate
    wave_s = 2 * TILE**2 * product.depth * chip.cores / rate
    idle_s = min(wave_s, busy_s) / 2
    return busy_s + idle_s, idle_s
