"""Contenders measured in turns, each in a process of its own, so that they share the machine's noise and nothing else.

The parent starts one contender after the other, and then lets one at a time take its turn while the others wait for a
line on stdin, so that no thread pools compete. A contender talks in lines of JSON on stdout: what it has to say about
its setup, then two times of every step of a turn, and at the end the peak of its resident set in bytes. The times are
seconds on the clock, and seconds of all its threads on a processor, which other work on the machine hardly changes; but
threads that spin while they wait count, so that the latter are fair where each contender has one core (`taskset -c 0`).
"""

import json
import os
import resource
import subprocess
import sys
import time

from ladder_jax.config import ConfigError


def serve(step, said):
    """A contender's side: says `said` (a dict), then calls `step()` as often as each turn asks for."""
    _say(said)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter(), time.process_time()
            step()
            times.append(
                (time.perf_counter() - start[0], time.process_time() - start[1])
            )
        _say(times)
    _say(peak())


def peak():
    """The most memory that this process has had resident, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _say(value):
    try:
        print(json.dumps(value), file=_stdout, flush=True)
    except BrokenPipeError:  # the parent has given up, and has said why
        os._exit(1)


# A contender's libraries may print; what they print goes to stderr, and stdout stays JSON.
_stdout = sys.stdout


def quiet():
    """Called by a contender before it imports its libraries: keeps stdout for `serve`."""
    global _stdout
    _stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


class Contender:
    """The parent's side of one contender: a process, started by `command` (a list), once it has set up."""

    def __init__(self, name, command):
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.said = self._hear()

    def turn(self, steps):
        """Lets it run `steps` steps: (seconds, processor seconds) of each."""
        print(steps, file=self.process.stdin, flush=True)
        return self._hear()

    def finish(self):
        """Ends it; its peak resident set, bytes."""
        self.process.stdin.close()
        most = self._hear()
        self.process.wait()
        return most

    def _hear(self):
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(
                f"contender {self.name} stopped with status {self.process.wait()}; it says why above"
            )
        return json.loads(line)
