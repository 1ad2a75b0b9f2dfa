"""Logs: one JSON object a line, written by a thread of their own.

The event loop never waits for a log: a line that finds the queue full is dropped, and
so is one that cannot be written (a full disk, a closed pipe). The next line that is
written says how many were dropped.
"""

import json
import logging
import os
import queue
import threading
import time
import traceback
from typing import Any

from ladder_jax.config import ConfigError

_QUEUE_SIZE = 10_000  # lines


class LogWriter:
    """Writes dicts as lines of JSON.

    Args:
      path: the file to append to; None: stderr.
    Raises ConfigError if the file cannot be opened.
    """

    def __init__(self, path: str | None = None) -> None:
        self._file = 2  # stderr
        if path is not None:
            try:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._file = os.open(path, flags, 0o640)
            except OSError as error:
                raise ConfigError(
                    f"log_file={path!r} is not accepted ({error.strerror}): it must be "
                    "a file that can be written"
                ) from None
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_SIZE)
        self._dropped = 0
        self._is_partial = False  # whether the last line was written in part
        self._thread = threading.Thread(
            target=self._run, name="ladder_jax log", daemon=True
        )
        self._thread.start()

    def write(self, event: str, level: str = "info", **fields: Any) -> None:
        """Logs an event; never waits and never fails."""
        line = dict(time=round(time.time(), 3), level=level, event=event) | fields
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout: float = 1.0) -> None:
        """Writes what is queued, as far as that takes no longer than `timeout` s."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped = self._dropped
            if dropped:
                line["dropped_lines"] = dropped
            try:
                self._write_line(json.dumps(line, default=str))
            except Exception:  # a full disk, a closed pipe: the server goes on
                self._dropped += 1
            else:
                self._dropped -= dropped

    def _write_line(self, text: str) -> None:
        data = (("\n" if self._is_partial else "") + text + "\n").encode()
        while data:
            written = os.write(self._file, data)
            data = data[written:]
            self._is_partial = bool(data)


class Handler(logging.Handler):
    """Sends the records of Python's `logging` to a LogWriter."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = dict(logger=record.name)
        if record.exc_info and record.exc_info[0] is not None:
            lines = traceback.format_exception(*record.exc_info)
            fields["traceback"] = "".join(lines)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        self._writer.write(message, record.levelname.lower(), **fields)
