"""Runs of several processes that suffer faults, and go on by the launchers alone.

A run is `launch/again.sh launch/local.sh N -- ladder-jax train ... --resume`, and its
corpus is in an object store. While it runs, a random fault after the other hits it. An
operator starts the launchers again where their status says that this is of no use
without a change: a full disk, a mistake in the command.
"""

import dataclasses
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiny
from fake_s3 import FakeS3
from helpers import ROOT, code_environment

from ladder_jax.checkpoint import read_meta, saved_steps
from ladder_jax.stored_arrays import open_arrays

STEPS, SAVE_EVERY = 40, 5
PATIENCE = 240.0  # seconds without a checkpoint, a restart or an end: then it hangs

# `ladder-jax` of one process. The file CHANGED, if it is there, has the number of a
# process and words that only this one gets.
PROCESS = """\
import json, os, sys
words, changed = sys.argv[1:], os.environ["CHANGED"]
if os.path.exists(changed):
    number, more = json.load(open(changed))
    if words[words.index("--process") + 1] == str(number):
        words += more
sys.argv[1:] = words
from ladder_jax.cli import main
main()
"""


@dataclasses.dataclass
class Fault:
    """One fault, and what came of it."""

    kind: str
    process: int
    run: int
    step: int  # of the newest checkpoint
    seconds: float = 0.0  # until a process runs again, or the run goes on


class Chaos:
    """Runs in `folder`, hit by `count` faults, drawn from `seed`.

    Every run has the same configuration, and `outs` are the folders of those that
    ended.
    """

    def __init__(
        self, folder: Path, count: int, seed: int, store: FakeS3, processes: int
    ) -> None:
        self.folder, self.count, self.store = folder, count, store
        self.processes = processes
        self.random = random.Random(seed)
        self.faults: list[Fault] = []
        self.outs: list[Path] = []
        self.changed = folder / "changed.json"
        self.log = folder / "log.txt"
        self.launcher: subprocess.Popen | None = None
        self.allowed: set[int] = set()  # statuses of launchers that faults explain
        for path in tiny.write_corpus(folder / "corpus").iterdir():
            store.objects[f"bucket/corpus/{path.name}"] = path.read_bytes()
        self.recipe = tiny.recipe(
            folder,
            data_source="s3://bucket/corpus",
            mesh_data=1,
            mesh_fsdp=processes // 2,
            mesh_tensor=2,
            train_steps=STEPS,
            train_save_every=SAVE_EVERY,
            train_log_every=5,
            train_eval_every=20,
            train_keep_checkpoints=3,
            train_sample_tokens=0,
        )

    # ------------------------------------------------------------ runs

    def run(self) -> None:
        """Runs as many as it takes until all faults have happened."""
        kinds: list[str] = []
        while len(self.faults) < self.count or not self.outs:
            out = self.folder / f"run{len(self.outs)}"
            self._start(out)
            while not self._has_ended(out):
                if len(self.faults) == self.count:
                    self._wait(lambda: False, 1.0)
                    continue
                kinds = kinds or self.random.sample([*KINDS], len(KINDS))
                if self._wait_for_a_moment(out):
                    self._happen(kinds.pop(), out)
            self.outs.append(out)

    def whole(self) -> Path:
        """The folder of a run without faults."""
        out = self.folder / "whole"
        self._start(out)
        while not self._has_ended(out):
            self._wait(lambda: False, 1.0)
        return out

    def _start(self, out: Path) -> None:
        words = [
            ROOT / "launch/again.sh",
            ROOT / "launch/local.sh",
            self.processes,
            "--",
        ]
        words += [sys.executable, "-c", PROCESS, "train", self.recipe, "--resume"]
        words += ["--train.out", out, "--devices", 1]
        variables = dict(
            CHANGED=str(self.changed),
            PAUSE="0",
            GRACE="8",
            RESTARTS="1000000",
            LADDER_JAX_LOST_AFTER="8",
            LADDER_JAX_JOIN_TIMEOUT="30",
            LADDER_JAX_STEP_TIMEOUT="90",
            AWS_ENDPOINT_URL=self.store.endpoint,
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="secret",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
        )
        with self.log.open("a") as log:
            self.launcher = subprocess.Popen(
                [*map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=code_environment() | variables,
            )

    def _has_ended(self, out: Path) -> bool:
        """Whether the run is done. Starts it again where an operator would."""
        assert self.launcher is not None
        status = self.launcher.poll()
        if status is None:
            return False
        if status:
            assert status in self.allowed, f"status {status}: {self.tail()}"
            self._start(out)
            return False
        assert (out / "checkpoints" / str(STEPS)).is_dir(), self.tail()
        return True

    def _wait(self, condition, seconds: float) -> bool:
        """Whether `condition()` held within so many seconds, while the launcher ran."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.launcher.poll() is None:
            if condition():
                return True
            time.sleep(0.05)
        return condition()

    def _wait_for_a_moment(self, out: Path) -> bool:
        """Waits until a fault is due: in two of five cases at any time, else once the
        run has saved again. False: the launcher has ended before.
        """
        if self.random.random() < 0.4:
            self._wait(lambda: False, self.random.uniform(0, 8))
        else:
            before = newest(out)
            self._must(lambda: newest(out) > before, "no checkpoint")
            self._wait(lambda: False, self.random.uniform(0, 2))
        return self.launcher.poll() is None

    def _must(self, condition, what: str) -> None:
        """Waits until `condition()` holds or the launcher has ended."""
        done = self._wait(condition, PATIENCE) or self.launcher.poll() is not None
        assert done, f"{what} for {PATIENCE:.0f} s: {self.faults[-1:]} {self.tail()}"

    # ------------------------------------------------------------ faults

    def _happen(self, kind: str, out: Path) -> None:
        numbers = dict(first=[0], others=range(1, self.processes))
        number = self.random.choice(numbers.get(KINDS[kind], range(self.processes)))
        self._must(lambda: pid_of(number, out) is not None, "no process")
        pid = pid_of(number, out)
        if pid is None:  # the run has just ended
            return
        fault = Fault(kind, number, len(self.outs), newest(out))
        self.faults.append(fault)
        begun = time.monotonic()
        with self.log.open("a") as log:
            log.write(f"---- fault {len(self.faults)}: {fault}\n")
        self.allowed = set()
        try:
            getattr(self, f"_{kind.split()[0]}")(kind, number, pid, out)
        except ProcessLookupError:
            pass
        fault.seconds = time.monotonic() - begun
        with (self.folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(fault)) + "\n")

    def _other_process(self, number: int, pid: int, out: Path) -> None:
        """Waits until process `number` was started again."""
        again = lambda: pid_of(number, out) not in (None, pid)
        self._must(again, f"process {number} was not started again")

    def _kill(self, kind: str, number: int, pid: int, out: Path) -> None:
        os.kill(pid, signal.SIGKILL)
        self._other_process(number, pid, out)

    def _stop(self, kind: str, number: int, pid: int, out: Path) -> None:
        os.kill(pid, signal.SIGTERM)
        self._other_process(number, pid, out)

    def _hang(self, kind: str, number: int, pid: int, out: Path) -> None:
        """It stands still for good: the others end, and local.sh kills it."""
        os.kill(pid, signal.SIGSTOP)
        self._other_process(number, pid, out)

    def _pause(self, kind: str, number: int, pid: int, out: Path) -> None:
        """It stands still for a while, and the run goes on."""
        os.kill(pid, signal.SIGSTOP)
        self._wait(lambda: False, self.random.uniform(0.5, 3))
        os.kill(pid, signal.SIGCONT)

    def _disk(self, kind: str, number: int, pid: int, out: Path) -> None:
        """No file of this process can grow any more: an operator makes space."""
        self.allowed = {1}
        small = self.random.choice([0, 4096])
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY))
        if not self._wait(lambda: pid_of(number, out) != pid, 60):
            # It wrote nothing more.
            limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    def _store(self, kind: str, number: int, pid: int, out: Path) -> None:
        """The store has trouble while the run starts again."""
        self.store.trouble = kind.split()[1]
        os.kill(pid, signal.SIGKILL)
        self._other_process(number, pid, out)
        self._wait(lambda: False, self.random.uniform(4, 8))
        self.store.trouble = ""

    def _argument(self, kind: str, number: int, pid: int, out: Path) -> None:
        """A restart in which one process has another option: all refuse it."""
        self.allowed = {2}
        words = self.random.choice(
            [
                ["--train.seed", "5"],
                ["--optimizer.learning-rate", "0.1"],
                ["--train.save-every", "7"],
                ["--train.out", str(out) + "-other"],
            ]
        )
        self.changed.write_text(json.dumps([number, words]))
        os.kill(pid, signal.SIGKILL)
        self._must(lambda: False, "a changed argument was not refused")
        self.changed.unlink()
        status, text = self.launcher.poll(), self.tail()
        assert status == 2, f"status {status}: {text}"
        field = words[0].removeprefix("--").replace("-", "_")
        assert re.search(rf"ladder-jax train: (process \d.*: )?{field}[ =]", text), text
        assert not (out.parent / f"{out.name}-other" / "checkpoints").exists()

    def tail(self) -> str:
        """The end of the processes' output."""
        return self.log.read_text(errors="replace")[-6000:]


# Each kind of fault, and the processes that it may hit.
KINDS = {
    "kill": "others",
    "kill coordinator": "first",
    "stop": "any",
    "hang": "others",
    "hang coordinator": "first",
    "pause": "any",
    "disk": "any",
    "store slow": "any",
    "store refuses": "any",
    "store fails": "any",
    "argument": "any",
}


def newest(out: Path) -> int:
    """The step of the newest checkpoint, or -1."""
    return max(saved_steps(out / "checkpoints"), default=-1)


def pid_of(number: int, out: Path) -> int | None:
    """The process `number` of the run in `out`."""
    last = ["--process", str(number)]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")[:-1]
        except OSError:  # it has ended
            continue
        if words[-2:] == last and str(out) in words and "--coordinator" in words:
            if words[0] == sys.executable:
                return int(path.parent.name)
    return None


def differences(out: Path, whole: Path) -> list[str]:
    """What differs between two runs, bit for bit: rows, parameters, position."""
    found = []
    if tiny.rows(out) != tiny.rows(whole):
        found.append("metrics.jsonl")
    places = [folder / "checkpoints" / str(STEPS) for folder in (out, whole)]
    for part in ("model", "optimizer"):
        left, right = (open_arrays(place / part) for place in places)
        assert left.keys() == right.keys() and left
        for name, array in left.items():
            pair = [x.store.read().result() for x in (array, right[name])]
            if pair[0].tobytes() != pair[1].tobytes():
                most = np.abs(np.float64(pair[0]) - np.float64(pair[1])).max()
                found.append(f"{part} {name} by {most}")
    metas = [read_meta(place) for place in places]
    if metas[0]["data"] != metas[1]["data"]:
        found.append("the data's position")
    return found
