"""How programs that JAX runs on this machine's CPUs get memory, and when they free it.

A training step needs its temporaries once, as one piece of memory. These settings make
the process reuse this piece at every step (`keep_freed_memory`), in huge pages where
Linux has them, and make sure that there is only one of it (`run_programs_in_turn`).
"""

import contextlib
import ctypes
import importlib.util
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

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

    The memory is in huge pages where Linux offers them (`use_huge_pages`).

    Returns whether malloc took the settings: False on accelerators, where malloc is not
    glibc's, and where the user set it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not computes_here() or set_by_user(os.environ):
        return False
    settings = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1))
    are_set = all([mallopt(option, value) == 1 for option, value in settings])
    if are_set:
        use_huge_pages()
    return are_set


def use_huge_pages() -> bool:
    """Asks Linux to put malloc's memory, up to three quarters of the machine's, into
    huge pages of 2 MiB, for its next use.

    Call it after malloc was told to keep freed memory: malloc gets this room as
    addresses without memory behind them, and keeps it. Linux gives most programs pages
    of 4 KiB; then the processor spends 3 to 7% of a training step to look up the
    addresses of pages (docs/log.md).

    Returns whether Linux took the advice: False where memory may not be overcommitted,
    where the process has a limit on its addresses, or without huge pages.
    """
    with contextlib.suppress(OSError):
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 4 * 3
    room = libc.malloc(size)
    if not room:
        return False
    start = -(-room // page) * page
    whole_pages = (room + size - start) // page * page
    advice = getattr(mmap, "MADV_HUGEPAGE", 14)
    is_taken = libc.madvise(start, whole_pages, advice) == 0
    libc.free(room)
    return is_taken


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
