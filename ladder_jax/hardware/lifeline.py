"""Connections between process 0 and the others, which tell at once of one that is lost.

A process that is killed sends nothing, but its system closes its connections. A host
that is gone does not answer the probes of the other system (TCP's keep-alive). Neither
depends on what the process does: signs of life (channel.py) stop where Python stands
still, such as while XLA is handed a program, and so must be waited for.

A process that ends as it should sends BYE first. Where a network lets no connection
through to process 0's port, the signs of life are all there is.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable

from ladder_jax.hardware.channel import Channel
from ladder_jax.hardware.roll_call import address

CONNECT_SECONDS = 10.0
WAIT_SECONDS = 30.0  # for process 0's port
# The system's probes: the first after IDLE seconds of silence, then every EVERY
# seconds; PROBES without an answer are the end of a connection.
IDLE, EVERY, PROBES = 10, 5, 3
LONGEST = 1024  # bytes of a name
BYE = b"\n"


class Lifeline:
    """A thread for each connection, until `end`.

    Args:
      channel: of the processes; process 0's port is one of its messages.
      who: names this process.
      on_closed: is called with the number and the name of a process whose connection
        was closed without BYE, in a thread of its own.
    """

    def __init__(
        self, channel: Channel, who: str, on_closed: Callable[[int, str], object]
    ) -> None:
        self.channel, self.who, self.on_closed = channel, who, on_closed
        self._ended = threading.Event()
        self._connections: list[socket.socket] = []
        work = self._listen if channel.number == 0 else self._connect
        threading.Thread(target=work, name="lifeline", daemon=True).start()

    def end(self) -> None:
        """Says that this process ends, and is not lost."""
        self._ended.set()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.sendall(BYE)

    def _listen(self) -> None:
        """In process 0: one connection of each of the others."""
        with contextlib.suppress(OSError, RuntimeError):
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
            port = str(server.getsockname()[1])
            self.channel.put("lifeline", port.encode())
            while not self._ended.is_set():
                connection, _ = server.accept()
                thread = threading.Thread(
                    target=self._greet, args=[connection], daemon=True
                )
                thread.start()

    def _greet(self, connection: socket.socket) -> None:
        """Reads who is at the other end, and watches the connection."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            connection.settimeout(CONNECT_SECONDS)
            with connection.makefile("rb") as file:
                said = json.loads(file.readline(LONGEST))
            number, who = int(said["process"]), str(said["who"])
            if 0 < number < self.channel.count:
                return self._watch(connection, number, who)
        connection.close()  # another program

    def _connect(self) -> None:
        """In the others: a connection to process 0."""
        from jax._src import distributed  # JAX has no public name for it

        with contextlib.suppress(OSError, RuntimeError):
            port = self.channel.get("lifeline", WAIT_SECONDS)
            coordinator = distributed.global_state.coordinator_address
            if port is None or coordinator is None:
                return
            place = address(coordinator)[0], int(port)
            connection = socket.create_connection(place, CONNECT_SECONDS)
            said = dict(process=self.channel.number, who=self.who)
            connection.sendall(json.dumps(said).encode() + b"\n")
            self._watch(connection, 0, "")

    def _watch(self, connection: socket.socket, number: int, who: str) -> None:
        """Waits until the other end says BYE, or is lost."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        names = dict(TCP_KEEPIDLE=IDLE, TCP_KEEPINTVL=EVERY, TCP_KEEPCNT=PROBES)
        for name, value in names.items():  # Linux's names
            if (option := getattr(socket, name, None)) is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connections.append(connection)
        try:
            is_lost = not connection.recv(1)
        except OSError:  # reset, or no answer to the probes
            is_lost = True
        if is_lost and not self._ended.is_set():
            self.on_closed(number, who)
