"""The processes of a run as a group: they agree, wait, stop and end together.

Each process tells the others over the coordination service (channel.py), which does not
wait for the devices' work. Two threads of each process listen: for a failure of any
process, and for a signal to stop. A third one watches who is still there.

    a mistake     all compare what they were given before anything starts: `together`
    waiting       for process 0, or for all, with a line every few seconds: `first`
    an exception  the others print its line and the host's name, and end: `fail`
    a lost host   is noticed by its connection (lifeline.py), by its silence, or by a
                  step that does not end: `give_up`
    a signal      to one stops all after the same step: `request_stop`, `stopped_by`

Exit statuses: that of the process that failed; RETRY where a process was lost or hung;
128 + N after signal N.
"""

import atexit
import contextlib
import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax

from ladder_jax.config import ConfigError
from ladder_jax.hardware.channel import POLL, Channel, Watch
from ladder_jax.hardware.differences import verdict
from ladder_jax.hardware.lifeline import Lifeline
from ladder_jax.hardware.roll_call import RETRY, Missing, Waiting
from ladder_jax.hardware.watchdog import Watchdog

LOST_AFTER = 30.0  # seconds without a sign of life, after which a process is lost
# How many times as long before the first step: 45 s. A process that was killed, and a
# host that is gone, are noticed by their connections at any time.
START_PATIENCE = 1.5
WAIT_TIMEOUT = 86400.0  # seconds to wait for others before the first step
GRACE = 5.0  # seconds for the main thread of the process that failed to end
ACKNOWLEDGE = 10.0  # seconds that process 0 waits until the others have heard the end
LONGEST = 2000  # characters of an error that others print

T = TypeVar("T")
Say = Callable[[str], None]
_number = itertools.count()  # of groups of this process, one after the other
_current: "Group | None" = None


class Failure(NamedTuple):
    """What one process tells the others before it ends."""

    process: int
    who: str  # host and pid
    text: str
    status: int  # with which all end
    stacks: bool = False  # whether all show what their threads do
    own: bool = True  # whether it happened in this process


def current() -> "Group | None":
    """The group of the `with` that this process is in; None: it is alone."""
    return _current


def of_this_run() -> contextlib.AbstractContextManager["Group | None"]:
    """The current group, or a new one; None where JAX has one process."""
    if _current is not None:
        return contextlib.nullcontext(_current)
    return make()


def make(*arguments: Any) -> contextlib.AbstractContextManager["Group | None"]:
    """Group(*arguments); None where JAX has one process. Asks for no devices."""
    from jax._src import distributed  # JAX has no public name for it

    if distributed.global_state.num_processes == 1:
        return contextlib.nullcontext()
    return Group(*arguments)


@contextlib.contextmanager
def telling(group: "Group | None") -> Iterator[None]:
    """Tells the others of an error inside at once, before anything else is closed."""
    try:
        yield
    except BaseException as error:
        if group is not None and not isinstance(error, Disagreement):
            group.fail(error)
        raise


def watchdog(group: "Group | None", timeout: float) -> Watchdog:
    """Notices a step that does not end, and ends all processes with status RETRY."""
    if group is None:
        return Watchdog(timeout, RETRY)
    where = f"process {group.number} of {group.count} ({group.who})"
    end = lambda line: group.give_up(f"{where}: {line}", stacks=True)
    return Watchdog(timeout, RETRY, end)


class Group(contextlib.AbstractContextManager["Group"]):
    """The processes of a run, inside a `with`: an error in one of them ends all.

    Call it after jax.distributed.initialize, in every process.

    Args:
      command: names the program in lines for the user.
      lost_after: seconds without a sign of life, after which a process is lost;
        START_PATIENCE times as many until `started`.
      wait_timeout: seconds that the processes wait for each other before the start.
      say: writes one line.
    """

    def __init__(
        self,
        command: str = "ladder-jax",
        lost_after: float = LOST_AFTER,
        wait_timeout: float = WAIT_TIMEOUT,
        say: Say = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.command, self.wait_timeout, self.say = command, wait_timeout, say
        self.channel = Channel(f"group {next(_number)}")
        self.number, self.count = self.channel.number, self.channel.count
        self.who = f"{socket.gethostname()}, pid {os.getpid()}"
        self.failure: Failure | None = None
        # Called before this process ends without an ordinary exit.
        self.at_end: list[Callable[[], object]] = []
        self.status: int | None = None  # of an end that has begun
        self._gone: set[int] = set()  # processes whose connection was closed
        self._over = threading.Event()
        self._names: dict[str, int] = {}  # how often a name was used
        self._leaving, self._telling = threading.Lock(), threading.Lock()
        # ---- to stop together
        self.stop: signal.Signals | None = None  # once all know of it
        self._steps, self._paused = 0, False
        self.watch = Watch(self.channel, lost_after, START_PATIENCE)
        self.watch.on_lost = self._lose
        news: dict[str, Callable[[bytes], None]]
        news = dict(failure=self._fail_too, stop=self._stop_too)
        if self.number == 0:
            news["stop request"] = self._decide
        self._threads = [
            threading.Thread(target=self._listen, args=pair, daemon=True)
            for pair in news.items()
        ]

    def __enter__(self) -> "Group":
        global _current
        _current = self
        for thread in self._threads:
            thread.start()
        self.lifeline = Lifeline(self.channel, self.who, self._closed)
        atexit.register(self._at_exit)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        global _current
        if error is not None and not isinstance(error, Disagreement):
            self.fail(error)
            return
        self._wait_for_all("end", "the end of their work")
        self.watch.end()
        self._over.set()
        self.lifeline.end()
        for thread in self._threads:
            thread.join(5 * POLL)
        _current = None

    # ------------------------------------------------------------ before the start

    def together(
        self,
        what: str,
        work: Callable[[], T],
        values: Callable[[T], Mapping[str, str]] = lambda _: {},
    ) -> T:
        """Returns work() once it has succeeded in all processes with equal `values`.

        Raises Disagreement in all processes, with the same line, where it raised a
        ConfigError or OSError in one of them, or where the values differ.
        """
        outcome: dict[str, Any] = dict(who=self.who)
        try:
            result = work()
            outcome["values"] = dict(values(result))
        except (ConfigError, OSError) as error:
            outcome["problem"] = " ".join(str(error).split())
        key, waiting = self._key(what), self._waiting()
        self.channel.put(f"{key}/{self.number}", json.dumps(outcome).encode())
        if self.number == 0:
            found = self.channel.gather(key, what, waiting)
            problem = verdict([json.loads(text) for text in found])
            self.channel.put(f"{key} verdict", problem.encode())
        else:
            wait_for = lambda: f"process 0: {what}"
            problem = self.channel.wait(f"{key} verdict", wait_for, waiting).decode()
        if problem:
            raise Disagreement(problem)
        return result

    def first(self, what: str, work: Callable[[], T]) -> T:
        """Does `work` in process 0, and then in all others, which wait for it."""
        key = self._key(what)
        if self.number == 0:
            result = work()
            self.channel.put(key, b"done")
            return result
        self.channel.wait(key, lambda: f"process 0: {what}", self._waiting())
        return work()

    def from_first(self, what: str, text: Callable[[], str]) -> str:
        """The text of process 0, in all processes; `text` is called there alone."""
        key = self._key(what)
        if self.number == 0:
            self.channel.put(key, text().encode())
        wait_for = lambda: f"process 0: {what}"
        return self.channel.wait(key, wait_for, self._waiting()).decode()

    def on_this_host(self) -> int:
        """How many of the processes run on this one's host. All must call it."""
        key, host = self._key("hosts"), socket.gethostname().encode()
        self.channel.put(f"{key}/{self.number}", host)
        return self.channel.gather(key, "hosts", self._waiting()).count(host)

    def wait_for_all(self, what: str) -> None:
        """Returns once all processes have called it."""
        self._wait_for_all(self._key(what), what)

    def _wait_for_all(self, key: str, what: str) -> None:
        self.channel.put(f"{key}/{self.number}", b"")
        self.channel.gather(key, what, self._waiting())

    def _waiting(self) -> Waiting:
        return Waiting(self.wait_timeout, self.say)

    def _key(self, name: str) -> str:
        """A key that no earlier call with the same name has used."""
        self._names[name] = self._names.get(name, 0) + 1
        return f"{name} {self._names[name]}"

    # ------------------------------------------------------------ a common end

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with `error`, in its main thread.

        Call it before anything that waits for the others, such as the end of a save. An
        error that may follow from the end of another process waits for its reason.
        """
        if self.status is not None or self._over.is_set():  # it was told already
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and not _is_memory(error):
            self._wait_for_reason()
        if self.failure is not None:
            time.sleep(GRACE)  # the thread that listens ends this process
        if self.number and 0 in self._gone:
            self.lose_coordinator()
        text = " ".join(str(error).split()) or type(error).__name__
        status = 2 if isinstance(error, ConfigError) else 1
        if isinstance(error, Missing):
            status = RETRY
        if isinstance(error, KeyboardInterrupt):
            status = 128 + signal.SIGINT
        self.status = status
        self._tell(Failure(self.number, self.who, text, status))

    def give_up(self, text: str, stacks: bool = False) -> NoReturn:
        """Ends all processes with status RETRY, from any thread."""
        self._tell(Failure(self.number, self.who, text, RETRY, stacks, own=False))
        time.sleep(GRACE)
        self._end_with(text, RETRY)

    def _tell(self, failure: Failure) -> None:
        values = failure._replace(text=failure.text[:LONGEST])
        # In a thread: the call does not return where process 0 hangs.
        message = json.dumps(values).encode()
        thread = threading.Thread(
            target=self.channel.put_first, args=("failure", message), daemon=True
        )
        thread.start()
        thread.join(5 * POLL)

    def _fail_too(self, message: bytes) -> None:
        """Ends this process, since one of the processes has failed."""
        self.failure = failure = Failure(*json.loads(message))
        text = failure.text
        if failure.own:
            who = f"process {failure.process} of {self.count} ({failure.who})"
            text = f"{who} failed: {failure.text}"
            if failure.process == self.number:
                self.status = failure.status
                time.sleep(GRACE)  # its main thread prints its line and ends
        if failure.stacks:
            faulthandler.dump_traceback(all_threads=True)
        self._end_with(text, failure.status)

    def _lose(self, reason: str) -> None:
        if self.number == 0:
            self.give_up(reason)
        self._end_with(reason, RETRY, heard=True)

    def _closed(self, number: int, who: str) -> None:
        """The connection to a process was closed, and it did not say that it ends."""
        self._gone.add(number)
        try:  # it may have told all why
            told = self.channel.get("failure", POLL) or self.channel.get("stop", POLL)
        except RuntimeError:
            told = None
        if told is not None or self._over.is_set():
            return
        if number == 0:
            self.lose_coordinator()
        text = f"process {number} of {self.count} ({who}) is lost: its connection was"
        self._lose(f"{text} closed")

    def lose_coordinator(self) -> None:
        """Ends this process because process 0 does not run any more."""
        if (failure := self.failure) is not None:  # it ends, or its main thread does
            self._end_with(failure.text, failure.status, heard=True)
        # An error of this process that none has heard of may follow from the loss, such
        # as that of a save, which waits for the others through process 0.
        reason = f"process 0 of {self.count} is lost: its connection was closed"
        self._end_with(reason, RETRY, heard=True)

    def leave(self, status: int) -> NoReturn:
        """Ends this process at once: an ordinary exit would wait for the others.

        Process 0, which runs the coordination service, waits a moment for the others.
        """
        self._end_with(None, status)

    def _end_with(self, text: str | None, status: int, heard: bool = False) -> NoReturn:
        """Prints a line and ends this process. heard: the others need no word of it."""
        with self._leaving:  # one thread comes here, and never leaves
            self.status = status
            if text is not None:
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{self.command}: {text}\n".encode())
            for act in self.at_end:
                with contextlib.suppress(Exception):
                    act()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            if not heard:
                self.lifeline.end()
                thread = threading.Thread(target=self._acknowledge, daemon=True)
                thread.start()
                thread.join(2 * POLL if self.number else ACKNOWLEDGE)
            os._exit(status)

    def _acknowledge(self) -> None:
        """Says that this process has heard the end; process 0 waits for the others."""
        with contextlib.suppress(Exception):
            self.channel.put(f"ended/{self.number}", b"")
            silent = self.watch.silent()
            while self.number == 0:
                ended = {int(number) for number in self.channel.folder("ended")}
                if ended | silent | self._gone >= set(range(self.count)):
                    return
                time.sleep(POLL / 10)

    def _wait_for_reason(self) -> None:
        """Waits until it is known whether another process has ended."""
        end = time.monotonic() + 1.5 * self.watch.lost_after + 5 * POLL
        while time.monotonic() < end and self.failure is None:
            time.sleep(POLL / 10)

    def _at_exit(self) -> None:
        if self.status is not None:
            self.leave(self.status)

    # ------------------------------------------------------------ to stop together

    def started(self) -> None:
        """Says that this process has completed a step: a signal now saves first."""
        self.watch.starting = False
        self.channel.put(f"started/{self.number}", b"")

    def request_stop(self, number: signal.Signals) -> None:
        """Asks all processes to stop. Call it in a thread, not in a handler."""
        self.channel.put_first("stop request", str(int(number)).encode())

    def _decide(self, message: bytes) -> None:
        """Decides in process 0 how all stop: after a step, or at once."""
        begun = len(self.channel.folder("started")) == self.count
        self.channel.put_first("stop", json.dumps([int(message), begun]).encode())

    def _stop_too(self, message: bytes) -> None:
        number, begun = json.loads(message)
        name = signal.Signals(number).name
        if not begun:
            self._end_with(f"stopped by {name} before the first step", 128 + number)
        self.stop = signal.Signals(number)
        published = None
        while not self._over.wait(POLL / 20):
            if published != (state := (self._steps, self._paused)):
                self._publish()
                published = state

    def stopped_by(self, step: int) -> signal.Signals | None:
        """The signal after which all stop here, with `step` steps complete, or None.

        Call it before each step, in all processes; it costs nothing until a process
        gets a signal. Then each one shows how many steps it has begun, and pauses
        until all have begun the same number. One that lags behind takes its steps
        meanwhile, since another may wait for their results.
        """
        if self.stop is None:
            self._steps = step + 1
            return None
        self._steps, self._paused = step, True
        self._publish()
        nap = max(POLL / 50, POLL / 500 * self.count)
        while True:
            shown = [json.loads(x) for x in self.channel.folder("steps").values()]
            if max(steps for steps, _ in shown) > step:
                self._steps, self._paused = step + 1, False
                return None
            if len(shown) == self.count and all(paused for _, paused in shown):
                return self.stop
            time.sleep(nap)

    def _publish(self) -> None:
        with self._telling:
            text = json.dumps([self._steps, self._paused])
            self.channel.put(f"steps/{self.number}", text.encode())

    # ------------------------------------------------------------ the threads

    def _listen(self, key: str, act: Callable[[bytes], None]) -> None:
        """Waits for the message `key`, and acts on it once."""
        while not self._over.is_set():
            try:
                if (message := self.channel.get(key, POLL)) is not None:
                    return act(message)
            except RuntimeError:  # process 0 has gone: then its beats have stopped, too
                self._over.wait(POLL)


class Disagreement(ConfigError):
    """All processes know that they differ, and raise the same line."""


def _is_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)
