"""The start of a process: with emulated devices, or as one of a run's processes."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ladder_jax.arguments import ENVIRONMENT
from ladder_jax.config import ConfigError, require
from ladder_jax.hardware import aborts, roll_call

JOIN_TIMEOUT = 300.0  # seconds, for all processes to start
# JAX's own limits, in seconds. The group's are shorter: see group.py.
JAX_LOST_AFTER = 3600
JAX_SHUTDOWN = 60
# Threads of XLA:CPU for each emulated device. A collective keeps a thread until the
# other devices come, and a device may be in several, of programs that were called one
# after the other: with a thread for each core or device, XLA's default, all of them may
# wait for a device that has none left.
THREADS = 4
THREAD_VARIABLES = ("PJRT_NPROC", "NPROC")  # XLA reads the first that is set


def _option(default: Any) -> Any:
    """A field that an environment variable sets, too."""
    return field(default=default, metadata=ENVIRONMENT)


@dataclass(frozen=True)
class Hosts:
    """Several processes (each option also as LADDER_JAX_COORDINATOR and so on)"""

    distributed: bool = _option(False)
    """Join a run of several processes. Start the same command on every machine. On a
    TPU pod, under Slurm, MPI or a Kubernetes Job, each process learns its number;
    elsewhere give the next three options."""
    coordinator: str | None = _option(None)
    """The address HOST:PORT of process 0, to which the others connect."""
    processes: int | None = _option(None)
    """The number of processes."""
    process: int | None = _option(None)
    """The number of this process, from 0."""
    join_timeout: float = _option(JOIN_TIMEOUT)
    """Seconds to wait until all processes have started."""
    wait_timeout: float = _option(86400.0)
    """Seconds that the processes wait for each other afterwards, such as for the
    tokens of the corpus."""
    lost_after: float = _option(30.0)
    """Seconds after which a process that does not answer is lost, and all end with
    status 75. Before the first step, one and a half times as many. One that was killed
    is noticed at once."""

    def place(self) -> dict[str, Any]:
        """coordinator, processes and process, for `join`. Raises ConfigError where one
        is given without --distributed, or a limit is not positive."""
        names = ("coordinator", "processes", "process")
        values = {name: getattr(self, name) for name in names}
        if not self.distributed:
            for name, value in values.items():
                if value is not None:
                    raise ConfigError(
                        f"{name}={value!r} is not accepted without --distributed"
                    )
        for name in ("join_timeout", "wait_timeout", "lost_after"):
            value = getattr(self, name)
            require(value > 0, name, value, "greater than 0")
        return values


def emulate(devices: int | None) -> None:
    """Makes JAX emulate `devices` devices on the CPU; None: as many as XLA_FLAGS say.

    Call it before anything asks JAX for devices.
    Raises ConfigError where `devices` is not 1 or more.
    """
    if devices is None:
        _give_threads()
        return
    require(devices >= 1, "devices", devices, "1 or more")
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    _give_threads()
    if "jax" in sys.modules:  # it has read the variable already
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _give_threads() -> None:
    """Gives each device that XLA_FLAGS emulate its threads, unless the user decides."""
    found = re.findall(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(found[-1]) if found else 1
    if devices > 1 and not any(name in os.environ for name in THREAD_VARIABLES):
        os.environ[THREAD_VARIABLES[0]] = str(THREADS * devices)


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    timeout: float = JOIN_TIMEOUT,
    say: roll_call.Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Connects this process to the other processes of its run.

    Call it before anything asks JAX for devices. It waits until all have started, and
    says every few seconds which have not.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many processes the run has.
      process: the number of this process, from 0.
      All three are None where JAX gets them from a TPU pod, Slurm or MPI.
      timeout: seconds to wait for the others.
      say: writes one line.

    Raises ConfigError where only one or two of the three are given, or where they are
    None and there is no such cluster; Missing, one line, that names the processes that
    did not start.
    """
    options = dict(coordinator=coordinator, processes=processes, process=process)
    present = [name for name, value in options.items() if value is not None]
    if present and len(present) < 3:
        missing = " and ".join(name for name in options if name not in present)
        raise ConfigError(f"{present[0]} comes with {missing}: give all three")
    place: Place | None
    if coordinator is not None and processes is not None and process is not None:
        place = Place(coordinator, processes, process)
    else:
        place = _detect(timeout)
    if place is not None:
        roll_call.wait(*place, timeout, say, versions())
    import jax

    # JAX's own handler of SIGTERM would print warnings when the run ends.
    jax.config.update("jax_enable_preemption_service", False)
    at: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if place is not None and place.process:
        at = aborts.handled(roll_call.address(place.coordinator), _lose_coordinator)
    try:
        with at:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=int(timeout),
                heartbeat_timeout_seconds=JAX_LOST_AFTER,
                shutdown_timeout_seconds=JAX_SHUTDOWN,
            )
    except (ValueError, RuntimeError) as error:
        reason = str(error)
        if not present:
            reason = (
                "no cluster tells this process its place: give --coordinator HOST:PORT "
                "--processes N --process I"
            )
            if "KUBERNETES_SERVICE_HOST" in os.environ and not _has_kubernetes():
                reason += ", or pip install 'ladder_jax[k8s]'"
        raise ConfigError(f"--distributed: {reason}") from error


def _lose_coordinator() -> None:
    from ladder_jax.hardware import channel, group

    if (present := group.current()) is not None:
        present.lose_coordinator()
    channel.exit_because("process 0 is lost: its connection was closed", group.RETRY)


def _has_kubernetes() -> bool:
    return importlib.util.find_spec("kubernetes") is not None


class Place(NamedTuple):
    """The place of this process in its run."""

    coordinator: str  # HOST:PORT
    processes: int
    process: int


def _detect(timeout: float) -> Place | None:
    """What a TPU pod, Slurm or MPI says; None if there is none, or JAX cannot say."""
    try:
        from jax._src import clusters

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        found = detect(None, None, None, None, None, int(timeout))
    except Exception:  # JAX's own: `initialize` raises the error that tells why
        return None
    address, processes, process, *_ = found
    if address is None or processes is None or process is None:
        return None
    return Place(address, processes, process)


def versions() -> list[str]:
    """The packages whose versions must be the same in all processes of a run."""
    packages = ("ladder_jax", "jax", "jaxlib")
    return [f"{name} {version(name) or 'not installed'}" for name in packages]


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
