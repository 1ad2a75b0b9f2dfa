"""A table of chips, and the platform and chip of a JAX device.

To add a chip, add a row to CHIPS. This file imports JAX only inside functions:
`aot.prepare` must run before JAX starts, and needs the table.
"""

import functools
import time
from typing import Any, NamedTuple

GPUS = ("cuda", "rocm")  # what `platform` calls GPUs
# An AMD GPU has one of these words in its `device_kind`, such as "AMD Instinct MI300X".
AMD_WORDS = ("amd", "radeon", "instinct", "gfx")


class Chip(NamedTuple):
    """The properties of one JAX device: half a chip on TPU7x, a chip elsewhere.

    The cost model (cost.py) needs the fields from `hbm_bandwidth` on. Where only the
    peak is known, these are 0 and `modelled` is False. Bandwidths are of one direction.
    """

    # The device is this chip if one of these, in lower case, is in its `device_kind`.
    device_kinds: tuple[str, ...]
    peak_flops: float  # FLOP/s, dense bfloat16
    hbm_bandwidth: float = 0.0  # bytes/s
    hbm_bytes: float = 0.0  # capacity
    # bytes/s. TPU: of one link to a neighbour. GPU: the bytes of a long all-reduce
    # within a node, divided by its seconds.
    link_bandwidth: float = 0.0
    hop_latency_s: float = 0.0  # a message's latency for each hop
    collective_launch_s: float = 0.0  # a collective's latency without any hop
    # How many numbers a machine's name has: v5e:2x4 has 2, v5p:2x2x2 has 3, GPUs have 2
    # (nodes, GPUs a node). 0: the planner has no compiler for the chip.
    target_sides: int = 0

    # TPU alone
    clock_hz: float = 0.0  # the unit of XLA:TPU's estimated_cycles
    # From this length on, in chips, a slice's side is a ring: its ends are linked.
    torus_min_side: int = 0
    # From this size on, XLA runs its own all-reduce asynchronously, which is fastest.
    async_all_reduce_min_bytes: int = 0
    # bytes/s of a chip to other slices: a host's share of the data centre's network.
    slice_bandwidth: float = 0.0
    # Whether the program must force the order of the blocks' backward passes, because
    # XLA would change it.
    in_order: bool = False
    # Whether a decode step of one row is shorter if it computes the row twice: XLA
    # multiplies two rows on the matrix units, and one on the vector units.
    doubles_row: bool = False
    # Of exchanges of at most so many rows the last round is tied to a product, because
    # XLA would end it right after its start (residual/overlap.py).
    tied_rows: int = 0

    # GPU alone. A "node" is the GPUs that NVLink connects.
    internode_bandwidth: float = 0.0  # bytes/s, as link_bandwidth, between nodes
    internode_latency_s: float = 0.0  # added to the latency within a node
    # NCCL has other protocols for long messages: (latency in seconds, bytes/s), or ().
    long_all_reduce: tuple[float, ...] = ()
    long_gather: tuple[float, ...] = ()  # all-gathers and reduce-scatters
    long_internode: tuple[float, ...] = ()  # all-reduces between nodes
    nic_bandwidth: float = 0.0  # bytes/s of each GPU's own link to other nodes
    symmetric_bandwidth: float = 0.0  # of all-reduce kernels over symmetric memory
    # Measured all-reduces within a node, (bytes, seconds), in place of the above.
    all_reduce_points: tuple[tuple[float, float], ...] = ()
    cores: int = 0  # streaming multiprocessors
    domain: int = 0  # the most GPUs that NVLink connects
    kernel_launch_s: float = 0.0  # added to a kernel's time for its bytes or its FLOPs
    hbm_efficiency: float = 1.0  # share of hbm_bandwidth that kernels reach
    product_efficiency: float = 1.0  # share of peak_flops that long products reach
    # Seconds that one second of hidden communication adds to the kernels beside it:
    # those that HBM bounds, and those that products bound.
    interference: float = 0.0
    product_interference: float = 0.0

    @property
    def modelled(self) -> bool:
        """Whether cost.py knows this chip."""
        return self.hbm_bandwidth > 0

    @property
    def is_tpu(self) -> bool:
        """Whether the chip is a TPU, not a GPU; meaningful only for a modelled chip."""
        return self.torus_min_side > 0


# Sources. TPU FLOP/s, HBM, ICI: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x};
# "bidirectional ICI bandwidth per chip" over 4 links (v5e, v6e) or 6 (v5p, TPU7x), of
# which 90% is reached: jax-ml.github.io/scaling-book/tpus, table of links, which also
# gives about a microsecond a hop. Clocks: peak FLOP/s over FLOPs per cycle of the
# matrix units (4 of 128x128 on v5e, 8 on v5p). async_all_reduce_min_bytes: steps in
# docs/log.md. GPU FLOP/s and HBM: NVIDIA's data sheets (dense, not sparse; H100: SXM5,
# HBM3). The other numbers of H100: planner/calibrate.py, from published measurements.
V5E = Chip(
    device_kinds=("tpu v5 lite", "tpu v5e"),
    peak_flops=197e12,
    hbm_bandwidth=819e9,
    hbm_bytes=16e9,
    link_bandwidth=45e9,
    hop_latency_s=1e-6,
    collective_launch_s=1e-6,
    target_sides=2,
    clock_hz=1.5e9,
    torus_min_side=16,
    async_all_reduce_min_bytes=512 << 10,
    slice_bandwidth=25e9 / 8,
)
V6E = Chip(
    device_kinds=("tpu v6",),
    peak_flops=918e12,
    hbm_bandwidth=1640e9,
    hbm_bytes=32e9,
    link_bandwidth=90e9,
    hop_latency_s=1e-6,
    collective_launch_s=1e-6,
    target_sides=2,
    clock_hz=1.75e9,
    torus_min_side=16,
    async_all_reduce_min_bytes=512 << 10,
    in_order=True,
    doubles_row=True,
    slice_bandwidth=25e9 / 8,
)
V5P = Chip(
    device_kinds=("tpu v5",),
    peak_flops=459e12,
    hbm_bandwidth=2765e9,
    hbm_bytes=95e9,
    link_bandwidth=90e9,
    hop_latency_s=1e-6,
    collective_launch_s=1e-6,
    target_sides=3,
    clock_hz=1.75e9,
    torus_min_side=4,
    async_all_reduce_min_bytes=512 << 10,
    doubles_row=True,
    tied_rows=8,
    slice_bandwidth=25e9 / 4,
)
TPU7X = Chip(  # JAX has a device for each of a chip's two halves
    device_kinds=("tpu7x",),
    peak_flops=2307e12 / 2,
    hbm_bandwidth=7380e9 / 2,
    hbm_bytes=96e9,
    link_bandwidth=90e9,
    hop_latency_s=1e-6,
    collective_launch_s=1e-6,
    target_sides=3,
    clock_hz=2.2e9,
    torus_min_side=4,
    async_all_reduce_min_bytes=512 << 10,
)
H100 = Chip(
    device_kinds=("h100",),
    peak_flops=989e12,
    hbm_bandwidth=3350e9,
    hbm_bytes=80e9,
    link_bandwidth=139e9,
    hop_latency_s=2.35e-6,
    collective_launch_s=7.45e-6,
    target_sides=2,
    internode_bandwidth=15e9,
    internode_latency_s=21e-6,
    long_all_reduce=(81e-6, 279e9),
    long_gather=(30e-6, 378e9),
    long_internode=(102e-6, 209e9),
    nic_bandwidth=50e9,
    symmetric_bandwidth=214e9,
    cores=132,
    domain=8,
    kernel_launch_s=2.3e-6,
    hbm_efficiency=0.85,
    product_efficiency=0.73,
    interference=0.225,
    product_interference=0.34,
)
H200 = H100._replace(device_kinds=("h200",), hbm_bandwidth=4800e9, hbm_bytes=141e9)
B200 = H100._replace(
    device_kinds=("b200",),
    peak_flops=2250e12,
    hbm_bandwidth=8000e9,
    hbm_bytes=180e9,
    link_bandwidth=166e9,
    long_all_reduce=(39e-6, 435e9),
    long_gather=(30e-6, 756e9),
    symmetric_bandwidth=428e9,
    cores=148,
    hbm_efficiency=0.80,
    product_efficiency=0.77,
)
GB200 = B200._replace(
    device_kinds=("gb200",),
    peak_flops=2500e12,
    hbm_bytes=186e9,
    domain=72,
    cores=152,
    hbm_efficiency=0.92,
)

# The first row that matches a device's `device_kind` is its chip: so the longer of two
# names comes first ("h200" before "h20").
CHIPS = {
    "v4": Chip(("tpu v4",), 275e12),
    "v5e": V5E,
    "v5p": V5P,
    "v6e": V6E,
    "tpu7x": TPU7X,
    "a100": Chip(("a100", "a800"), 312e12),
    # Slower cards, with the SXM5 card's costs. The planner cannot compile for them.
    "h100-pcie": H100._replace(
        device_kinds=("h100 pcie",), peak_flops=756e12, target_sides=0
    ),
    "h100-nvl": H100._replace(
        device_kinds=("h100 nvl",), peak_flops=835e12, target_sides=0
    ),
    "h100": H100,
    "h800": Chip(("h800",), 989e12),
    "h200": H200,
    "h20": Chip(("h20",), 148e12),
    "gb200": GB200,
    "b200": B200,
    "mi300x": Chip(("mi300x",), 1307e12),
    "l40s": Chip(("l40s",), 362e12),
    "l4": Chip(("l4",), 121e12),
    "a10g": Chip(("a10g",), 70e12),
}


def platform(where: Any) -> str:
    """The platform of a JAX device, or of a mesh's devices: cpu, tpu, cuda or rocm.

    JAX calls both kinds of GPU "gpu". The client's version tells which it is (JAX's own
    tests use it too). A device to compile for has no client: its kind tells.
    """
    device = where.devices.flat[0] if hasattr(where, "devices") else where
    if device.platform != "gpu":
        return device.platform
    version = getattr(getattr(device, "client", None), "platform_version", "").lower()
    kind = getattr(device, "device_kind", "").lower()
    is_amd = "rocm" in version or any(word in kind for word in AMD_WORDS)
    return "rocm" if is_amd else "cuda"


def doubles_row(mesh: Any) -> bool:
    """Whether decode programs on a mesh compute a lone row twice; see `Chip`."""
    kind = kind_of(mesh.devices.flat[0])
    return kind is not None and CHIPS[kind].doubles_row


def is_amd(kind: str) -> bool:
    """Whether a name of the table is that of an AMD GPU."""
    return kind.startswith("mi") and kind in CHIPS


def kind_of(device: Any) -> str | None:
    """The name in CHIPS of a JAX device, or None where it has no row."""
    kind = device.device_kind.lower()
    for name, chip in CHIPS.items():
        if any(part in kind for part in chip.device_kinds):
            return name
    return None


def peak_flops(device: Any, dtype: str) -> float | None:
    """Peak FLOP/s of `device` in `dtype`, or None where it is not known.

    An accelerator's peak is that of CHIPS, in bfloat16 for any `dtype`: a program in
    float32 thus shows a lower share of the peak. A CPU's peak is measured once, and
    divided by the number of JAX devices on the machine.

    Args:
      device: a jax.Device.
      dtype: "bfloat16" or "float32".
    """
    if device.platform == "cpu":
        import jax

        return _measure_flops(dtype) / jax.local_device_count()
    kind = kind_of(device)
    return None if kind is None else CHIPS[kind].peak_flops


@functools.cache
def _measure_flops(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a product of square matrices on this machine, best of `repeats`."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
