"""The memory that this host and its devices have left."""

import contextlib
from pathlib import Path

import jax
from jax.sharding import Mesh

CGROUP = Path("/sys/fs/cgroup")


def size(count: float) -> str:
    """A number of bytes as text: 1.5 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def local_devices(mesh: Mesh) -> list[jax.Device]:
    """The devices of a mesh that belong to this process."""
    own = jax.process_index()
    return [device for device in mesh.devices.flat if device.process_index == own]


def device_memory(mesh: Mesh) -> int | None:
    """The bytes that are free on each of this process's devices; None: unknown.

    Devices of a CPU share the host's memory: each has an equal part of it.
    """
    devices = local_devices(mesh)
    if not devices:
        return None
    if devices[0].platform == "cpu":
        host = host_memory()
        return None if host is None else host // len(devices)
    # JAX has no statistics of another process's devices, so only the own ones count.
    free = []
    for device in devices:
        stats = device.memory_stats() or {}
        if limit := stats.get("bytes_limit"):
            free.append(limit - stats.get("bytes_in_use", 0))
    return min(free, default=None)


def host_memory() -> int | None:
    """The memory that the host can still give, in bytes; None where it does not say.

    In a container, it is at most what the container may still take.
    """
    limits = [limit for limit in (_meminfo(), _cgroup()) if limit is not None]
    return min(limits, default=None)


def _meminfo() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup() -> int | None:
    """What the container's limit leaves; pages that only cache files do not count."""
    files = (
        ("memory.max", "memory.current", "inactive_file"),  # version 2
        (  # version 1
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )
    for limit, usage, cached in files:
        with contextlib.suppress(OSError, ValueError):
            most = int((CGROUP / limit).read_text())  # "max": ValueError, no limit
            used = int((CGROUP / usage).read_text())
            stat = (CGROUP / limit).with_name("memory.stat").read_text().split()
            values = dict(zip(stat[::2], map(int, stat[1::2])))
            return max(most - used + values.get(cached, 0), 0)
    return None
