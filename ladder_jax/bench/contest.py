"""Measures contenders (this project and others) in turns, each in its own process.

Turns expose all contenders to the same noise of the machine. The parent starts one
contender after the other. Then one contender at a time runs, while the others wait for
a line on stdin, so that no thread pools compete. A contender writes lines of JSON to
stdout: a message about its setup; for each turn, two times of every step; and at the
end its peak memory in bytes.

The two times are seconds on the clock, and processor seconds of all its threads. Other
work on the machine hardly changes the latter. But threads that spin while they wait
take processor time too, so compare it only where each contender has one core
(`taskset -c 0`).
"""

import contextlib
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
    """Reserves stdout for `serve`; other output goes to stderr. Call it before a
    contender's other imports."""
    global _stdout
    _stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(
    step: Callable[[], object],
    message: dict[str, Any],
    peak_bytes: Callable[[], int] = peak_bytes,
) -> None:
    """Runs the turns that the parent requests, until the parent closes stdin.

    Args:
      step: a turn calls it several times.
      message: the message about the setup, for the parent.
      peak_bytes: the memory that the parent gets at the end.
    """
    send(message)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            clock, processor = time.perf_counter(), time.process_time()
            step()
            times.append((time.perf_counter() - clock, time.process_time() - processor))
        send(times)
    send(peak_bytes())


def send(value: object) -> None:
    """Writes a line of JSON to the parent."""
    try:
        print(json.dumps(value), file=_stdout, flush=True)
    except BrokenPipeError:  # the parent has ended, and printed why
        os._exit(1)


# ---------------------------------------------------------------- the parent's side


class Contender(contextlib.AbstractContextManager["Contender"]):
    """A contender's process, as the parent sees it; it ends with the `with`.

    Ctrl-C in a terminal does not reach it: the parent ends it.

    Args:
      name: of the contender, for messages.
      command: starts the process. The constructor waits for the end of its setup.
    Raises ConfigError where the process ends.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.message = self._receive()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def turn(self, steps: int) -> list[tuple[float, float]]:
        """Runs `steps` steps. Returns (seconds, processor seconds) of each."""
        return self.ask(steps)

    def ask(self, value: object) -> Any:
        """Sends a line of JSON, and returns the contender's answer to it."""
        assert self.process.stdin is not None
        print(json.dumps(value), file=self.process.stdin, flush=True)
        return self._receive()

    def finish(self) -> int:
        """Ends the process. Returns its peak memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self._receive()
        self.process.wait()
        return peak

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(
                f"contender {self.name} stopped with status {self.process.wait()}; "
                "its own message is above"
            )
        return json.loads(line)
