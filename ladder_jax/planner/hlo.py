"""Reads a program that XLA has compiled and scheduled (`compiled.as_text()`) back into instructions.

A computation of a scheduled module lists its instructions in the order in which a device issues them. That order, and
where the halves of asynchronous pairs stand in it, is all that timeline.py needs; this file knows XLA's text and
nothing about time.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "c64": 64,
    "c128": 128,
    "token": 0,
    "opaque": 0,
    "bf16": 16,
}  # others: by name

# Collectives by opcode. Their asynchronous forms append -start and -done, or wrap them in async-start and -done.
WRAPPED = {
    "async-start": "calls",
    "fusion": "calls",
    "custom-call-start": "called_computations",
}  # SparseCores: last
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Buffer(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: (
        int  # XLA's memory space: 0 is the device's main memory (HBM), 1 on TPU is VMEM
    )

    @property
    def bytes(self):
        bits = (
            BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])
            if BITS.get(self.dtype) != 0
            else 0
        )
        return math.prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    text: str  # everything after the operands

    def named(self, key):
        """The computation that attribute `key` (calls, body, to_apply, ...) names, or None."""
        found = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.text)
        return found and found[1]

    @property
    def scope(self):
        """Where in the program it comes from: jax's name stack, such as jit(step)/layer3/attention/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def cycles(self):
        """XLA:TPU's estimate of its duration, or None."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else None

    @property
    def trips(self):
        """How often a `while` runs, as far as XLA knows, or None."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.text)
        return int(found[1]) if found else None

    @property
    def dims(self):
        """Contracting dimensions of a dot's left operand."""
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", self.text)
        return tuple(map(int, filter(None, found[1].split(",")))) if found else ()


@dataclass(frozen=True)
class Module:
    """A scheduled program: computations by name, each a dict of instructions by name, in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    scheduled: bool
    devices: int  # that run it together

    def collective(self, instruction, computation):
        """The collective that `instruction` is or wraps, as (opcode, its instruction, its computation), or None."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return opcode, instruction, computation
        inside = WRAPPED.get(instruction.opcode) and instruction.named(
            WRAPPED[instruction.opcode]
        )
        return self._first_collective(inside) if inside else None

    @functools.cache  # noqa: B019  a module lives as long as the report that it is read for
    def _first_collective(self, computation):
        for instruction in self.computations[computation].values():
            if found := self.collective(instruction, computation):
                return found
        return None

    def __hash__(self):
        return id(self)


def groups(instruction):
    """The devices that exchange data in a collective: a list of lists of logical device numbers, or of (source, target)
    pairs for a collective-permute. Empty: all devices together."""
    text = instruction.text
    if found := re.search(r"source_target_pairs=\{([{}\d,\s]*)\}", text):
        return [
            tuple(map(int, pair.split(",")))
            for pair in re.findall(r"\{(\d+,\d+)\}", found[1])
        ]
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text
    ):  # axes of a mesh, by name
        sizes = {
            name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])
        }
        inside = re.findall(r"'(\w+)'", found[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        order = [
            list(sizes).index(name)
            for name in [*(n for n in sizes if n not in inside), *inside]
        ]
        return (
            ids.transpose(order)
            .reshape(-1, math.prod(sizes[name] for name in inside))
            .tolist()
        )
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        shape, dims, order = (
            tuple(map(int, part.split(","))) if part else None
            for part in found.groups()
        )
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids if order is None else ids.transpose(order)).reshape(shape).tolist()
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return [
            list(map(int, group.split(",")))
            for group in re.findall(r"\{([\d,]+)\}", found[1])
        ]
    return []


def parse(text):
    """The `Module` of XLA's text. Raises ValueError where it is not one."""
    header = re.match(r"HloModule ([^\n]*)", text)
    if not header:
        raise ValueError(
            "this is not the text of a compiled program: it does not start with HloModule"
        )
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
        if lines is None:
            # `%name (parameters) -> result {`, the parameters being dropped in newer texts
            if line.endswith("{") and (
                found := re.match(r"(ENTRY )?%?([\w.\-]+)(?: \(| \{)", line)
            ):
                name, lines = found[2], []
                entry = name if found[1] else entry
        elif line == "}" or line.startswith(
            "}, execution_thread="
        ):  # the latter run on SparseCores
            body = filter(None, map(_instruction, lines))
            computations[name], lines = (
                {instruction.name: instruction for instruction in body},
                None,
            )
        elif line.startswith("  "):
            lines.append(line)
        elif lines:  # texts of Pallas kernels contain line breaks
            lines[-1] += line
    if entry is None:
        raise ValueError("this program has no entry computation")
    partitions = re.search(r"num_partitions=(\d+)", header[1])
    return Module(
        computations,
        entry,
        "is_scheduled=true" in header[1],
        int(partitions[1]) if partitions else 1,
    )


def _instruction(line):
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _close(rest, 0) if rest[0] == "(" else rest.index(" ") - 1
    outputs, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opcode = rest[: rest.index("(")]
    end = _close(rest, len(opcode))
    operands = (
        ()
        if opcode in ("constant", "parameter")
        else tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : end]))
    )
    return Instruction(found[1], opcode, _buffers(outputs), operands, rest[end + 1 :])


def _close(text, start):
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"parentheses do not close in {text[:80]!r}")


def _buffers(text):
    found = re.findall(
        r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", re.sub(r"/\*.*?\*/", "", text)
    )
    return tuple(
        Buffer(
            dtype,
            tuple(map(int, filter(None, dims.split(",")))),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for dtype, dims, layout in found
    )
