"""Measures what a benchmark runs on: its name and its rate of matrix products.

Tokens a second cannot be compared between machines; the share of the device's own rate
that a contender reaches can. A process of its own measures the rate in the same run,
with the libraries that the contenders use.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

DTYPES = ("float32", "bfloat16")
Device = Literal["cpu", "gpu"]
# A process that measures a device has these variables. Without preallocation JAX takes
# of a GPU's memory what its arrays need, as PyTorch does.
ENVIRONMENT: dict[Device, dict[str, str]] = {
    "cpu": dict(JAX_PLATFORMS="cpu"),
    "gpu": dict(JAX_PLATFORMS="cuda", XLA_PYTHON_CLIENT_PREALLOCATE="false"),
}
# Rows of the matrices that are multiplied.
SIZE: dict[Device, int] = {"cpu": 1024, "gpu": 8192}


class Machine(NamedTuple):
    """A CPU, or a GPU and the CPU beside it, and its speed."""

    cpu: str
    cores: int  # that the process may use
    gflops: dict[str, float]  # of matrix products, by dtype
    gpu: str = ""  # what has this rate; empty: the CPU

    def share(self, dtype: str, flops_per_second: float) -> float:
        """The share of the device's own rate that `flops_per_second` is."""
        return flops_per_second / (self.gflops[dtype] * 1e9)

    def __str__(self) -> str:
        rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in self.gflops.items())
        name = f"{self.gpu}; {self.cpu}" if self.gpu else self.cpu
        return f"{name}, {self.cores} cores; matrix products, GFLOP/s: {rates}"


def measure(device: Device = "cpu") -> Machine:
    """Measures this machine in a process of its own, which must have JAX."""
    command = [sys.executable, "-m", "ladder_jax.bench.machine", device]
    environment = os.environ | ENVIRONMENT[device]
    process = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return Machine(**json.loads(process.stdout))


def cpu_name() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def matmul_gflops(dtype: str, size: int = 1024, repeats: int = 10) -> float:
    """GFLOP/s of a product of two square matrices: the faster of JAX and PyTorch.

    PyTorch is measured where it is installed.

    Args:
      dtype: of DTYPES.
      size: rows of the matrices.
      repeats: measurements; the fastest counts.
    """
    products = [_jax_product(dtype, size)]
    if importlib.util.find_spec("torch") is not None:
        products.append(_torch_product(dtype, size))
    seconds = min(_fastest(product, repeats) for product in products)
    return 2 * size**3 / seconds / 1e9


def _fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _jax_product(dtype: str, size: int) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(
        lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(dtype)
    )
    return lambda: product(matrix).block_until_ready()


def _torch_product(dtype: str, size: int) -> Callable[[], object]:
    import torch

    on_gpu = os.environ.get("JAX_PLATFORMS") == "cuda"
    device = "cuda" if on_gpu else "cpu"
    matrix = torch.ones((size, size), dtype=getattr(torch, dtype), device=device)

    def product() -> Any:
        result = matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        return result

    return product


def main(device: Device) -> None:
    """Prints this process's machine as JSON; the environment is ENVIRONMENT's."""
    import jax

    print(
        json.dumps(
            dict(
                cpu=cpu_name(),
                cores=len(os.sched_getaffinity(0)),
                gflops={dtype: matmul_gflops(dtype, SIZE[device]) for dtype in DTYPES},
                gpu="" if device == "cpu" else jax.devices()[0].device_kind,
            )
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])  # type: ignore[arg-type]
