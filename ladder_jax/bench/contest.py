"""Contenders measured in turns, each in a process of its own.

They share the machine's noise and nothing else. The parent starts one contender after
the other. Then one at a time takes its turn while the others wait for a line on stdin,
so that no thread pools compete. A contender answers in lines of JSON on stdout: a
message about its setup, then two times of every step of a turn, and at the end the peak
of its resident set in bytes.

The times are seconds on the clock, and seconds of all its threads on a processor. Other
work on the machine hardly changes the latter. But threads that spin while they wait
count, so that it is fair only where each contender has one core (`taskset -c 0`).
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from ladder_jax.config import ConfigError

# ---------------------------------------------------------------- a contender's side

# Libraries may print. Their output goes to stderr, and stdout stays JSON: see `quiet`.
_stdout: TextIO = sys.stdout


def quiet() -> None:
    """Keeps stdout for `serve`. To be called before a contender's other imports."""
    global _stdout
    _stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def serve(step: Callable[[], object], message: dict[str, Any]) -> None:
    """Answers the parent until it ends.

    Args:
      step: what a turn repeats.
      message: sent first, when the setup is complete.
    """
    _send(message)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            clock, processor = time.perf_counter(), time.process_time()
            step()
            times.append((time.perf_counter() - clock, time.process_time() - processor))
        _send(times)
    _send(peak_bytes())


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _send(value: object) -> None:
    try:
        print(json.dumps(value), file=_stdout, flush=True)
    except BrokenPipeError:  # the parent has ended with a message
        os._exit(1)


# ---------------------------------------------------------------- the parent's side


class Contender:
    """A contender's process.

    Args:
      name: for messages.
      command: starts the process; the constructor returns when it has set up.
    Raises ConfigError where the process ends.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.message = self._receive()

    def turn(self, steps: int) -> list[tuple[float, float]]:
        """Lets it run `steps` steps: (seconds, processor seconds) of each."""
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        return self._receive()

    def finish(self) -> int:
        """Ends it. Returns its peak resident set in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        most = self._receive()
        self.process.wait()
        return most

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(
                f"contender {self.name} stopped with status {self.process.wait()}; "
                "its own message is above"
            )
        return json.loads(line)
