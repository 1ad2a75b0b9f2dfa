"""Measures the CPU that a benchmark runs on: its name and its rate of matrix products.

Tokens a second cannot be compared between machines; the share of the CPU's own rate
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
from typing import NamedTuple

DTYPES = ("float32", "bfloat16")


class Machine(NamedTuple):
    """A CPU and its speed."""

    cpu: str
    cores: int  # that the process may use
    gflops: dict[str, float]  # of matrix products, by dtype

    def share(self, dtype: str, flops_per_second: float) -> float:
        """The share of the CPU's own rate that `flops_per_second` is."""
        return flops_per_second / (self.gflops[dtype] * 1e9)

    def __str__(self) -> str:
        rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in self.gflops.items())
        return f"{self.cpu}, {self.cores} cores; matrix products, GFLOP/s: {rates}"


def measure() -> Machine:
    """Measures this machine in a process of its own, which must have JAX."""
    command = [sys.executable, "-m", "ladder_jax.bench.machine"]
    environment = os.environ | dict(JAX_PLATFORMS="cpu")
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

    matrix = torch.ones((size, size), dtype=getattr(torch, dtype))
    return lambda: matrix @ matrix


if __name__ == "__main__":
    print(
        json.dumps(
            dict(
                cpu=cpu_name(),
                cores=len(os.sched_getaffinity(0)),
                gflops={dtype: matmul_gflops(dtype) for dtype in DTYPES},
            )
        )
    )
