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


def computes_here():
    """Whether JAX will compute on this machine's CPUs, as far as it can be known before JAX starts."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(installed(name) for name in ACCELERATORS)


def installed(module):
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def keep_freed_memory():
    """Where JAX will compute on CPUs, tells malloc to keep what is freed. Before JAX starts.

    XLA allocates the temporaries of a step as one block and frees it afterwards. glibc maps such a block anew each
    time, so every step pays for a fault a page: a third of the time of a small model's (docs/log.md). The price is that
    what this process has once used stays its own. Where malloc is another one nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and computes_here():
        for option, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(option, value)
