"""What the hardware can do, per device, as its makers publish it."""
import functools
import time

import jax
import jax.numpy as jnp

# Peak dense bfloat16 FLOP/s of what jax calls a device, by the first name here that its `device_kind` contains (in
# lower case). Sources: cloud.google.com/tpu/docs (system architecture pages), NVIDIA data sheets (dense, not sparse).
PEAK_FLOPS = {
    "tpu v4": 275e12, "tpu v5 lite": 197e12, "tpu v5e": 197e12, "tpu v5p": 459e12, "tpu v5": 459e12,
    "tpu v6 lite": 918e12, "tpu v6e": 918e12, "tpu7x": 1153.5e12,       # half a chip: each chiplet is a device
    "a100": 312e12, "a800": 312e12, "h100 pcie": 756e12, "h100 nvl": 835e12, "h100": 989e12, "h800": 989e12,
    "h200": 989e12, "h20": 148e12, "gb200": 2500e12, "b200": 2250e12, "l40s": 362e12, "l4": 121e12, "a10g": 70e12,
}


def peak_flops(device, dtype):
    """Peak FLOP/s of `device` in `dtype` ("bfloat16" or "float32"), or None where it is not known.

    An accelerator's comes from the table (bfloat16: float32 products run slower, as a share of that peak); a CPU's is
    measured, once, and divided among the devices that share the machine.
    """
    if device.platform == "cpu":
        return _measured(dtype) / jax.local_device_count()
    kind = device.device_kind.lower()
    return next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)


@functools.cache
def _measured(dtype, size=1024, repeats=5):
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(times)
