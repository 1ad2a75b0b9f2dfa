"""How programs that JAX runs on this machine's CPUs get memory, and when they free it.

A training step needs its temporaries once, as one piece of memory. These settings make
the process reuse this piece at every step (`keep_freed_memory`), and make sure that
there is only one of it (`run_programs_in_turn`).
"""

import ctypes
import importlib.util
import os
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of mallopt, see malloc.h
# A user's own settings of glibc's malloc.
VARIABLES = (
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)
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

    A user who sets malloc by the environment (`VARIABLES`, or glibc.malloc in
    GLIBC_TUNABLES) keeps that setting: MALLOC_TRIM_THRESHOLD_=131072 gives the
    temporaries back after every step.

    Returns whether malloc took the settings: False on accelerators, where malloc is not
    glibc's, and where the user set it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not computes_here() or set_by_user(os.environ):
        return False
    settings = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1))
    return all([mallopt(option, value) == 1 for option, value in settings])


def set_by_user(environment: Mapping[str, str]) -> bool:
    """Whether `environment` sets glibc's malloc."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name in environment for name in VARIABLES)


def run_programs_in_turn() -> bool:
    """Makes a call of a program return when the program has ended and freed its
    temporaries, where JAX will compute on CPUs.

    Call it before JAX starts. By default a call returns at once, and a thread of XLA's
    runs the program. This thread reports the results as ready before it frees the
    temporaries. Another thread then starts the next training step, and allocates its
    temporaries beside those of the last step: a process that keeps freed memory ends
    with two or three times the temporaries that one step needs.

    Returns whether JAX took the setting: False on accelerators.
    """
    if not computes_here():
        return False
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True
