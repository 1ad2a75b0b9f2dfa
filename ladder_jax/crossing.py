"""Says which axes of a mesh cross hosts: their collectives use the slower network."""

import numpy as np
from jax.sharding import Mesh

from ladder_jax import sharding
from ladder_jax.hardware import chips


def crossing(mesh: Mesh) -> list[str]:
    """The axes along which devices belong to several processes."""
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return [
        name
        for axis, name in enumerate(mesh.axis_names)
        if (owner != owner.take([0], axis)).any()
    ]


def describe(mesh: Mesh) -> str | None:
    """A line about the processes of a mesh, with a warning where the tensor axis
    crosses them; None where there is one process.

    A TPU slice links all its hosts with its own fast network: no warning.
    """
    count = len({device.process_index for device in mesh.devices.flat})
    if count == 1:
        return None
    axes = crossing(mesh)
    line = f"{count} processes; mesh axes across them: {', '.join(axes)}"
    slices = {getattr(device, "slice_index", 0) for device in mesh.devices.flat}
    is_slice = chips.platform(mesh) == "tpu" and len(slices) == 1
    if sharding.TENSOR in axes and not is_slice:
        line += (
            ". Warning: mesh.tensor crosses hosts, and every block waits for their "
            "network: choose mesh.tensor of one host's devices at most"
        )
    return line
