"""What `ladder-jax bench serve` measures: servers, and the engine without HTTP."""

import asyncio
import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ladder_jax.bench import contest
from ladder_jax.bench.load_client import Endpoint, Outcome
from ladder_jax.bench.load_run import Run, over_http
from ladder_jax.bench.serve_arguments import Arguments
from ladder_jax.bench.serve_processes import (
    Server,
    base_url,
    command_words,
    free_port,
    key_headers,
    named,
    started,
    wait_until_ready,
)
from ladder_jax.bench.workloads import Arrival
from ladder_jax.config import to_dict

# Folders of the model of --size.
CHECKPOINT, WEIGHTS = "checkpoint", "hugging_face"
OURS, ENGINE = "ladder_jax", "engine"  # their names in tables
# (arrivals, users) -> what the client saw, see load_run.run_load.
Serve = Callable[[Sequence[Arrival], int], Run]


class Target(NamedTuple):
    """A server, or the engine, that takes loads."""

    name: str
    serve: Serve
    process: subprocess.Popen[Any] | None  # None: it was not started here


def http_target(arguments: Arguments, server: Server) -> Target:
    """A server that is ready, by its URL."""
    fields: dict[str, Any] = dict(
        model=server.model,
        stream=True,
        stream_options=dict(include_usage=True),
        temperature=arguments.temperature,
    )
    if arguments.ignore_eos:
        fields["ignore_eos"] = True
    fields |= json.loads(arguments.extra_body or "{}")
    chat = arguments.prompts == "chat"
    path = "chat/completions" if chat else "completions"
    endpoint = Endpoint(f"{server.url}/v1/{path}", fields, chat)
    headers = key_headers()

    def serve(arrivals: Sequence[Arrival], users: int) -> Run:
        return asyncio.run(
            over_http(
                endpoint,
                arrivals,
                users=users,
                timeout=arguments.timeout,
                headers=headers,
            )
        )

    return Target(server.name, serve, server.process)


@contextlib.contextmanager
def engine_target(arguments: Arguments, checkpoint: str) -> Iterator[Target]:
    """The engine without HTTP, in a process of its own."""
    work = dict(checkpoint=checkpoint, decode=to_dict(arguments.decode))
    command = [sys.executable, "-m", "ladder_jax.bench.serve_engine", json.dumps(work)]

    def serve(arrivals: Sequence[Arrival], users: int) -> Run:
        asked = [(one.seconds, one.prompt, one.max_tokens) for one in arrivals]
        answer = contender.ask(dict(arrivals=asked, users=users))
        outcomes = [
            Outcome(
                request=arrival,
                arrival=served["arrival"],
                sent=served["arrival"],
                times=tuple(served["times"]),
                ended=served["times"][-1],
                prompt_tokens=len(arrival.prompt),
                tokens=len(served["times"]),
                text=served["text"],
                finish=served["finish"],
            )
            for arrival, served in zip(arrivals, answer["requests"], strict=True)
        ]
        return Run(outcomes, answer["seconds"], [], 0.0)

    with contest.Contender(ENGINE, command) as contender:
        yield Target(ENGINE, serve, contender.process)


@contextlib.contextmanager
def servers(arguments: Arguments, folder: Path) -> Iterator[list[Server]]:
    """Starts all servers and waits until they are ready; ends those started here.

    folder: for weights, logs and compiled programs.
    """
    with contextlib.ExitStack() as stack:
        found = [*given(arguments), *to_start(arguments, folder)]
        for server in found:
            if server.command:
                log = folder / f"{server.name}.log"
                print(f"starting {shlex.join(server.command)}", file=sys.stderr)
                stack.enter_context(started(server, log))
        for server in found:
            wait_until_ready(server, arguments.start_timeout)
        yield found


def given(arguments: Arguments) -> list[Server]:
    """The servers that run already. A URL without a name is its own."""
    entries = tuple(
        entry if "=" in entry else f"{entry.partition('://')[2] or entry}={entry}"
        for entry in arguments.urls
    )
    urls = named(entries, "urls", "URL")
    return [Server(name, base_url(url)) for name, url in urls.items()]


def to_start(arguments: Arguments, folder: Path) -> list[Server]:
    """The servers to start, ours first. Writes the weights of --size."""
    commands = named(arguments.commands, "commands", "COMMAND")
    checkpoint = arguments.checkpoint
    values: dict[str, object] = dict(dtype=arguments.dtype, cache=folder / "cache")
    if arguments.size is not None:
        checkpoint = str(folder / CHECKPOINT)
        values["weights"] = folder / WEIGHTS
        if not Path(checkpoint).exists():
            _write_weights(arguments, checkpoint, values["weights"])
    if checkpoint is not None:
        values["checkpoint"] = checkpoint
        commands = {OURS: our_command(arguments)} | commands
    found = []
    for name, text in commands.items():
        port = free_port()
        words = command_words(text, values | dict(port=port, python=sys.executable))
        found.append(Server(name, f"http://127.0.0.1:{port}", words))
    return found


def our_command(arguments: Arguments) -> str:
    """The command that starts ladder-jax serve, with the options of the engine."""
    words = ["{python} -m ladder_jax serve {checkpoint} --port {port}"]
    for name, value in to_dict(arguments.decode).items():
        if value is None:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option} {value}")
    if arguments.startup:
        words.append("--compile-cache {cache}")
    return " ".join([*words, arguments.serve_options])


def _write_weights(arguments: Arguments, checkpoint: str, weights: object) -> None:
    work = dict(
        size=arguments.size,
        dtype=arguments.dtype,
        max_length=str(arguments.length),
        out=checkpoint,
        hugging_face=str(weights),
    )
    command = [sys.executable, "-m", "ladder_jax.bench.serve_weights", json.dumps(work)]
    subprocess.run(command, check=True, start_new_session=True)
