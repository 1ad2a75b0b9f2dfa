"""Reads the text of a program that XLA has scheduled: `compiled.as_text()`.

A computation of a scheduled module lists its instructions in the order in which a
device issues them. This file parses the text; operations.py adds the durations.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

# Bits of an element, where the name of the dtype does not tell them (f32, s8, ...).
BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}

# The opcodes of collectives. An asynchronous collective is two instructions, whose
# opcodes end on -start and -done, or one that another instruction wraps.
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Opcodes that can wrap a collective -> the attribute that names the computation with
# the collective in it.
WRAPPED = {
    "async-start": "calls",
    "fusion": "calls",
    "custom-call-start": "called_computations",  # on SparseCores
}

Groups: TypeAlias = list[list[int]] | list[tuple[int, ...]]


class Buffer(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # XLA's memory space: 0 is HBM; on TPU, 1 is VMEM

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * bits_of(self.dtype) // 8


def bits_of(dtype: str) -> int:
    """Bits of an element of an XLA dtype, such as bf16 or f8e4m3fn."""
    if dtype in BITS:
        return BITS[dtype]
    digits = re.search(r"\d+", dtype)
    if digits is None:
        raise ValueError(f"the size of XLA's type {dtype!r} is not known")
    return int(digits[0])


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    text: str  # everything after the operands; a constant's has its value, too

    def named(self, key: str) -> str | None:
        """The computation that attribute `key` (calls, body, ...) names, or None."""
        match = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.text)
        return match and match[1]

    def called(self, key: str) -> str:
        """The computation that attribute `key` names. Raises ValueError without one."""
        name = self.named(key)
        if name is None:
            raise ValueError(f"{self.opcode} {self.name} has no attribute {key}")
        return name

    @property
    def scope(self) -> str:
        """JAX's name stack, such as jit(step)/layer3/attention/dot_general, or ""."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    @property
    def cycles(self) -> int | None:
        """XLA:TPU's estimate of the duration."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match else None

    @property
    def trips(self) -> int | None:
        """How often a `while` runs, if XLA knows."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.text)
        return int(match[1]) if match else None

    @property
    def dims(self) -> tuple[int, ...]:
        """Contracting dimensions of a dot's left operand."""
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", self.text)
        return _integers(match[1]) if match else ()


Body: TypeAlias = dict[str, Instruction]  # a computation's instructions, in order


class WrappedCollective(NamedTuple):
    """A collective instruction, and the computation that it is in."""

    kind: str  # one of COLLECTIVES
    instruction: Instruction
    body: Body  # the computation


@dataclass(frozen=True)
class Module:
    """A scheduled program: its computations, by name."""

    computations: dict[str, Body]
    entry: str
    scheduled: bool
    devices: int  # that run it together

    def collective(
        self, instruction: Instruction, body: Body
    ) -> WrappedCollective | None:
        """The collective that an instruction of `body` is or wraps, or None."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return WrappedCollective(opcode, instruction, body)
        if instruction.opcode not in WRAPPED:
            return None
        inside = instruction.named(WRAPPED[instruction.opcode])
        return self._first_collective(inside) if inside else None

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs, or None if the program does not tell.

        XLA:GPU writes it beside the loop. XLA:TPU does not: there the loop's condition
        compares a counter, which starts at 0, with it.
        """
        condition = self.computations.get(loop.named("condition") or "", {})
        for one in condition.values():
            if one.opcode == "compare" and "direction=LT" in one.text:
                for name in one.operands:
                    if value := re.match(r"\((\d+)\)", condition[name].text):
                        return loop.trips or int(value[1])
        return loop.trips

    # The cache keeps every module alive. That is acceptable: a plan parses few modules,
    # and then the process ends.
    @functools.cache  # noqa: B019
    def _first_collective(self, computation: str) -> WrappedCollective | None:
        body = self.computations[computation]
        for instruction in body.values():
            collective = self.collective(instruction, body)
            if collective:
                return collective
        return None

    def __hash__(self) -> int:
        return id(self)


# ---------------------------------------------------------------- groups of devices


def groups(instruction: Instruction) -> Groups:
    """The devices that exchange data in a collective.

    Returns a list of logical device numbers for each group; for a collective-permute,
    (source, target) pairs. An empty list means that all devices are one group.
    """
    text = instruction.text
    if match := re.search(r"source_target_pairs=\{([{}\d,\s]*)\}", text):
        return [_integers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", match[1])]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        return _groups_of_axes(match[1], match[2])
    if match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        shape, dims = _integers(match[1]), _integers(match[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            ids = ids.transpose(_integers(match[3]))
        return ids.reshape(shape).tolist()
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return [
            list(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", match[1])
        ]
    return []


def _groups_of_axes(mesh: str, axes: str) -> list[list[int]]:
    """The groups along some axes of a mesh.

    Args:
      mesh: axes and sizes as XLA writes them, such as "'data'=2,'tensor'=2".
      axes: the axes that a group spans, such as "'tensor'".
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    inside = re.findall(r"'(\w+)'", axes)
    outside = [name for name in sizes if name not in inside]
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    order = [list(sizes).index(name) for name in [*outside, *inside]]
    members = math.prod(sizes[name] for name in inside)
    return ids.transpose(order).reshape(-1, members).tolist()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


# ---------------------------------------------------------------- the parser


def parse(text: str) -> Module:
    """Parses the text of a compiled program. Raises ValueError for any other text."""
    header = re.match(r"HloModule ([^\n]*)", text)
    if not header:
        raise ValueError(
            "this is not the text of a compiled program: "
            "it does not start with HloModule"
        )
    computations: dict[str, Body] = {}
    entry = name = None
    lines: list[str] | None = None  # of the computation that is being read
    for line in text.splitlines():
        if lines is None:
            # `%name (parameters) -> result {`; newer texts leave out the parameters.
            start = re.match(r"(ENTRY )?%?([\w.\-]+)(?: \(| \{)", line)
            if start and line.endswith("{"):
                name, lines = start[2], []
                entry = name if start[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            # Computations with a thread of their own run on SparseCores.
            body = [one for one in map(_instruction, lines) if one]
            computations[str(name)] = {one.name: one for one in body}
            lines = None
        elif line.startswith("  "):
            lines.append(line)
        elif lines:
            # The texts of Pallas kernels contain line breaks.
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


def _instruction(line: str) -> Instruction | None:
    """Reads `%name = outputs opcode(operands), attributes`; None for another line."""
    name = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not name:
        return None
    rest = line[name.end() :]
    end = _close(rest, 0) if rest[0] == "(" else rest.index(" ") - 1
    outputs, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opcode = rest[: rest.index("(")]
    end = _close(rest, len(opcode))
    operands: list[str] = []
    if opcode == "constant":
        end = len(opcode) - 1  # its text has its value
    elif opcode != "parameter":
        operands = re.findall(r"%([\w.\-]+)", rest[len(opcode) : end])
    return Instruction(
        name[1], opcode, _buffers(outputs), tuple(operands), rest[end + 1 :]
    )


def _close(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"parentheses do not close in {text[:80]!r}")


def _buffers(text: str) -> tuple[Buffer, ...]:
    """The arrays of a result's type, such as (bf16[4,8]{1,0:S(1)}, u32[])."""
    without_comments = re.sub(r"/\*.*?\*/", "", text)
    arrays = re.findall(
        r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", without_comments
    )
    buffers = []
    for dtype, dims, layout in arrays:
        space = re.search(r"S\((\d+)\)", layout)
        buffers.append(Buffer(dtype, _integers(dims), int(space[1]) if space else 0))
    return tuple(buffers)
