"""Says in one line in which value the processes of a run differ, or what failed."""

from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 120  # characters of a value


def verdict(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The line about what keeps the processes from going on, or "".

    outcomes: of each process, by number: `who` it is, and the `problem` that it has, or
      its `values`.
    """
    problems = {n: x["problem"] for n, x in enumerate(outcomes) if "problem" in x}
    if not problems:
        return difference([outcome["values"] for outcome in outcomes])
    number, problem = next(iter(problems.items()))
    if list(problems.values()) == [problem] * len(outcomes):
        return problem
    who = f"process {number} of {len(outcomes)} ({outcomes[number]['who']})"
    others = len(problems) - 1
    return f"{who}: {problem}" + (f" (and {others} more)" if others else "")


def difference(given: Sequence[Mapping[str, str]]) -> str:
    """The line about the first field that is not the same in all processes, or "".

    given: the fields of each process, by number.

    `optimizer.learning_rate is 0.001 in process 0 and 0.0003 in processes 2, 3 of 4`
    """
    fields = dict.fromkeys(name for values in given for name in values)
    differing = [
        name for name in fields if len({values.get(name) for values in given}) > 1
    ]
    if not differing:
        return ""
    name, *others = differing
    by_value: dict[str, list[int]] = {}
    for number, values in enumerate(given):
        by_value.setdefault(values.get(name, "missing"), []).append(number)
    parts = [
        f"{_short(value)} in {_processes(numbers)}"
        for value, numbers in by_value.items()
    ]
    line = f"{name} is {' and '.join(parts)} of {len(given)}"
    if others:
        names = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        line += f"; {names} {'differ' if len(others) > 1 else 'differs'} too"
    return f"{line}: give all processes the same"


def _processes(numbers: Sequence[int]) -> str:
    """[0, 2, 3, 4] -> processes 0, 2-4."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts: list[str] = []
    for low, high in ranges:
        if high - low < 2:
            texts += map(str, range(low, high + 1))
        else:
            texts.append(f"{low}-{high}")
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(texts)}"


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}..."
