"""Measures what a benchmark runs on: its name and its rate of matrix products.

Tokens a second cannot be compared between machines; the share of the device's own rate
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
# Of the processor flags in /proc/cpuinfo, those that decide the rate of products.
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


class Machine(NamedTuple):
    """A CPU, or a GPU and the CPU beside it, and its speed."""

    cpu: str
    cores: int  # that the process may use
    # GFLOP/s of matrix products: {library: {dtype: rate}}
    gflops: dict[str, dict[str, float]]
    gpu: str = ""  # what has these rates; empty: the CPU

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
        name = f"{self.gpu}; {self.cpu}" if self.gpu else self.cpu
        return f"{name}, {self.cores} cores; matrix products, GFLOP/s: {rates}"


def measure(device: Device = "cpu") -> Machine:
    """Measures this machine in a process of its own, which must have JAX."""
    command = [sys.executable, "-m", "ladder_jax.bench.machine", device]
    environment = os.environ | ENVIRONMENT[device]
    process = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
        start_new_session=True,  # Ctrl-C ends this process, and so that one
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
                gflops={
                    library: {
                        dtype: matmul_gflops(dtype, library, SIZE[device])
                        for dtype in DTYPES
                    }
                    for library in libraries()
                },
                gpu="" if device == "cpu" else jax.devices()[0].device_kind,
            )
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])  # type: ignore[arg-type]
