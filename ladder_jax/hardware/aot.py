"""Machines that a program can be compiled for ahead of time, without having them.

Names: TPU slices as jax names them (v5e:2x4, v5p:2x2x2, v5e:16x16), GPUs as h100:NODESxGPUS (h100:1x8).
"""

import contextlib
import math
import os
import sys
from typing import NamedTuple

from ladder_jax.config import ConfigError
from ladder_jax.hardware import malloc, xla_options
from ladder_jax.hardware.chips import CHIPS

INSTALL = "python -m pip install 'ladder_jax[plan]'"

# GpuTargetConfigProto of an H100 80GB SXM5: what XLA:GPU asks the driver where there is one.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A machine by name."""

    name: str
    kind: str  # of CHIPS
    shape: tuple[int, ...]  # of the slice, in chips; GPUs: nodes, GPUs a node

    @property
    def platform(self):
        return "gpu" if self.kind == "h100" else "tpu"

    @property
    def chip(self):
        return CHIPS[self.kind]

    def options(self, workload):
        return xla_options.options_of(self.platform, self.kind, workload)

    def devices(self):
        """Its jax devices: they can be compiled for, not run on. Raises ConfigError without the [plan] extra."""
        _ready(self.platform)
        from jax.experimental import topologies

        arguments = dict(platform="tpu", topology_name=self.name)
        if self.platform == "gpu":
            arguments = dict(
                platform="cuda",
                topology_name=self.kind,
                target_config=H100,
                topology="1x" + "x".join(map(str, self.shape)),
            )
        try:
            return topologies.get_topology_desc(**arguments).devices
        except Exception as error:  # each plugin raises its own
            raise ConfigError(
                f"target={self.name!r} is not accepted by its compiler: "
                f"{str(error).splitlines()[0]}"
            ) from None


def parse(name):
    """The `Target` of a name."""
    kind, _, shape = name.partition(":")
    sides = tuple(int(side) for side in shape.split("x") if side.isdigit())
    wanted = {"v5e": 2, "v6e": 2, "h100": 2}.get(kind, 3)
    if (
        kind not in CHIPS
        or len(sides) != wanted
        or "x".join(map(str, sides)) != shape
        or not math.prod(sides)
    ):
        raise ConfigError(
            f"target={name!r} is not accepted: it must be a TPU slice (v5e:2x4, v6e:2x4, v5p:2x2x2, "
            "tpu7x:2x2x1, v5e:16x16, ...) or GPUs as h100:NODESxGPUS (h100:1x8)"
        )
    return Target(name, kind, sides)


def _ready(platform):
    """Raises ConfigError where the compiler for `platform` is not installed; keeps it from looking for its chips."""
    module = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda12"}[platform]
    if not malloc.installed(module):
        raise ConfigError(
            f"planning for this target takes XLA's {platform.upper()} compiler: {INSTALL} installs it"
        )


def prepare():
    """Before JAX starts: run on the CPU, and let libtpu load on a machine without TPUs, without asking for them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@contextlib.contextmanager
def silence():
    """Drops what the compilers log: warnings, from C++, of the chips that they do not find."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
