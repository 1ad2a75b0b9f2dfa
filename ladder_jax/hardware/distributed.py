"""The start of a process: with emulated devices, or as one of a run's processes."""

import os

from ladder_jax.config import ConfigError, require


def emulate(devices: int | None) -> None:
    """Makes JAX emulate `devices` devices on the CPU; None changes nothing.

    Call it before JAX starts.
    Raises ConfigError where `devices` is not 1 or more.
    """
    if devices is None:
        return
    require(devices >= 1, "devices", devices, "1 or more")
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects this process to the other processes of its run.

    Call it before anything asks JAX for devices.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many processes the run has.
      process: the number of this process, from 0.
      All three are None where JAX gets them from a TPU pod, Slurm or MPI.

    Raises ConfigError where only one or two of the three are given, or where they are
    None and there is no such cluster.
    """
    options = dict(coordinator=coordinator, processes=processes, process=process)
    present = [name for name, value in options.items() if value is not None]
    if present and len(present) < 3:
        missing = " and ".join(name for name in options if name not in present)
        raise ConfigError(f"{present[0]} comes with {missing}: give all three")
    import jax

    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        reason = str(error)
        if not present:
            reason = (
                "no cluster tells this process its place: give --coordinator HOST:PORT "
                "--processes N --process I"
            )
        raise ConfigError(f"--distributed: {reason}") from error
