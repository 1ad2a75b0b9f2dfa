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


class Network:
    """How a target's devices are connected.

    Args:
      chip: the chip of every device; it must be `modelled`.
      places: for each logical device, its coordinates (TPU) or its node's number (GPU).
      all_reduce: seconds of a short message's all-reduce within a GPU node, where a
        library other than NCCL runs it.
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
        chip, is_permute = self.chip, kind == "collective-permute"
        devices: Sequence[int] = groups[0]
        if is_permute:
            devices = sorted({device for pair in groups for device in pair})
        nodes = [self.places[device] for device in devices]
        crosses_nodes = len(set(nodes)) > 1
        bandwidth = chip.internode_bandwidth if crosses_nodes else chip.link_bandwidth
        transfer_s = size / bandwidth  # the time of an all-reduce
        if is_permute:
            latency_s = chip.collective_launch_s + chip.hop_latency_s
            transfer_s /= 2  # an all-reduce sends about twice the message's bytes
        elif kind == "all-reduce" and self.all_reduce and not crosses_nodes:
            latency_s = self.all_reduce
        else:
            hops = nodes.count(nodes[0]) - 1  # around the devices of one node
            share = RING.get(kind, 1) / 2  # of an all-reduce's time
            latency_s = share * (chip.collective_launch_s + hops * chip.hop_latency_s)
            transfer_s = share * transfer_s
        latency_s += crosses_nodes * chip.internode_latency_s
        return Transfer(0.0, latency_s + transfer_s, frozenset(["network"]))


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


def flops(module: Any, instruction: Any, body: Mapping[str, Any]) -> float:
    """Floating-point operations of the matrix products in an instruction."""
    if instruction.opcode == "dot":
        left = body[instruction.operands[0]].outputs[0].dims
        contracted = math.prod(left[d] for d in instruction.dims)
        return 2 * math.prod(instruction.outputs[0].dims) * contracted
    if instruction.opcode == "custom-call" and "cublas" in instruction.text:
        left, right = (body[name].outputs[0] for name in instruction.operands[:2])
        out = math.prod(instruction.outputs[0].dims)
        # [m, k] x [k, n] -> [m, n]: m k * k n = k^2 * m n
        return 2 * math.sqrt(math.prod(left.dims) * math.prod(right.dims) * out)
    if instruction.opcode not in ("fusion", "call"):
        return 0
    computation = instruction.named("calls")
    if not computation:
        return 0
    fused = module.computations[computation]
    return sum(flops(module, inner, fused) for inner in fused.values())
