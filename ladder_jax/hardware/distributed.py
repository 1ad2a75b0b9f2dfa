"""How a process starts: on emulated devices, or as one of several."""

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
    """Joins this process to the others of one run.

    Call it before anything asks JAX for devices.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many processes the run has.
      process: the number of this process, from 0.
      All three are None where a TPU pod, Slurm or MPI tells each process its place.

    Raises ConfigError where only some of the three are given, or where no cluster
    tells them.
    """
    given = dict(coordinator=coordinator, processes=processes, process=process)
    named = [name for name, value in given.items() if value is not None]
    if named and len(named) < 3:
        missing = " and ".join(name for name in given if name not in named)
        raise ConfigError(f"{named[0]} comes with {missing}: give all three")
    import jax

    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        why = str(error)
        if not named:
            why = (
                "no cluster tells this process its place: give --coordinator HOST:PORT "
                "--processes N --process I"
            )
        raise ConfigError(f"--distributed: {why}") from error
