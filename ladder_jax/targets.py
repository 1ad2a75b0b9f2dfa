"""Machines that a program can be compiled for without having them: what they are made of, how XLA is told to build.

Names: TPU slices as jax names them (v5e:2x4, v5p:2x2x2, v5e:16x16), GPUs as h100:NODESxGPUS (h100:1x8).
"""
import contextlib
import math
import os
import sys
from typing import NamedTuple

from ladder_jax import host
from ladder_jax.config import ConfigError

INSTALL = "python -m pip install 'ladder_jax[plan]'"


class Chip(NamedTuple):
    """One jax device: on TPU7x half a chip, elsewhere a chip. Bandwidths are of one direction, bytes per second."""
    flops: float             # peak dense bfloat16 FLOP/s
    hbm_bandwidth: float
    hbm_bytes: float         # capacity
    link_bandwidth: float    # of one link to a neighbour (TPU); message over time of a long all-reduce in a node (GPU)
    hop_latency: float       # seconds that a message takes for one hop, however short it is
    launch: float            # seconds that a collective takes beside its hops and its bytes
    clock: float = 0.0       # TPU: Hz, the unit of XLA:TPU's estimated_cycles
    wrap: int = 0            # TPU: length of a torus dimension from which on a slice has links around its ends
    aside: int = 0           # TPU: bytes from which on XLA's own all-reduce runs beside products, and is best there
    in_order: bool = False   # TPU: XLA puts blocks' backward passes out of their order, unless each waits for the last
    far_bandwidth: float = 0.0     # GPU: as link_bandwidth, between nodes
    far_latency: float = 0.0       # GPU: seconds more than in a node
    kernel: float = 0.0            # GPU: seconds that a kernel takes beside its bytes and its FLOPs
    reached: float = 1.0           # GPU: share of the HBM bandwidth that kernels reach
    interference: float = 0.0      # GPU: what a second of hidden communication costs the kernels beside it, in seconds


# Sources. FLOP/s, HBM, ICI: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "bidirectional ICI bandwidth per chip" over
# 4 links (v5e, v6e) or 6 (v5p, TPU7x), of which 90% is reached: jax-ml.github.io/scaling-book/tpus, table of links,
# which also has the latency of about a microsecond a hop. Clocks: peak FLOP/s over FLOPs per cycle of the matrix units
# (4 of 128x128 on v5e, 8 on v5p). H100: NVIDIA's data sheet (SXM5, HBM3); its other numbers: see calibrate.py.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 16e9, 45e9, 1e-6, 1e-6, clock=1.5e9, wrap=16, aside=1 << 20),
    "v6e": Chip(918e12, 1640e9, 32e9, 90e9, 1e-6, 1e-6, clock=1.75e9, wrap=16, aside=512 << 10, in_order=True),
    "v5p": Chip(459e12, 2765e9, 95e9, 90e9, 1e-6, 1e-6, clock=1.75e9, wrap=4, aside=512 << 10),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 96e9, 90e9, 1e-6, 1e-6, clock=2.2e9, wrap=4, aside=512 << 10),
    "h100": Chip(989e12, 3350e9, 80e9, 139e9, 2.35e-6, 7.45e-6, far_bandwidth=15e9, far_latency=21e-6, kernel=1e-6,
                 reached=0.85, interference=0.295),
}

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

# Options of XLA by platform and by kind of device, for every program of the model or for one workload's.
OPTIONS = {
    "cpu": {
        # Drops optimization barriers, and with them what they are for: values that are computed once and not again in
        # every loop that reads them, recomputation that is not merged with what it is to repeat.
        "xla_disable_hlo_passes": "cse_barrier_expander",
    },
    "tpu": {
        # XLA merges reductions that are ready together. Those of attention and MLP then wait for the later of the two,
        # with nothing left to run behind them.
        "xla_jf_crs_combiner_threshold_in_bytes": "0",
        # XLA moves the cross-entropy's gather to v5p's SparseCores, and the program that it then hands out cannot be
        # read back ("async-update instruction should have 1 operands but sees 3").
        "xla_tpu_offload_gather_to_sparsecore": "false",
        # SparseCores (v5p, v6e, TPU7x) make all-reduces of 64 KiB and more, which are asynchronous then. XLA takes them
        # for far shorter than they are, and starts them too late. Where it loads their programs ahead of time, the
        # whole cannot be read back, as above.
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
        "xla_tpu_sparse_core_all_reduce_latency_multiplier": "20",
        "xla_tpu_sparse_core_maximum_preloaded_async_calls": "0",
    },
    "v5e": {
        # It has no SparseCores, but XLA can fuse parts of an all-reduce into the products that it is to run behind. It
        # does so for long messages, if asked to, and refuses to for other TPUs.
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    },
    "v5e decode": {
        # Without it two layers that are written out one after another, not in a scan, may compile for ever.
        "xla_tpu_async_collective_fusion_with_start_done_only": "true",
    },
    "v5e prefill": {
        "xla_tpu_async_collective_fusion_with_start_done_only": "true",     # as for decode
        # Products count for half, so that long all-reduces are fused into two of them: one is too short.
        "xla_lhs_output_fusion_latency_multiplier": "0.5",
    },
    "gpu": {
        "xla_gpu_all_reduce_combine_threshold_bytes": 0,          # as on TPU
        "xla_gpu_all_gather_combine_threshold_bytes": 0,          # the same for one-shot
        "xla_gpu_collective_permute_combine_threshold_bytes": 0,  # and for reductions made of exchanges
        # Moves a reduction's wait down to the first reader of its result; without it the wait follows the start.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # XLA's default estimate of a reduction's time is far below NCCL's, so that it starts late, behind one product.
        # Without this estimate the scheduler takes it for as long as several products, and it starts with its block.
        "xla_gpu_enable_analytical_sol_latency_estimator": False,
        # XLA merges matrix products that read the same array by concatenating their weights, and where it cannot fuse
        # that (parallel at batch 16: 138 MB a layer) it copies them in every step. Costs ladder 1% where it could.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
}


class Target(NamedTuple):
    """A machine by name."""
    name: str
    kind: str                      # of CHIPS
    shape: tuple[int, ...]         # of the slice, in chips; GPUs: nodes, GPUs a node

    @property
    def platform(self):
        return "gpu" if self.kind == "h100" else "tpu"

    @property
    def chip(self):
        return CHIPS[self.kind]

    def options(self, workload):
        return _options(self.platform, self.kind, workload)

    def devices(self):
        """Its jax devices: they can be compiled for, not run on. Raises ConfigError without the [plan] extra."""
        _ready(self.platform)
        from jax.experimental import topologies
        arguments = dict(platform="tpu", topology_name=self.name)
        if self.platform == "gpu":
            arguments = dict(platform="cuda", topology_name=self.kind, target_config=H100,
                             topology="1x" + "x".join(map(str, self.shape)))
        try:
            return topologies.get_topology_desc(**arguments).devices
        except Exception as error:      # each plugin raises its own
            raise ConfigError(f"target={self.name!r} is not accepted by its compiler: "
                              f"{str(error).splitlines()[0]}") from None


def kind_of(device):
    """The name in CHIPS of a jax device, or None."""
    known = {"tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v6": "v6e", "tpu v5": "v5p", "tpu7x": "tpu7x", "h100": "h100"}
    return next((kind for name, kind in known.items() if name in device.device_kind.lower()), None)


def options(mesh, workload=None):
    """The options of XLA for programs on a mesh: `jax.jit`'s compiler_options. `workload`: "decode" or "prefill" of the
    engine, whose layers are a list; None for any other."""
    device = mesh.devices.flat[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return _options(platform, kind_of(device), workload)


def _options(platform, kind, workload):
    return OPTIONS.get(platform, {}) | OPTIONS.get(kind, {}) | OPTIONS.get(f"{kind} {workload}", {})


def parse(name):
    """The `Target` of a name."""
    kind, _, shape = name.partition(":")
    sides = tuple(int(side) for side in shape.split("x") if side.isdigit())
    wanted = {"v5e": 2, "v6e": 2, "h100": 2}.get(kind, 3)
    if kind not in CHIPS or len(sides) != wanted or "x".join(map(str, sides)) != shape or not math.prod(sides):
        raise ConfigError(f"target={name!r} is not accepted: it must be a TPU slice (v5e:2x4, v6e:2x4, v5p:2x2x2, "
                          "tpu7x:2x2x1, v5e:16x16, ...) or GPUs as h100:NODESxGPUS (h100:1x8)")
    return Target(name, kind, sides)


def _ready(platform):
    """Raises ConfigError where the compiler for `platform` is not installed; keeps it from looking for its chips."""
    module = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda12"}[platform]
    if not host.installed(module):
        raise ConfigError(f"planning for this target takes XLA's {platform.upper()} compiler: {INSTALL} installs it")


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
