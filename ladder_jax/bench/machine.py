"""Measures the CPU that a benchmark runs on: its name and its rate of matrix products.

Tokens a second cannot be compared between machines; the share of the CPU's own rate
that a contender reaches can. A process of its own measures the rate in the same run,
with the libraries that the contenders use: JAX, and PyTorch where it is installed.
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
# Of the processor flags in /proc/cpuinfo, those that decide the rate of products.
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


class Machine(NamedTuple):
    """A CPU and its speed."""

    cpu: str
    cores: int  # that the process may use
    # GFLOP/s of matrix products: {library: {dtype: rate}}
    gflops: dict[str, dict[str, float]]

    def rate(self, dtype: str, library: str | None = None) -> float:
        """GFLOP/s of products in `dtype` by `library`; None: by the fastest library."""
        if library is not None:
            return self.gflops[library][dtype]
        return max(rates[dtype] for rates in self.gflops.values())

    def share(
        self, dtype: str, flops_per_second: float, library: str | None = None
    ) -> float:
        """The share of `rate` that `flops_per_second` is."""
        return flops_per_second / (self.rate(dtype, library) * 1e9)

    def __str__(self) -> str:
        rates = "; ".join(
            f"{library} "
            + ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in by_dtype.items())
            for library, by_dtype in self.gflops.items()
        )
        return f"{self.cpu}, {self.cores} cores; matrix products, GFLOP/s: {rates}"


def measure() -> Machine:
    """Measures this machine in a process of its own, which must have JAX."""
    command = [sys.executable, "-m", "ladder_jax.bench.machine"]
    environment = os.environ | dict(JAX_PLATFORMS="cpu")
    process = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return Machine(**json.loads(process.stdout))


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name; its family, model and vector units where Linux tells them.

    Virtual machines hide the model's full name.
    """
    if not info.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    details = [
        f"{field} {fields[field]}"
        for field in ("cpu family", "model")
        if field in fields
    ]
    flags = fields.get("flags", fields.get("Features", "")).split()
    details += [unit for unit in UNITS if unit in flags]
    return f"{name} ({', '.join(details)})" if details else name


def libraries() -> tuple[str, ...]:
    """The libraries whose products are measured: those that are installed."""
    has_torch = importlib.util.find_spec("torch") is not None
    return ("jax", "torch") if has_torch else ("jax",)


def matmul_gflops(
    dtype: str, library: str = "jax", size: int = 1024, repeats: int = 10
) -> float:
    """GFLOP/s of a product of two square matrices.

    Args:
      dtype: of DTYPES.
      library: jax or torch.
      size: rows of the matrices.
      repeats: measurements; the fastest counts.
    """
    make = dict(jax=_jax_product, torch=_torch_product)[library]
    return 2 * size**3 / _fastest(make(dtype, size), repeats) / 1e9


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
                gflops={
                    library: {dtype: matmul_gflops(dtype, library) for dtype in DTYPES}
                    for library in libraries()
                },
            )
        )
    )
