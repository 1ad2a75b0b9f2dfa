"""`ladder-jax serve`: its arguments, and the process from start to end."""

import contextlib
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from ladder_jax.arguments import FLAT
from ladder_jax.config import ConfigError, require, to_bytes
from ladder_jax.server import access, startup
from ladder_jax.server.app import create_app
from ladder_jax.server.connections import Protocol
from ladder_jax.server.draining import Server, stop_signals
from ladder_jax.server.logs import Handler, LogWriter
from ladder_jax.server.serving import Options, Serving
from ladder_jax.server.start_progress import ProgressBar, Stage

log = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 75  # longer than those of load balancers, which then close first
BACKLOG = 1024
MOST_FILES = 65536  # open at once; each connection is one
MOST_SECONDS = 10**7  # four months: no timer of an event loop overflows
_ORIGIN = re.compile(r"\*|https?://[^/\s?#]+")


@dataclass(frozen=True)
class Arguments:
    """Serves a checkpoint by OpenAI's HTTP API. SIGTERM, SIGHUP or Ctrl-C stops it once
    its requests are finished; a second one stops it at once."""

    start: startup.Arguments = field(metadata=FLAT)
    host: str = "127.0.0.1"
    """The address to listen on. The default is reached from this machine alone; 0.0.0.0
    is reached from others, which should need an API key then."""
    port: int = 8000
    """The port. 0: any free one."""
    model_name: str | None = None
    """The model's name in the API. None: the name of the checkpoint's folder."""
    api_key_file: str | None = None
    """A file with one API key a line. Keys are also read from LADDER_JAX_API_KEYS,
    separated by commas. Without keys, every client is accepted."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins, such as https://example.com, may use the API."""
    max_body: str = "4MiB"
    """The largest body of a request."""
    max_prompt_tokens: int | None = None
    """The longest prompt. None: decode.max_length, less one."""
    max_output_tokens: int | None = None
    """The most max_tokens of a request. None: decode.max_length."""
    max_choices: int = 128
    """The most outputs of a request: its prompts times n or best_of."""
    request_timeout: float = 600.0
    """Seconds after which a request fails, from its arrival."""
    drain_timeout: float = 60.0
    """Seconds that requests get to finish after a signal to stop."""
    drain_delay: float = 0.0
    """Seconds after a signal to stop during which the server still accepts requests,
    while /ready says no: load balancers need them."""
    log_file: str | None = None
    """Append the log to this file. None: stderr."""
    log_prompts: bool = False
    """Write prompts and outputs to the log."""

    def options(self) -> Options:
        """Returns the settings. Raises ConfigError if one is not accepted."""
        require(self.max_choices > 0, "max_choices", self.max_choices, "greater than 0")
        for name in ("request_timeout", "drain_timeout"):
            value = getattr(self, name)
            accepted = f"greater than 0 and at most {MOST_SECONDS:,}"
            require(0 < value <= MOST_SECONDS, name, value, accepted)
        for name in ("max_prompt_tokens", "max_output_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "greater than 0, or None")
        delay, accepted = self.drain_delay, f"from 0 to {MOST_SECONDS:,}"
        require(0 <= delay <= MOST_SECONDS, "drain_delay", delay, accepted)
        for origin in self.cors_origins:
            accepted = "such as https://example.com, or '*' for all"
            is_origin = bool(_ORIGIN.fullmatch(origin))
            require(is_origin, "cors_origins", origin, accepted)
        max_body = to_bytes(self.max_body, "max_body")
        require(max_body > 0, "max_body", self.max_body, "greater than 0")
        require(0 <= self.port < 2**16, "port", self.port, "from 0 to 65535")
        name = Path(self.start.checkpoint.rstrip("/")).name or "ladder_jax"
        return Options(
            model_name=self.model_name or name,
            max_body=max_body,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            max_choices=self.max_choices,
            request_timeout=self.request_timeout,
            api_keys=access.read_keys(self.api_key_file),
            cors_origins=self.cors_origins,
            log_prompts=self.log_prompts,
        )


def run(arguments: Arguments) -> int:
    """Serves until a signal. Returns the exit status.

    Raises ConfigError if an argument is not accepted; the port is not open then.
    """
    progress = ProgressBar()
    front: Front | None = None

    def open_front() -> None:
        nonlocal front
        front = Front(arguments)

    checked = startup.check(arguments.start, progress, open_front)
    if front is None:
        return follow(checked)
    return lead(arguments, checked, front, progress)


class Front:
    """What one process alone has: the port, the log, the limits."""

    def __init__(self, arguments: Arguments) -> None:
        raise_file_limit()
        self.options = arguments.options()
        self.writer = LogWriter(arguments.log_file)
        log_to(self.writer)
        logging.getLogger("ladder_jax").setLevel(logging.INFO)
        self.socket = bind(arguments.host, arguments.port)

    @property
    def url(self) -> str:
        """The address of the server."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def lead(
    arguments: Arguments,
    checked: startup.Checked,
    front: Front,
    progress: ProgressBar,
) -> int:
    """Answers HTTP requests until a signal; returns the exit status."""
    readies: list[startup.Ready] = []

    def report(what: Stage | str) -> None:
        progress(what)
        serving.lifecycle.report(str(what))

    def start() -> None:
        try:
            checked.stages.report = report
            ready = startup.start(checked)
            readies.append(ready)
            ready.engine.start()
            serving.serve(ready.engine)
        except Exception as error:
            log.exception("the start failed")
            reason = " ".join(str(error).split()) or type(error).__name__
            serving.lifecycle.fail(f"the start failed: {reason}")
            return
        finally:
            progress.close()
        print(f"serving {front.options.model_name} at {front.url}", flush=True)

    starting = threading.Thread(target=start, daemon=True)
    app = create_app(None, front.options, front.writer, on_startup=starting.start)
    serving: Serving = app.state.serving
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(arguments.drain_timeout) + 5,
        backlog=BACKLOG,
    )
    server = Server(config, serving, arguments.drain_delay, arguments.drain_timeout)
    if checked.group is not None:  # a signal to any process stops all
        checked.group.watch.on_stop = lambda: server.stop("another process")
    server.run([front.socket])
    for ready in readies:
        ready.engine.close()
        ready.end()
    front.writer.write("stopped")
    front.writer.close()
    status = 0
    if serving.lifecycle.status == "failed":
        print(f"ladder-jax serve: {serving.lifecycle.detail}", file=sys.stderr)
        status = 1
    # XLA may compile in a thread that Python cannot end, or a process may be lost.
    if starting.is_alive() or (status and checked.group is not None):
        startup.leave(status)
    return status


def follow(checked: startup.Checked) -> int:
    """Takes the steps of process 0 until it ends; returns the exit status."""
    assert checked.group is not None
    channel, watch = checked.group

    def stop(number: int, _: FrameType | None) -> None:
        if watch.stopping and number != signal.SIGHUP:
            os._exit(128 + number)
        watch.stopping = True  # process 0 drains then, and tells all to end

    for number in stop_signals():
        signal.signal(number, stop)
    who = f"process {channel.number} of {channel.count}"
    try:
        ready = startup.start(checked)
        print(f"{who} follows process 0, and ends with it", flush=True)
        ready.follow()
    except Exception as error:  # an ordinary exit would wait for the others
        reason = " ".join(str(error).split())
        print(f"ladder-jax serve: {who}: {reason}", file=sys.stderr)
        startup.leave(1)
    return 0


def log_to(writer: LogWriter) -> None:
    """Sends the records of Python's `logging` to a log, and not to stderr as well.

    Importing Orbax adds a handler that writes all records to stderr.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.addHandler(Handler(writer))


def raise_file_limit() -> None:
    """Allows as many connections as the system does, up to MOST_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, which does not listen yet."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"host={host!r}, port={port} is not accepted: {error.strerror or error}"
        ) from None
    return bound
