"""How this process uses the memory of the machine it runs on."""

import ctypes
import importlib.util
import os

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of mallopt, see malloc.h
ACCELERATORS = (
    "libtpu",
    "jax_plugins.xla_cuda12",
    "jax_plugins.xla_cuda13",
    "jax_plugins.xla_rocm",
)


def computes_here() -> bool:
    """Whether JAX will compute on this machine's CPUs.

    Before JAX starts only JAX_PLATFORMS and the installed plugins can be asked.
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(installed(name) for name in ACCELERATORS)


def installed(module: str) -> bool:
    """Whether `module` could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def keep_freed_memory() -> bool:
    """Tells malloc to keep freed memory, where JAX will compute on CPUs.

    Call it before JAX starts. XLA allocates the temporaries of a step as one block and
    frees it afterwards. glibc maps such a block anew each time, so every step pays for
    a fault a page: a third of a small model's time (docs/log.md). The price is that
    this process never gives memory back.

    Returns whether malloc took the settings: False on accelerators and where malloc is
    not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not computes_here():
        return False
    settings = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1))
    return all([mallopt(option, value) == 1 for option, value in settings])
