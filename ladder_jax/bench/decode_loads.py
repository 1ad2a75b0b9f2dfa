"""Reads the loads of `ladder-jax bench decode`: when a workload's requests arrive."""

from collections.abc import Sequence
from typing import NamedTuple

from ladder_jax.config import require

WITH_GAPS = ("constant", "poisson")
BASELINE = "per-token"  # the policy whose saturated run measures the capacity


class Load(NamedTuple):
    """When requests arrive: all at once, with gaps, or at a share of a capacity."""

    name: str  # in the table
    arrivals: str  # "saturated" or a kind of workloads.arrival_times
    gap: float = 0.0  # seconds between arrivals on average, of the paper's model
    share: float | None = None  # of the capacity

    @property
    def is_saturated(self) -> bool:
        """Whether all requests arrive at once."""
        return self.arrivals == "saturated"


def read_loads(
    words: Sequence[str], gaps: Sequence[float], policies: Sequence[str]
) -> list[Load]:
    """The loads that `--load` names, a saturated one first.

    Args:
      words: of `--load`.
      gaps: milliseconds between arrivals; a load with gaps has one for each.
      policies: those that run; none means all.
    Raises ConfigError for a word that is not accepted, and for a share without what
    measures the capacity.
    """
    loads = [load for word in words for load in _read(word, gaps)]
    loads.sort(key=lambda load: not load.is_saturated)
    shares = [load.name for load in loads if load.share is not None]
    if shares:
        is_measured = loads[0].is_saturated and BASELINE in (policies or [BASELINE])
        needed = f"beside saturated, with the policy {BASELINE}: they measure capacity"
        require(is_measured, "load", shares[0], needed)
    return loads


def _read(word: str, gaps: Sequence[float]) -> list[Load]:
    accepted = "saturated, constant, poisson, or a share of the capacity such as 0.8"
    if word == "saturated":
        return [Load(word, word)]
    if word in WITH_GAPS:
        return [Load(f"{word} {gap:g} ms", word, gap * 1e-3) for gap in gaps]
    try:
        share = float(word)
    except ValueError:
        share = 0.0
    require(0 < share < 10, "load", word, accepted)
    return [Load(word, "poisson", share=share)]
