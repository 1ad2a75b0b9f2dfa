"""Messages between the processes of a run, and who of them is still there.

JAX's coordination service, which process 0 runs, stores them under keys. So they do not
wait for the devices' work, as a broadcast over the devices would.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from ladder_jax.hardware.roll_call import Missing, Waiting, names

PREFIX = "ladder_jax"
POLL = 1.0  # seconds of one wait for a message, in a longer wait
BEAT = 1.0  # seconds between two signs of life
LOST_AFTER = 15.0  # seconds without one, after which a process is lost
# How many times as long while it starts: Python stands still while XLA is handed a
# program.
START_PATIENCE = 4.0
GRACE = 20.0  # seconds to end after a process was lost


class Channel:
    """Puts and gets messages. number: of this process. count: of the processes.

    name: separates the keys of channels that exist one after the other.
    """

    def __init__(self, name: str = "") -> None:
        from jax._src import distributed  # JAX has no public name for it

        state = distributed.global_state
        self._client: Any = state.client
        self.number, self.count = state.process_id, state.num_processes
        self._prefix = f"{PREFIX}/{name}/" if name else f"{PREFIX}/"

    def put(self, key: str, value: bytes) -> None:
        """Stores a message; it replaces one that is there."""
        self._client.key_value_set_bytes(f"{self._prefix}{key}", value, True)

    def put_first(self, key: str, value: bytes) -> None:
        """Stores a message, unless one is there: the first one stays."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set_bytes(f"{self._prefix}{key}", value, False)

    def get(self, key: str, seconds: float) -> bytes | None:
        """Waits for a message; None: there was none in this time.

        Raises RuntimeError if process 0 has gone.
        """
        try:
            return self._client.blocking_key_value_get_bytes(
                f"{self._prefix}{key}", int(seconds * 1000)
            )
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise  # a RuntimeError, too

    def folder(self, key: str) -> dict[str, bytes]:
        """All messages whose keys begin with `key`/, by the rest of the key."""
        prefix = f"{self._prefix}{key}/"
        found = self._client.key_value_dir_get_bytes(prefix)
        return {name.removeprefix(prefix): value for name, value in found}

    def delete(self, key: str) -> None:
        """Deletes a message, or all whose keys begin with `key`/."""
        self._client.key_value_delete(f"{self._prefix}{key}")

    def wait(self, key: str, what: Callable[[], str], waiting: Waiting) -> bytes:
        """Waits for a message, and says every few seconds for `what`.

        Raises Missing when the time is over, and RuntimeError as `get`.
        """
        while (found := self.get(key, POLL)) is None:
            waiting.on(what())
            if waiting.seconds >= waiting.timeout:
                raise Missing(
                    f"waited {waiting.timeout:.0f} s for {what()}, without an answer"
                )
        return found

    def gather(self, key: str, what: str, waiting: Waiting) -> list[bytes]:
        """The message key/N of every process N, in their order. Waits as `wait`."""

        def missing() -> str:
            there = self.folder(key)
            lacks = [n for n in range(self.count) if str(n) not in there]
            return f"{names(lacks, self.count)}: {what}"

        return [self.wait(f"{key}/{n}", missing, waiting) for n in range(self.count)]

    def exchange(self, key: str, value: str, seconds: float) -> list[str]:
        """Returns what every process gives, in their order. All must call it.

        Raises Missing that names the processes that did not.
        """
        self.put(f"{key}/{self.number}", value.encode())
        end = time.monotonic() + seconds
        values = []
        for number in range(self.count):
            left = max(end - time.monotonic(), 0.001)
            if (found := self.get(f"{key}/{number}", left)) is None:
                raise Missing(
                    f"process {number} of {self.count} did not say its {key} within "
                    f"{seconds:.0f} s"
                )
            values.append(found.decode())
        return values


class Watch:
    """A thread that shows that this process lives, and notes when another does not.

    Process 0 watches all others, and they watch process 0. A process also shows its
    `step`, and whether it was asked to stop.

    lost_after: seconds without a sign of life, after which a process is lost;
      `start_patience` times as many while `starting`.
    on_lost: is called once, with a line about the process that is lost. This process
      ends GRACE seconds later, with status 1, if it has not ended before.
    on_stop: is called in process 0 while another process has been asked to stop.
    """

    def __init__(
        self,
        channel: Channel,
        lost_after: float = LOST_AFTER,
        start_patience: float = START_PATIENCE,
    ) -> None:
        self.channel, self.lost_after = channel, lost_after
        self.start_patience = start_patience
        self.step = 0  # the number of this process's next step
        self.steps: dict[int, int] = {}  # of the others, as far as it is known
        self.stopping = False
        self.starting = True  # until all programs are compiled
        self.on_lost: Callable[[str], object] = exit_because
        self.on_stop: Callable[[], object] = lambda: None
        self.lost: str | None = None
        self._is_lost, self._ended = threading.Event(), threading.Event()
        self._beats = 0
        start = time.monotonic()
        watched = range(1, channel.count) if channel.number == 0 else [0]
        self._last = {number: (b"", start) for number in watched}
        self._names: dict[int, str] = {}
        # Two threads: a call of the coordination service never returns if process 0
        # hangs.
        for work in (self._signal, self._judge):
            threading.Thread(
                target=work, name=f"ladder_jax {work.__name__}", daemon=True
            ).start()

    def end(self) -> None:
        """Ends the watch: the other processes may go now."""
        self._ended.set()

    def silent(self) -> set[int]:
        """The watched processes that have missed several beats."""
        now = time.monotonic()
        last = self._last.items()
        return {number for number, (_, when) in last if now - when > 5 * BEAT}

    def least_step(self) -> int:
        """The step that all other processes have reached, as far as it is known."""
        others = self.channel.count - 1
        return min(self.steps.values()) if len(self.steps) == others else 0

    def wait_for_lost(self, seconds: float | None = None) -> str | None:
        """Waits until a process is lost; returns the line, or None.

        seconds: None: as long as it takes to notice.
        """
        needed = 1.5 * self.lost_after + 5 * BEAT
        self._is_lost.wait(needed if seconds is None else seconds)
        return self.lost

    def _signal(self) -> None:
        """Shows that this process lives, and looks who else does."""
        while not self._ended.wait(BEAT):
            try:
                self._show()
                self._look()
            except Exception:  # process 0 has gone: then its beats have stopped, too
                pass

    def _show(self) -> None:
        self._beats += 1
        name = f"{socket.gethostname()}, pid {os.getpid()}"
        text = f"{self._beats} {self.step} {int(self.stopping)} {name}"
        self.channel.put(f"alive/{self.channel.number}", text.encode())

    def _look(self) -> None:
        now = time.monotonic()
        for key, value in self._shown().items():
            number = int(key)
            if number not in self._last or value == self._last[number][0]:
                continue
            self._last[number] = value, now
            _, step, stopping, name = value.decode().split(" ", 3)
            self.steps[number], self._names[number] = int(step), name
            if stopping == "1":
                self.on_stop()

    def _shown(self) -> dict[str, bytes]:
        """The last signs of life of those that this process watches."""
        if self.channel.number == 0:
            return self.channel.folder("alive")
        found = self.channel.get("alive/0", BEAT)  # not those of all others
        return {} if found is None else {"0": found}

    def _judge(self) -> None:
        """Waits until a process is lost, and says so."""
        # Beats of this thread, not seconds: if this process itself stood still, it has
        # not heard of the others meanwhile.
        silent = dict.fromkeys(self._last, 0)
        heard = {number: when for number, (_, when) in self._last.items()}
        while not self._ended.wait(BEAT):
            patience = self.start_patience if self.starting else 1
            for number, (_, when) in self._last.items():
                silent[number] = 0 if when > heard[number] else silent[number] + 1
                heard[number] = when
                if silent[number] * BEAT >= self.lost_after * patience:
                    return self._lose(number)

    def _lose(self, number: int) -> None:
        name = self._names.get(number, "it has never answered")
        seconds = time.monotonic() - self._last[number][1]
        self.lost = (
            f"process {number} of {self.channel.count} ({name}) is lost: it has not "
            f"answered for {seconds:.0f} s"
        )
        self._is_lost.set()
        self.on_lost(self.lost)
        if not self._ended.wait(GRACE):
            exit_because(self.lost)


def exit_because(reason: str, status: int = 1) -> None:
    """Prints a line and ends this process at once.

    An ordinary exit would wait for the processes that are lost.
    """
    try:
        os.write(2, f"ladder-jax: {reason}\n".encode())
    finally:
        os._exit(status)
