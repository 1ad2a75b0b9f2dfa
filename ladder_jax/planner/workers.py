"""Processes that each compute one task at a time, and may crash or never end.

XLA's compilers abort the process on some programs, and never finish others.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# Tasks after which a process makes room for a new one: it keeps every program that it
# has parsed.
TASKS = 25


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: Any = None
    deadline: float = 0.0
    started: int = 0  # tasks


def results(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    jobs: int,
    limit: float,
) -> Iterator[tuple[Any, Any, str]]:
    """Computes `function` of every task: yields (task, result, "") as each ends.

    A task without a result has what ended it in place of "": a process that the
    operating system or XLA ended, or one that took longer than `limit` seconds.

    Args:
      function: of a module, so that another process can import it.
      tasks: taken only when a process is free.
      jobs: processes at a time.
      limit: seconds of a task.
    """
    remaining, workers = iter(tasks), [_start(function) for _ in range(jobs)]
    try:
        for worker in workers:
            _give(worker, remaining, limit)
        while busy := [one for one in workers if one.task is not None]:
            first = min(one.deadline for one in busy) - time.monotonic()
            wait([one.connection for one in busy], max(first, 0.0))
            for worker in busy:
                ended = _ended(worker, limit)
                if ended is None:
                    continue
                yield ended
                if ended[2] or worker.started >= TASKS:
                    _stop(worker)
                    number = workers.index(worker)
                    worker = workers[number] = _start(function)
                _give(worker, remaining, limit)
    finally:
        for worker in workers:
            _stop(worker)


def _ended(worker: _Worker, limit: float) -> tuple[Any, Any, str] | None:
    """What `results` yields of a worker's task; None if the task goes on."""
    if worker.connection.poll():
        try:
            return worker.task, worker.connection.recv(), ""
        except EOFError:
            worker.process.join()
            status = worker.process.exitcode
            return worker.task, None, f"the compiler ended its process: {status}"
    if time.monotonic() < worker.deadline:
        return None
    return worker.task, None, f"the compiler did not end within {limit:.0f} s"


def _start(function: Callable[[Any], Any]) -> _Worker:
    # A forked process would share JAX's threads.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, remaining: Iterator[Any], limit: float) -> None:
    """Gives a worker the next task, if there is one."""
    worker.task = next(remaining, None)
    if worker.task is not None:
        worker.connection.send(worker.task)
        worker.started += 1
        worker.deadline = time.monotonic() + limit


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """Computes the tasks that a connection brings."""
    try:
        while True:
            connection.send(function(connection.recv()))
    except EOFError:  # the parent has ended
        pass
