"""Settings of glibc's malloc for programs that JAX runs on CPUs."""

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

    JAX has not started yet, so JAX_PLATFORMS and the installed plugins decide.
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

    Call it before JAX starts. XLA allocates the temporaries of a step as one piece of
    memory and frees it afterwards. By default glibc returns it to the kernel and maps
    new pages in every step. The page faults take a third of a small model's time
    (docs/log.md). With these settings the process never returns memory to the kernel.

    Returns whether malloc took the settings: False on accelerators and where malloc is
    not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not computes_here():
        return False
    settings = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1))
    return all([mallopt(option, value) == 1 for option, value in settings])
