"""A plain end where JAX would abort a process of a run, with a dump of C++ stacks.

JAX's client of the coordination service, which process 0 runs, aborts its process when
process 0 is gone. It does so in a thread of C++, within moments. Python cannot turn
this off (jax 0.10: it cannot even get the client's error, and the call of a Python
function ends as an abort too). So this module also handles the abort itself.
"""

import contextlib
import ctypes
import functools
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

CONNECT_SECONDS = 2.0
# A process that was killed closes its connections before the port that it listens on.
CLOSING_SECONDS = 3.0
# C's handlers must live as long as the process.
_handlers: list[Any] = []


@contextlib.contextmanager
def handled(address: tuple[str, int], on_lost: Callable[[], object]) -> Iterator[None]:
    """Inside, a call of jax.distributed.initialize makes a client that calls `on_lost`
    instead of an abort, if nothing listens at the coordinator's `address` any more.

    `on_lost` runs in a thread of C++ and should end the process. An abort for another
    reason stays an abort.
    """

    def lost(*_: object) -> None:
        on_lost()

    from jax._src.lib import _jax  # JAX has no public name for it

    name = "get_distributed_runtime_client"
    make = getattr(_jax, name, None)
    if make is not None:
        setattr(_jax, name, functools.partial(make, missed_heartbeat_callback=lost))
    try:
        yield
    finally:
        if make is not None:
            setattr(_jax, name, make)

    def aborted(_: int) -> None:
        end = time.monotonic() + CLOSING_SECONDS
        while time.monotonic() < end:
            if not _listens(address):
                on_lost()
            time.sleep(0.1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _handlers.append(handler)
    # Python's own handlers run in the main thread, which an abort does not wait for.
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    _handle_terminate(aborted)


def _handle_terminate(act: Callable[[int], None]) -> None:
    """Calls `act` before C++ prints lines about an exception that nobody catches."""
    make = ctypes.CFUNCTYPE(None)
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")["_ZSt13set_terminatePFvvE"]
    except (OSError, AttributeError):  # another C++ library: it prints its lines
        return
    set_terminate.restype, set_terminate.argtypes = make, [make]

    def terminated() -> None:
        act(0)
        before()

    handler = make(terminated)
    before = set_terminate(handler)
    _handlers.append(handler)


def _listens(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(address, CONNECT_SECONDS).close()
        return True
    return False
