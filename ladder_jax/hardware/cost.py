"""How long a collective takes, and a GPU's kernels: closed formulas.

Their terms are bytes, hops, bandwidths and latencies. XLA:TPU writes an estimate of
every computation into its schedule, but none of communication; XLA:GPU writes none.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ladder_jax.hardware.chips import Chip

SLICES = ("dynamic-slice", "gather", "slice")
UPDATES = ("dynamic-update-slice", "scatter")
RING = {"all-reduce": 2}  # times round the ring; other collectives: once

Groups = Sequence[Sequence[int]]  # of logical devices, or pairs (source, target)


class Transfer(NamedTuple):
    """How long a collective takes, all its devices at once."""

    latency_s: float  # however short the message is
    bandwidth_s: float  # bytes over bandwidth: its links are busy for so long
    links: frozenset[Any] = frozenset()

    @property
    def seconds(self) -> float:
        return self.latency_s + self.bandwidth_s


class Network:
    """How a target's devices are connected.

    Args:
      chip: what each device is; one with `modelled`.
      places: by logical device, its coordinates (TPU) or its node's number (GPU).
      all_reduce: seconds that a GPU's all-reduce of a short message takes, where a
        library other than NCCL makes it.
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
        """The `Transfer` of one of XLA's own collectives.

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
        """(longest path in hops, messages by link) of a message a pair."""
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

        It goes dimension by dimension, around the ends where links are there and the
        path is shorter so.
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

    # GPU: a switch in the node, a network between nodes; one collective at a time

    def _gpu(self, kind: str, groups: Groups, size: float) -> Transfer:
        chip, is_permute = self.chip, kind == "collective-permute"
        devices = sorted({d for g in groups for d in g}) if is_permute else groups[0]
        nodes = [self.places[device] for device in devices]
        crosses_nodes = len(set(nodes)) > 1
        bandwidth = chip.internode_bandwidth if crosses_nodes else chip.link_bandwidth
        transfer_s = size / bandwidth
        if is_permute:
            latency_s = chip.collective_launch_s + chip.hop_latency_s
            transfer_s /= 2
        elif kind == "all-reduce" and self.all_reduce and not crosses_nodes:
            latency_s = self.all_reduce
        else:
            hops = nodes.count(nodes[0]) - 1
            share = RING.get(kind, 1) / 2
            latency_s = share * (chip.collective_launch_s + hops * chip.hop_latency_s)
            transfer_s = share * transfer_s
        latency_s += crosses_nodes * chip.internode_latency_s
        return Transfer(0.0, latency_s + transfer_s, frozenset(["network"]))


# What an instruction does. `module` is a planner.hlo.Module, `instruction` one of its
# instructions, `body` the computation that the instruction is in, by name.


def traffic(module: Any, instruction: Any, body: Mapping[str, Any]) -> int:
    """Bytes of main memory that an instruction reads and writes, each array once.

    Slices and gathers count the bytes that they read, in-place updates the bytes that
    they write; every other operand counts in full. Arrays in other memories (`space`
    other than 0) are free.
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
    """`traffic` of a fusion: `fused` are its instructions by name."""
    users: dict[str, list[Any]] = {}
    for inner in fused.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    total, updated = 0, set()
    for inner in fused.values():
        if inner.opcode in UPDATES:
            index = -1 if inner.opcode == "scatter" else 1
            update = fused[inner.operands[index]].outputs[0]
            total += 2 * update.bytes
            updated.add(inner.outputs[0].dims)
    for parameter in fused.values():
        if parameter.opcode != "parameter":
            continue
        readers = _readers(users, parameter.name)
        only_sliced = readers and all(reader.opcode in SLICES for reader in readers)
        for array in parameter.outputs:
            if array.space or array.dims in updated:
                continue
            if only_sliced:
                total += sum(reader.outputs[0].bytes for reader in readers)
            else:
                total += array.bytes
    return total + sum(array.bytes for array in outputs if array.dims not in updated)


def _readers(users: Mapping[str, Sequence[Any]], name: str) -> list[Any]:
    """The instructions that use a fused parameter, looking through bitcasts."""
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
    calls = instruction.opcode in ("fusion", "call") and instruction.named("calls")
    if not calls:
        return 0
    fused = module.computations[calls]
    return sum(flops(module, inner, fused) for inner in fused.values())
