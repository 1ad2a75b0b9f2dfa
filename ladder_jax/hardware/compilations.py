"""Counts the programs that XLA compiles in this process, or loads from the cache."""

import threading

import jax

# JAX records it after each compilation, also if the compilation cache had the program:
# requests wait for either.
_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class Compilations:
    """Counts from its creation on; the programs of all threads count.

    total: programs that were compiled or loaded from the compilation cache.
    from_cache: those that were loaded.
    seconds: what all of them took.
    """

    def __init__(self) -> None:
        self.total = self.from_cache = 0
        self.seconds = 0.0
        with _lock:
            if not _counting:
                jax.monitoring.register_event_duration_secs_listener(_count_seconds)
                jax.monitoring.register_event_listener(_count_hit)
            _counting.append(self)


# JAX has no public way to end one listener's work, so counts are never taken out.
_counting: list[Compilations] = []
_lock = threading.Lock()


def _count_seconds(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
        with _lock:
            for count in _counting:
                count.total += 1
                count.seconds += duration_secs


def _count_hit(event: str, **_: str | int) -> None:
    if event == _CACHE_HIT:
        with _lock:
            for count in _counting:
                count.from_cache += 1
