"""Machines that JAX can compile a program for ahead of time, on any other machine.

Names: TPU slices as JAX names them (v5e:2x4, v5p:2x2x2, v5e:16x16), GPUs as
h100:NODESxGPUS (h100:1x8).
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from ladder_jax.config import ConfigError, require
from ladder_jax.hardware import malloc, xla_options
from ladder_jax.hardware.chips import CHIPS, Chip

INSTALL = "python -m pip install 'ladder_jax[plan]'"

# GpuTargetConfigProto of an H100 80GB SXM5. On a machine with a GPU, XLA:GPU gets these
# numbers from the driver.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A machine to compile for."""

    name: str
    kind: str  # the chip's name in CHIPS
    shape: tuple[int, ...]  # TPU: the slice's sides in chips; GPU: nodes, GPUs a node

    @property
    def platform(self) -> str:
        """The platform, "tpu" or "cuda", as in `chips.platform`."""
        return "tpu" if self.chip.is_tpu else "cuda"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    def options(self, workload: str | None, merging: str = "") -> dict[str, Any]:
        """XLA's options for programs here; see xla_options for the arguments."""
        return xla_options.options_of(self.platform, self.kind, workload, merging)

    def devices(self) -> list[Any]:
        """Its JAX devices: JAX can compile for them, but not run on them.

        Raises ConfigError where the compiler is not installed (the [plan] extra) or
        does not know the machine.
        """
        _require_compiler(self.platform)
        from jax.experimental import topologies

        arguments = dict(platform="tpu", topology_name=self.name)
        if self.platform == "cuda":
            arguments = dict(
                platform="cuda",
                topology_name=self.kind,
                target_config=H100,
                topology="1x" + "x".join(map(str, self.shape)),
            )
        try:
            return topologies.get_topology_desc(**arguments).devices
        except Exception as error:  # each plugin raises its own
            first_line = str(error).splitlines()[0]
            raise ConfigError(
                f"target={self.name!r} is not accepted by its compiler: {first_line}"
            ) from None


def parse(name: str) -> Target:
    """The `Target` of a name. Raises ConfigError, with the accepted names."""
    kind, _, shape = name.partition(":")
    sides = tuple(int(side) for side in shape.split("x") if side.isdigit())
    is_known = kind in CHIPS and len(sides) == CHIPS[kind].target_sides
    is_well_formed = "x".join(map(str, sides)) == shape  # only numbers between the "x"
    require(
        is_known and is_well_formed and math.prod(sides) > 0,
        "target",
        name,
        "a TPU slice (v5e:2x4, v6e:2x4, v5p:2x2x2, tpu7x:2x2x1, v5e:16x16, ...) or "
        "GPUs as h100:NODESxGPUS (h100:1x8)",
    )
    return Target(name, kind, sides)


def _require_compiler(platform: str) -> None:
    """Raises ConfigError where XLA's compiler for `platform` is not installed."""
    module = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}[platform]
    if not malloc.installed(module):
        compiler = {"tpu": "TPU", "cuda": "GPU"}[platform]
        raise ConfigError(
            f"planning for this target takes XLA's {compiler} compiler: "
            f"{INSTALL} installs it"
        )


def prepare() -> None:
    """Makes JAX run on the CPU and lets libtpu load without TPUs.

    Call it before JAX starts. It does not change variables that the user has set.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discards everything written to standard error, by C++ too.

    The compilers print warnings about chips that this machine does not have.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
