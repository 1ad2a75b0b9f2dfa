"""The lease on a run's folder, or on an output file: one job at a time writes there.

The job that holds the lease writes a file, lease.json, into the folder. The file names
the job's process, and its modification time is the process's heartbeat. While that
process runs, a second job cannot take the lease. A job that dies leaves its file: on
the same machine the next job sees at once that the process does not run, on another
machine it waits until the heartbeat is STALE_S seconds old.

A job whose lease another job took (its host hung, or it was requeued while its first
process ran) sees the other job's process in the file, and stops.
"""

import contextlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ladder_jax.config import ConfigError

FILE = "lease.json"
HEARTBEAT_S = 10.0
# A heartbeat this old is that of a dead job. Network file systems may show a time that
# is up to 60 s old.
STALE_S = 120.0
log = logging.getLogger(__name__)

# The file's contents, about the process that holds the lease: host, machine, pid,
# started, token.
Holder = dict[str, Any]


class Lease(contextlib.AbstractContextManager["Lease"]):
    """The right to write into a run's folder, or a file, inside a `with`.

    If a job has several processes, one of them holds the lease for all.

    Args:
      folder: the run's folder. Entering the `with` makes it.
      field: the option that names the folder, for messages.
      output: a file. Then the lease is for this file, and its own file is beside it;
        `folder` is the folder of both.

    Entering raises ConfigError while another job holds the lease, and OSError where the
    folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        field: str = "train.out",
        output: Path | None = None,
    ) -> None:
        self.file, self.field = Path(folder) / FILE, field
        self._place = self.file.parent
        if output is not None:
            self.file, self._place = Path(folder) / f".{output.name}.{FILE}", output
        self._own = own_process()
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._acquire()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            if _read(self.file)[0] == self._own:
                self.file.unlink()

    def check(self) -> None:
        """Raises OSError where another job holds the lease now. Call before writing."""
        try:
            holder, _ = _read(self.file)
        except FileNotFoundError:
            raise OSError(
                f"{self.file} was removed while this job ran: it stops without "
                "another write, as another job may go on with the run"
            ) from None
        except OSError:
            return  # the file system did not answer: that does not mean another job
        if holder.get("token") != self._own["token"]:
            raise OSError(
                f"{self._place} is now written to by {name(holder)}, which took "
                "this job for dead: this job stops without another write"
            )

    def _acquire(self) -> None:
        """Writes the file. Replaces another job's file if that job does not run.

        Raises ConfigError if the other job runs.
        """
        first_beat: float | None = None
        while True:
            with contextlib.suppress(FileExistsError), self.file.open("x") as file:
                json.dump(self._own, file)
                return
            try:
                holder, beat = _read(self.file)
            except FileNotFoundError:  # the other job has just ended
                continue
            is_alive = runs(holder)
            if is_alive is None and first_beat is None:
                log.warning(
                    "%s is held by %s: waiting up to %.0f s for a heartbeat",
                    self.file,
                    name(holder),
                    STALE_S,
                )
                first_beat = beat
            # The holder is on another machine: a new heartbeat shows that it runs.
            if is_alive is None and first_beat is not None and beat > first_beat:
                is_alive = True
            if is_alive:
                raise ConfigError(
                    f"{self.field}={str(self._place)!r} is not accepted: "
                    f"{name(holder)} writes there. Choose another one or end that "
                    f"process; if it does not run any more, remove {self.file}"
                )
            if is_alive is False or self._now() - beat > STALE_S:
                self._remove(holder)
            else:
                time.sleep(min(1.0, STALE_S / 10))

    def _remove(self, holder: Holder) -> None:
        """Removes the file if it is still `holder`'s."""
        aside = self.file.with_name(f"{self.file.name}.{self._own['token']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.file, aside)  # if two jobs try this, one succeeds
            if _read(aside)[0] == holder:
                aside.unlink()
            else:
                os.rename(aside, self.file)

    def _now(self) -> float:
        """The time by the file system's clock, which dates the heartbeat too."""
        with tempfile.NamedTemporaryFile(dir=self.file.parent, prefix=FILE) as probe:
            return os.stat(probe.name).st_mtime

    def _beat(self) -> None:
        """Renews the file's modification time until the `with` ends (a thread)."""
        while not self._ended.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                if _read(self.file)[0] == self._own:
                    os.utime(self.file)


def own_process() -> Holder:
    """What a lease says about this process."""
    return dict(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        token=uuid.uuid4().hex,
    )


def _read(file: Path) -> tuple[Holder, float]:
    """(holder, time of its last heartbeat); the holder is {} if the file is empty."""
    with file.open() as stream:  # open() makes a network file system refresh the file
        try:
            holder = json.load(stream)
        except ValueError:
            holder = {}
        beat = os.fstat(stream.fileno()).st_mtime
    return holder if isinstance(holder, dict) else {}, beat


def name(holder: Holder) -> str:
    """The process that holds a lease, for messages."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"


def runs(holder: Holder) -> bool | None:
    """Whether the holder's process runs; None if it is on another machine."""
    if holder.get("machine") != _machine() or "pid" not in holder:
        return None
    started = _started(holder["pid"])
    return started is not None and started == holder.get("started")


def _machine() -> str:
    """The name of this host's boot and container: process ids are unique within it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # these files are Linux's
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks; None if it does not run.

    A later process with the same id has another start time. Without /proc the result
    is "running".
    """
    if Path("/proc/self/stat").exists():
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        state, *fields = text.rpartition(")")[2].split()  # the name may have spaces
        is_zombie = state in "ZX"  # the process has ended
        return None if is_zombie else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
