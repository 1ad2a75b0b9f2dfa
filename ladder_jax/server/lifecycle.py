"""The states of a server: starting, ready, draining, failed."""

import threading
from typing import Literal

Status = Literal["starting", "ready", "draining", "failed"]


class Lifecycle:
    """The state of one server. Any thread may change it.

    status: "starting" until all programs are compiled, "ready", "draining" once a
      signal asks the server to stop, "failed" once the engine has ended.
    detail: a line about the state, for people.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.status: Status = "starting"
        self.detail: str | None = None

    def report(self, detail: str) -> None:
        """Says how far the start-up is."""
        with self._lock:
            if self.status == "starting":
                self.detail = detail

    def ready(self) -> None:
        """starting -> ready."""
        with self._lock:
            if self.status == "starting":
                self.status, self.detail = "ready", None

    def drain(self) -> None:
        """starting, ready -> draining."""
        with self._lock:
            if self.status != "failed":
                self.status = "draining"
                self.detail = "the server finishes its requests and then stops"

    def fail(self, reason: str) -> None:
        """Any state -> failed."""
        with self._lock:
            self.status, self.detail = "failed", reason

    @property
    def serves(self) -> bool:
        """Whether the server takes requests: also while it drains."""
        return self.status in ("ready", "draining")
