"""Makes a command's devices and hosts ready: emulated, joined, or found missing."""

import contextlib
import os
import sys
from typing import Any

from ladder_jax.config import ConfigError
from ladder_jax.hardware import distributed
from ladder_jax.hardware.distributed import Hosts
from ladder_jax.standard_streams import print_safely

# The flag of XLA that --devices sets (hardware/distributed.py).
DEVICE_COUNT = "--xla_force_host_platform_device_count"


def emulate(devices: int | None) -> None:
    """Emulates `devices` devices; None: as many as XLA_FLAGS say. Prints which of the
    user's environment variables it overrides."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    flags = os.environ.get("XLA_FLAGS", "").split()
    distributed.emulate(devices)
    if devices is None:
        return
    if platforms not in ("", "cpu"):
        text = f"--devices {devices} replaces JAX_PLATFORMS={platforms} by cpu"
        print_safely(text, sys.stderr)
    for flag in flags:
        name, _, count = flag.partition("=")
        if name == DEVICE_COUNT and count != str(devices):
            text = f"--devices {devices} replaces {flag} in XLA_FLAGS"
            print_safely(text, sys.stderr)


def join(hosts: Hosts, command: str) -> contextlib.AbstractContextManager[Any]:
    """Joins the other processes of the run where --distributed is given.

    Inside the `with` that it returns, they end together.
    """
    place = hosts.place()
    if not hosts.distributed:
        return contextlib.nullcontext()
    distributed.join(**place, timeout=hosts.join_timeout)
    from ladder_jax.hardware import group

    return group.make(command, hosts.lost_after, hosts.wait_timeout)


def require_devices() -> None:
    """Raises ConfigError where JAX has no device of the kind JAX_PLATFORMS names."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms:
            raise
        reason = f": {' '.join(str(error).split())}" if str(error) else ""
        raise ConfigError(
            f"JAX_PLATFORMS={platforms!r} is not accepted: it must name devices that "
            f"JAX finds on this machine, such as cpu{reason}"
        ) from error
