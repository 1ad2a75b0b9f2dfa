"""Machines that JAX can compile a program for ahead of time, on any other machine.

Names: TPU slices as JAX names them (v5e:2x4, v5p:2x2x2, v5e:16x16), GPUs as
NODESxGPUS of a node (h100:1x8, b200:2x8). A node is the GPUs that NVLink connects: up
to 72 of gb200.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from ladder_jax.config import ConfigError, require
from ladder_jax.hardware import chip_sources, chips, malloc, xla_options
from ladder_jax.hardware.chip_sources import Source
from ladder_jax.hardware.chips import CHIPS, Chip

INSTALL = "python -m pip install 'ladder_jax[plan]'"

# GpuTargetConfigProto. On a machine with a GPU, XLA:GPU gets these numbers from the
# driver.
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


class Gpu(NamedTuple):
    """What GPU_CONFIG needs to know beside the row of CHIPS."""

    name: str
    major: int  # of the compute capability
    memory: int  # bytes that the driver reports
    cache: int  # bytes of the L2 cache
    clock: float  # GHz


# XLA:GPU plans with this share of a GPU's memory, less a program's arguments. Where
# nothing is left, it runs every collective without computation beside it.
PLANNED_MEMORY = 0.8

# From NVIDIA's data sheets, and for H100 from the driver. CUDA names a GB200's GPU so.
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 84929347584, 52428800, 1.98),
    "h200": Gpu("NVIDIA H200", 9, 150754820096, 62914560, 1.98),
    "b200": Gpu("NVIDIA B200", 10, 191514279936, 132644864, 1.965),
    "gb200": Gpu("NVIDIA GB200", 10, 197568495616, 132644864, 2.062),
}


class Target(NamedTuple):
    """A machine to compile for."""

    name: str
    kind: str  # the chip's name in CHIPS
    shape: tuple[int, ...]  # TPU: the slice's sides in chips; GPU: nodes, GPUs a node
    changed: Chip | None = None  # a row in place of that of CHIPS
    changes: tuple[tuple[str, Source], ...] = ()  # where its changed numbers come from

    @property
    def platform(self) -> str:
        """The platform, "tpu" or "cuda", as in `chips.platform`."""
        return "tpu" if self.chip.is_tpu else "cuda"

    @property
    def chip(self) -> Chip:
        return self.changed or CHIPS[self.kind]

    @property
    def sources(self) -> dict[str, Source]:
        """Where the chip's numbers come from, by field of chips.Chip."""
        return chip_sources.sources_of(self.kind, dict(self.changes))

    def change(self, chip: Chip, source: Source) -> "Target":
        """The target with another row, whose changed numbers come from `source`."""
        names = (name for name in Chip._fields)
        old = self.chip
        new = [name for name in names if getattr(chip, name) != getattr(old, name)]
        changes = dict(self.changes) | dict.fromkeys(new, source)
        return self._replace(changed=chip, changes=tuple(changes.items()))

    def options(self, workload: str | None, merging: str = "") -> dict[str, Any]:
        """XLA's options for programs here; see xla_options for the arguments."""
        return xla_options.options_of(self.platform, self.kind, workload, merging)

    @property
    def argument_limit(self) -> float | None:
        """Bytes of arguments on a GPU from which XLA overlaps nothing; TPU: None."""
        if self.platform != "cuda":
            return None
        return PLANNED_MEMORY * GPUS[self.kind].memory

    def devices(self, taken: int = 0) -> list[Any]:
        """Its JAX devices: JAX can compile for them, but not run on them.

        taken: bytes of a GPU that arguments take which a program does not have, such as
          layers that it leaves out.

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
                target_config=_gpu_config(self.kind, self.chip, taken),
                topology="1x" + "x".join(map(str, self.shape)),
            )
        try:
            return topologies.get_topology_desc(**arguments).devices
        except Exception as error:  # each plugin raises its own
            first_line = str(error).splitlines()[0]
            raise ConfigError(
                f"target={self.name!r} is not accepted by its compiler: {first_line}"
            ) from None


def _gpu_config(kind: str, chip: Chip, taken: int) -> str:
    """The GpuTargetConfigProto, as text, of a GPU of whose memory XLA sees so much less
    that its arguments leave as much as if they took `taken` bytes more."""
    gpu = GPUS[kind]
    gpu = gpu._replace(memory=max(gpu.memory - round(taken / PLANNED_MEMORY), 1))
    bandwidth = round(chip.hbm_bandwidth)
    return GPU_CONFIG.format(cores=chip.cores, bandwidth=bandwidth, **gpu._asdict())


def parse(name: str) -> Target:
    """The `Target` of a name. Raises ConfigError, with the accepted names."""
    kind, _, shape = name.partition(":")
    if chips.is_amd(kind):
        raise ConfigError(
            f"target={name!r} is not accepted: XLA compiles for AMD's GPUs only where "
            "ROCm is installed, so that there is no plan of them without one"
        )
    sides = tuple(int(side) for side in shape.split("x") if side.isdigit())
    is_known = kind in CHIPS and len(sides) == CHIPS[kind].target_sides
    is_well_formed = "x".join(map(str, sides)) == shape  # only numbers between the "x"
    require(
        is_known and is_well_formed and math.prod(sides) > 0,
        "target",
        name,
        "a TPU slice (v5e:2x4, v6e:2x4, v5p:2x2x2, tpu7x:2x2x1, v5e:16x16, ...) or "
        "GPUs as NODESxGPUS of h100, h200, b200 or gb200 (h100:1x8, h100:2x8)",
    )
    chip = CHIPS[kind]
    if not chip.is_tpu and sides[1] > chip.domain:
        raise ConfigError(
            f"target={name!r} is not accepted: NVLink connects at most {chip.domain} "
            f"GPUs of a {kind}; for more, name nodes, such as {kind}:2x{chip.domain}"
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
