"""A second reading of the schedules that XLA emits, without the planner's code.

It has no clock. It lists the collectives of a scheduled program, in the order of issue,
and counts the instructions that a device computes between each one's start and its end.
A collective with none has an empty window: no machine could hide it.
"""

import re
from dataclasses import dataclass, field

NAMES = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    "collective-permute|collective-broadcast"
)
NO_WORK = set(
    "parameter constant bitcast get-tuple-element tuple partition-id replica-id "
    "after-all opt-barrier optimization-barrier copy-start copy-done slice-start "
    "slice-done".split()
)


@dataclass
class Line:
    """An instruction: its name, its opcode, and the text from the opcode on."""

    name: str
    opcode: str
    text: str


@dataclass
class Sent:
    """A collective of the schedule."""

    name: str
    kind: str
    synchronous: bool
    inside: list[str] = field(default_factory=list)  # computed between start and end

    @property
    def hidden(self) -> bool:
        return not self.synchronous and bool(self.inside)


def judge(text: str) -> list[Sent]:
    """The collectives of a scheduled program between two devices or more."""
    computations = read(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    assert entry and "is_scheduled=true" in text.split("\n", 1)[0]
    sent: list[Sent] = []
    open_: dict[str, Sent] = {}
    operands: dict[str, list[str]] = {}

    def kind_of(line: Line) -> str | None:
        """The kind of a collective that an instruction is or contains."""
        found = re.fullmatch(rf"({NAMES})(-start)?", line.opcode)
        if found:
            return found[1]
        if line.opcode not in ("fusion", "async-start", "custom-call-start"):
            return None
        called = re.search(r"(?:calls|called_computations)=\{?%?([\w.\-]+)", line.text)
        inner = computations.get(called[1], []) if called else []
        return next(filter(None, map(kind_of, inner)), None)

    def started_by(name: str) -> str | None:
        """The start that an end belongs to: an operand, or an operand's operand."""
        queue = [name]
        for name in queue:
            if name in open_:
                return name
            queue += [each for each in operands.get(name, []) if each not in queue]
        return None

    def walk(computation: str) -> None:
        for line in computations[computation]:
            arguments = line.text.split("), ", 1)[0]
            operands[line.name] = re.findall(r"%([\w.\-]+)", arguments)
            inner = re.search(r"(?:body|to_apply)=%?([\w.\-]+)", line.text)
            kind = kind_of(line)
            in_product = line.opcode == "fusion" and kind is not None
            ends = line.name.startswith("async-collective-done") and in_product
            starts = line.name.startswith("async-collective-start")
            if line.opcode in ("while", "call") and inner:
                walk(inner[1])
            elif ends or (line.opcode.endswith("-done") and started_by(line.name)):
                start = started_by(line.name)
                assert start, f"{line.name} ends nothing"
                del open_[start]
            elif kind and (starts or not in_product):
                is_sync = line.opcode == kind or '"is_sync":true' in line.text
                one = Sent(line.name, kind, is_sync)
                if not alone(line, computations):
                    sent.append(one)
                if line.opcode != kind:
                    open_[line.name] = one
            elif line.opcode not in NO_WORK:
                for one in open_.values():
                    one.inside.append(line.name)

    walk(entry[1])
    assert not open_, f"these never end: {sorted(open_)}"
    return sent


def alone(line: Line, computations: dict[str, list[Line]]) -> bool:
    """Whether every group of a collective has one device."""
    called = re.search(r"(?:calls|called_computations)=\{?%?([\w.\-]+)", line.text)
    texts = [line.text]
    if called:
        texts += [inner.text for inner in computations.get(called[1], [])]
    for text in texts:
        if sizes := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
            return sizes[1] == "1"
        if re.search(r"replica_groups=\{\{", text):
            return not re.search(r"replica_groups=\{\{\d+,", text)
    return False


def read(text: str) -> dict[str, list[Line]]:
    """The instructions of every computation, in order."""
    computations: dict[str, list[Line]] = {}
    lines: list[Line] = []
    for row in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", row)
        if head and row.endswith("{"):
            lines = computations.setdefault(head[1], [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", row):
            opcode = re.search(r"(?:^|\s)([a-z][\w\-]*)\(", found[2])
            if opcode:
                rest = found[2][opcode.start(1) :]
                lines.append(Line(found[1], opcode[1], rest))
    return computations
