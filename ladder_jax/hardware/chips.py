"""What each chip can do, as its makers publish it and as measurements of it say: one table.

Nothing here imports JAX at the top: `aot.prepare` must run before JAX starts, and needs the table.
"""

import functools
import time
from typing import NamedTuple


class Chip(NamedTuple):
    """One jax device: on TPU7x half a chip, elsewhere a chip. Bandwidths are of one direction, bytes per second."""

    flops: float  # peak dense bfloat16 FLOP/s
    hbm_bandwidth: float
    hbm_bytes: float  # capacity
    link_bandwidth: float  # of one link to a neighbour (TPU); message over time of a long all-reduce in a node (GPU)
    hop_latency: float  # seconds that a message takes for one hop, however short it is
    launch: float  # seconds that a collective takes beside its hops and its bytes
    clock: float = 0.0  # TPU: Hz, the unit of XLA:TPU's estimated_cycles
    wrap: int = 0  # TPU: length of a torus dimension from which on a slice has links around its ends
    aside: int = 0  # TPU: bytes from which on XLA's own all-reduce runs beside products, and is best there
    in_order: bool = False  # TPU: XLA puts blocks' backward passes out of their order, unless each waits for the last
    far_bandwidth: float = 0.0  # GPU: as link_bandwidth, between nodes
    far_latency: float = 0.0  # GPU: seconds more than in a node
    kernel: float = (
        0.0  # GPU: seconds that a kernel takes beside its bytes and its FLOPs
    )
    reached: float = 1.0  # GPU: share of the HBM bandwidth that kernels reach
    interference: float = 0.0  # GPU: what a second of hidden communication costs the kernels beside it, in seconds


# Sources. FLOP/s, HBM, ICI: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "bidirectional ICI bandwidth per chip" over
# 4 links (v5e, v6e) or 6 (v5p, TPU7x), of which 90% is reached: jax-ml.github.io/scaling-book/tpus, table of links,
# which also has the latency of about a microsecond a hop. Clocks: peak FLOP/s over FLOPs per cycle of the matrix units
# (4 of 128x128 on v5e, 8 on v5p). H100: NVIDIA's data sheet (SXM5, HBM3); its other numbers: see calibrate.py.
CHIPS = {
    "v5e": Chip(
        197e12, 819e9, 16e9, 45e9, 1e-6, 1e-6, clock=1.5e9, wrap=16, aside=1 << 20
    ),
    "v6e": Chip(
        918e12,
        1640e9,
        32e9,
        90e9,
        1e-6,
        1e-6,
        clock=1.75e9,
        wrap=16,
        aside=512 << 10,
        in_order=True,
    ),
    "v5p": Chip(
        459e12, 2765e9, 95e9, 90e9, 1e-6, 1e-6, clock=1.75e9, wrap=4, aside=512 << 10
    ),
    "tpu7x": Chip(
        2307e12 / 2,
        7380e9 / 2,
        96e9,
        90e9,
        1e-6,
        1e-6,
        clock=2.2e9,
        wrap=4,
        aside=512 << 10,
    ),
    "h100": Chip(
        989e12,
        3350e9,
        80e9,
        139e9,
        2.35e-6,
        7.45e-6,
        far_bandwidth=15e9,
        far_latency=21e-6,
        kernel=1e-6,
        reached=0.85,
        interference=0.295,
    ),
}

# Peak dense bfloat16 FLOP/s of what jax calls a device, by the first name here that its `device_kind` contains (in
# lower case). Sources: cloud.google.com/tpu/docs (system architecture pages), NVIDIA data sheets (dense, not sparse).
PEAK_FLOPS = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5p": 459e12,
    "tpu v5": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 1153.5e12,  # half a chip: each chiplet is a device
    "a100": 312e12,
    "a800": 312e12,
    "h100 pcie": 756e12,
    "h100 nvl": 835e12,
    "h100": 989e12,
    "h800": 989e12,
    "h200": 989e12,
    "h20": 148e12,
    "gb200": 2500e12,
    "b200": 2250e12,
    "l40s": 362e12,
    "l4": 121e12,
    "a10g": 70e12,
}


def kind_of(device):
    """The name in CHIPS of a jax device, or None."""
    known = {
        "tpu v5 lite": "v5e",
        "tpu v5e": "v5e",
        "tpu v6": "v6e",
        "tpu v5": "v5p",
        "tpu7x": "tpu7x",
        "h100": "h100",
    }
    return next(
        (kind for name, kind in known.items() if name in device.device_kind.lower()),
        None,
    )


def peak_flops(device, dtype):
    """Peak FLOP/s of `device` in `dtype` ("bfloat16" or "float32"), or None where it is not known.

    An accelerator's comes from the table (bfloat16: float32 products run slower, as a share of that peak); a CPU's is
    measured, once, and divided among the devices that share the machine.
    """
    if device.platform == "cpu":
        import jax

        return _measured(dtype) / jax.local_device_count()
    kind = device.device_kind.lower()
    return next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)


@functools.cache
def _measured(dtype, size=1024, repeats=5):
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
