"""What a conversion needs, and what there is: memory of the devices, disk."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ladder_jax import model as models
from ladder_jax import sharding
from ladder_jax.config import ConfigError, Model
from ladder_jax.convert import folder
from ladder_jax.hardware.memory import device_memory, host_memory, local_devices, size

BYTES = {"float32": 4, "bfloat16": 2}


class Needs(NamedTuple):
    """Bytes that a conversion takes."""

    parameters: int  # their number
    disk: int
    device: int  # on each device: its share of what is there at a time, one tensor
    devices: int
    dtype: str
    # Of the host's memory, where the devices have their own: what Orbax holds while it
    # saves. On a CPU it is part of `device`.
    host: int = 0

    def text(self) -> str:
        """A line about it."""
        each = "" if self.devices == 1 else f" on each of {self.devices} devices"
        host = f", and {size(self.host)} of the host's" if self.host else ""
        return (
            f"{self.parameters:,} parameters in {self.dtype}: needs "
            f"{size(self.disk)} of disk and {size(self.device)} of memory{each}{host}"
        )

    def check(self, there: "Available") -> None:
        """Raises ConfigError where disk or memory do not suffice."""
        smaller = "" if self.dtype == "bfloat16" else " or --dtype bfloat16"
        if there.disk is not None and self.disk > there.disk:
            raise ConfigError(
                f"out needs {size(self.disk)} of disk, and {size(there.disk)} are "
                f"free there: choose another folder{smaller}"
            )
        if there.memory is not None and self.device > there.memory:
            raise ConfigError(
                f"the model needs {size(self.device)} of memory on each of "
                f"{self.devices} devices, and {size(there.memory)} are free: choose "
                f"more devices with --tensor or --fsdp{smaller}"
            )
        if there.host is not None and self.host > there.host:
            raise ConfigError(
                f"saving the model needs {size(self.host)} of the host's memory, and "
                f"{size(there.host)} are free: choose more hosts{smaller}"
            )


class Available(NamedTuple):
    """Bytes that are free; None where that is not known."""

    disk: int | None
    memory: int | None  # of each device
    host: int | None = None  # of this host, where the devices have memory of their own


def needs_of(
    model: Model, dtype: str, mesh: Mesh, groups: Sequence[Sequence[str]] = ()
) -> Needs:
    """What a model in `dtype` on a mesh takes.

    groups: the parameters that are read and saved together, and then dropped, as in an
      import. While Orbax writes them, the host holds copies. (): the model stays.
    """
    shapes = models.abstract(model)
    names = jax.tree.leaves(sharding.parameter_names(shapes))
    total, largest = 0, 0
    shards: dict[str, int] = {}  # elements of a device's share of a parameter
    for name, leaf in zip(names, jax.tree.leaves(shapes)):
        axes = sharding.PARAMETERS[name].axes
        count = math.prod(leaf.shape)
        shards[name] = count // math.prod(mesh.shape[x] for x in axes.values() if x)
        total += count
        layers = leaf.shape[0] if leaf.ndim > len(axes) else 1
        largest = max(largest, shards[name] // layers)
    width = BYTES[dtype]
    held = max(
        (sum(shards[name] for name in group) for group in groups),
        default=sum(shards.values()),
    )
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    # A copy, and as much that malloc keeps of the one before (measured on a CPU).
    copy = 2 * held if groups else 0
    device = width * (held + max(largest, copy if is_cpu else 0))
    host = 0 if is_cpu else width * copy * len(local_devices(mesh))
    return Needs(total, width * total, device, mesh.size, dtype, host)


def export_needs(model: Model, dtype: str, memory: int) -> Needs:
    """What an export in `dtype` takes, which holds `memory` bytes at a time."""
    shapes = jax.tree.leaves(models.abstract(model))
    total = sum(math.prod(leaf.shape) for leaf in shapes)
    return Needs(total, BYTES[dtype] * total, memory, 1, dtype)


def available(out: Path, mesh: Mesh) -> Available:
    """The free disk where `out` will be, and a device's free memory."""
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return Available(
        folder.free_disk(out), device_memory(mesh), None if is_cpu else host_memory()
    )
