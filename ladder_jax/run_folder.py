"""The lease on a run's folder: one job at a time writes there.

The job that holds the lease keeps a file, lease.json, in the folder. The file says
which process it is, and its modification time is the process's heartbeat. A second job
that wants the folder is refused while the holder runs. A job that died leaves its file
behind: on the same machine the next job sees at once that the process is gone, on
another machine it waits until the heartbeat is STALE_S seconds old.

A job that was taken for dead and goes on later (a host that hung, a requeued job whose
first process never ended) finds another job's name in the file, and stops.
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
STALE_S = 120.0  # above the 60 s for which network file systems may show an old time
log = logging.getLogger(__name__)

Holder = dict[str, Any]  # what the file says: host, machine, pid, started, token


class Lease(contextlib.AbstractContextManager["Lease"]):
    """The right to write into a run's folder, from `with` to its end.

    Where several processes make one job, one of them holds the lease for all.

    Args:
      folder: the run's folder (train.out); it is made.

    Entering raises ConfigError while another job holds the lease, and OSError where the
    folder cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / FILE
        self._me: Holder = dict(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            token=uuid.uuid4().hex,
        )
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._take()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            if _read(self.file)[0] == self._me:
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
            return  # a network file system that does not answer is not another job
        if holder.get("token") != self._me["token"]:
            raise OSError(
                f"{self.file.parent} is now written to by {_name(holder)}, which took "
                "this job for dead: this job stops without another write"
            )

    def _take(self) -> None:
        """Makes the file, or replaces one whose process is gone."""
        first_beat: float | None = None
        while True:
            with contextlib.suppress(FileExistsError), self.file.open("x") as file:
                json.dump(self._me, file)
                return
            try:
                holder, beat = _read(self.file)
            except FileNotFoundError:  # its job has just ended
                continue
            runs = _runs(holder)
            if runs is None and first_beat is None:
                log.warning(
                    "%s is held by %s: waiting up to %.0f s for a heartbeat",
                    self.file,
                    _name(holder),
                    STALE_S,
                )
                first_beat = beat
            if runs is None and first_beat is not None and beat > first_beat:
                runs = True
            if runs:
                raise ConfigError(
                    f"train.out={str(self.file.parent)!r} is not accepted: "
                    f"{_name(holder)} writes there. Choose another folder or end that "
                    f"process; if it does not run any more, remove {self.file}"
                )
            if runs is False or self._now() - beat > STALE_S:
                self._remove(holder)
            else:
                time.sleep(min(1.0, STALE_S / 10))

    def _remove(self, holder: Holder) -> None:
        """Removes the file of `holder`, and no other that has taken its place."""
        aside = self.file.with_name(f"{FILE}.{self._me['token']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.file, aside)  # of two jobs that try, one succeeds
            if _read(aside)[0] == holder:
                aside.unlink()
            else:
                os.rename(aside, self.file)

    def _now(self) -> float:
        """The time by the clock of the folder's file system, as for the heartbeat."""
        with tempfile.NamedTemporaryFile(dir=self.file.parent, prefix=FILE) as probe:
            return os.stat(probe.name).st_mtime

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                if _read(self.file)[0] == self._me:
                    os.utime(self.file)


def _read(file: Path) -> tuple[Holder, float]:
    """(what a lease says, its last heartbeat); {} where it is not yet written."""
    with file.open() as opened:  # opening asks a network file system for news
        try:
            holder = json.load(opened)
        except ValueError:
            holder = {}
        beat = os.fstat(opened.fileno()).st_mtime
    return holder if isinstance(holder, dict) else {}, beat


def _name(holder: Holder) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"


def _runs(holder: Holder) -> bool | None:
    """Whether the process runs; None where this machine cannot tell."""
    if holder.get("machine") != _machine() or "pid" not in holder:
        return None
    started = _started(holder["pid"])
    return started is not None and started == holder.get("started")


def _machine() -> str:
    """Names what numbers processes: a host since its start, or a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process started, as the kernel counts; None where it does not run.

    It tells a process from a later one with the same number.
    """
    if Path("/proc/self/stat").exists():
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        state, *fields = text.rpartition(")")[2].split()  # the name may have spaces
        return None if state in "ZX" else fields[18]  # ended, but not yet waited for
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
