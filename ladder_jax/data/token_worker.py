"""A process that writes shards of a token cache.

`python -m ladder_jax.data.token_worker` imports no JAX. It reads lines of JSON from
stdin, the job first and then a unit a line, and writes lines of JSON to stdout:
{"read", "documents"} while it works, then {"done"} or {"error", "kind"}. It ends with
its parent: when stdin ends.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ladder_jax
from ladder_jax.config import ConfigError, Data, to_dict
from ladder_jax.data import token_shard, tokenizer
from ladder_jax.data.formats import Part
from ladder_jax.data.token_shard import File, Job, Report

REPORT_S = 0.2
# The parents' tokenizers would start threads in each of the workers.
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class Worker:
    """A worker, as its parent sees it. Use it in a `with`: it ends there."""

    def __init__(self, job: Job) -> None:
        package = str(Path(ladder_jax.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            process_group=0,  # a Ctrl-C is for the parent, which ends the workers
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self._send(
            dict(
                folder=str(job.folder),
                data=to_dict(job.data_config),
                tokenizer=job.tokenizer.to_json(),
                is_chat=job.is_chat,
                checked=job.checked,
            )
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was not read of stdin
                pass

    def kill(self) -> None:
        """Ends the process at once; the shard that it writes stays absent."""
        self._process.kill()

    def _send(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has died: `write` finds no answer
            pass

    def write(self, number: int, files: list[File], report: Report) -> None:
        """Has a shard written. Raises as `token_shard.write`, and RuntimeError, one
        line, if the process died.
        """
        values = [
            [str(f.part.path), f.part.index, f.part.count, f.size, f.time]
            for f in files
        ]
        self._send([number, values])
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise _ERRORS[message["kind"]](message["error"])
            if "done" in message:
                return
            report(message["read"], message["documents"])
        status = self._process.wait()
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += " (if by the system, for want of memory: use fewer --workers)"
        raise RuntimeError(
            f"a tokenising process {how} at {files[0].part.path}: finished shards are "
            "kept, and the same command goes on from them"
        )


_ERRORS: dict[str, Callable[[str], Exception]] = {
    "config": ConfigError,
    "os": OSError,
    "changed": token_shard.Changed,
}


def _kind(error: Exception) -> str | None:
    for kind, cls in _ERRORS.items():
        if isinstance(cls, type) and isinstance(error, cls):
            return kind
    return None


# ------------------------------------------------------------------ the process


def main() -> None:
    """Reads the job and its units from stdin until it ends."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=[lines], daemon=True).start()
    values = json.loads(lines.get())
    job = Job(
        Path(values["folder"]),
        Data(**values["data"]),
        tokenizer.from_json(values["tokenizer"]),
        values["is_chat"],
        values["checked"],
    )
    while True:
        number, rows = json.loads(lines.get())
        files = [File(Part(Path(p), i, n), size, t) for p, i, n, size, t in rows]
        try:
            token_shard.write(job, number, files, _reporter())
        except Exception as error:
            kind = _kind(error)
            if kind is None:
                raise
            text = getattr(error, "strerror", None) or str(error)
            _say(dict(error=text, kind=kind))
        else:
            _say(dict(done=number))


def _read(lines: queue.SimpleQueue[str]) -> None:
    """Passes on the lines of stdin. Ends the process, and what it writes, with it."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _reporter() -> Report:
    """Returns a function that reports not more often than every REPORT_S."""
    last = time.monotonic()

    def report(read: int, documents: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_S:
            last = time.monotonic()
            _say(dict(read=read, documents=documents))

    return report


def _say(message: dict[str, Any]) -> None:
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:  # the parent has died
        os._exit(0)


if __name__ == "__main__":
    main()
