"""Several real processes of one group that run a piece of code each."""

import os
import re
import subprocess
import sys
import time

import helpers

START = """
import contextlib, json, os, signal, sys, time
from pathlib import Path
from ladder_jax.config import ConfigError
from ladder_jax.hardware import distributed, group as groups, roll_call

address, count, number, folder = sys.argv[1:5]
count, number, folder = int(count), int(number), Path(folder)
roll_call.FIRST, roll_call.EVERY = 1.0, 1.0  # lines about waiting come soon

def mark(name):
    (folder / f"{name}.{number}").write_text("")

distributed.join(address, count, number)
group = groups.make("test", 3.0, 100.0)
group.watch.starting = False
"""


class Workers:
    """Processes, their output and their exit statuses, inside a `with`."""

    def __init__(self, folder, code, count=2, devices=1, arguments=None, **variables):
        self.folder, self.count = folder, count
        self.address = helpers.free_address()
        self.processes, self.files = [], []
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            words = [self.address, count, number, folder]
            command = [sys.executable, "-c", START + code, *words]
            if arguments is not None:  # of ladder-jax, whose code may be changed
                command = [sys.executable, "-c", code + MAIN, *arguments]
                command += ["--devices", devices, "--distributed", "--coordinator"]
                command += [self.address, "--processes", count, "--process", number]
            environment = helpers.code_environment(devices) | {
                name: value.format(number) for name, value in variables.items()
            }
            out, err = (open(folder / f"{number}.{x}", "w+") for x in ("out", "err"))
            self.files += [out, err]
            self.processes.append(
                subprocess.Popen(
                    list(map(str, command)), env=environment, stdout=out, stderr=err
                )
            )

    def text(self, number, stream="err"):
        """What a process has written, without the lines of Gloo."""
        text = (self.folder / f"{number}.{stream}").read_text()
        return re.sub(r"(?m)^\[(Gloo|external/gloo).*\n", "", text)

    def last(self, number):
        """The last line that a process has written to stderr."""
        return self.text(number).strip().splitlines()[-1]

    def wait_for(self, condition, seconds=120):
        """Waits until `condition()` holds; all processes must run until then."""
        end = time.monotonic() + seconds
        while not condition():
            for number, process in enumerate(self.processes):
                assert process.poll() is None, (number, self.text(number))
            assert time.monotonic() < end, [self.text(n) for n in range(self.count)]
            time.sleep(0.05)

    def wait_for_marks(self, name):
        """Waits until every process has called mark(name)."""
        files = [self.folder / f"{name}.{n}" for n in range(self.count)]
        self.wait_for(lambda: all(file.exists() for file in files))

    def statuses(self, seconds=60):
        """The exit statuses; all must end within `seconds`."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            texts = [self.text(n)[-2000:] for n in range(self.count)]
            raise AssertionError(f"they did not end: {texts}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        for file in self.files:
            file.close()


MAIN = """
from ladder_jax.cli import main
main()
"""


def who(workers, number):
    """How messages name a process."""
    host, pid = os.uname().nodename, workers.processes[number].pid
    return f"process {number} of {workers.count} ({host}, pid {pid})"
