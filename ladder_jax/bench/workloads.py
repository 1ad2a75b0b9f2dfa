"""Generates requests with arrival times for `ladder-jax bench decode`, and the times
and lengths of those of `ladder-jax bench serve`.

    saturated   all at once, with short prompts, so that scheduling is measured and not
                prefill
    constant    equal gaps between arrivals
    poisson     exponential gaps (Flover, arXiv 2305.13484: gaps of 20 to 5000 ms, for a
                model whose step takes 11.3 ms)
    sharegpt    all at once, with log-normal lengths of 161 prompt and 338 output tokens
                on average, scaled to fit (the means are from memory, not checked)

Output lengths are uniform from `least` to `most` tokens, except for sharegpt.
"""

from dataclasses import dataclass

import numpy as np

from ladder_jax.config import require

WORKLOADS = ("saturated", "constant", "poisson", "sharegpt")
WITH_GAPS = ("constant", "poisson")


@dataclass(frozen=True)
class Arrival:
    """One request of a workload."""

    seconds: float  # after the start
    prompt: tuple[int, ...] | str
    max_tokens: int


def make_workload(
    kind: str,
    *,
    requests: int,
    prompt: int,
    outputs: tuple[int, int],
    length: int,
    vocabulary: int,
    gap: float = 0.0,
    seed: int = 0,
) -> list[Arrival]:
    """The requests of a workload, in the order of arrival.

    Args:
      kind: of WORKLOADS.
      requests: how many.
      prompt: tokens of a prompt (not for sharegpt).
      outputs: the least and the most output tokens (not for sharegpt).
      length: the most tokens of a request. Only sharegpt uses it, to scale its lengths.
      vocabulary: the number of token ids that prompts are drawn from.
      gap: seconds between arrivals, on average (constant, poisson).
      seed: of all random numbers.
    """
    require(kind in WORKLOADS, "workload", kind, f"one of {', '.join(WORKLOADS)}")
    rng = np.random.default_rng(seed)
    if kind == "sharegpt":
        prompts, tokens = sharegpt_lengths(requests, length, rng)
    else:
        prompts = np.full(requests, prompt)
        tokens = rng.integers(outputs[0], outputs[1] + 1, requests)
    times = arrival_times(kind, requests, gap if kind in WITH_GAPS else 0.0, rng)
    return [
        Arrival(
            seconds,
            tuple(rng.integers(0, vocabulary, prompt_length).tolist()),
            int(max_tokens),
        )
        for seconds, prompt_length, max_tokens in zip(times, prompts, tokens)
    ]


def arrival_times(
    kind: str,
    count: int,
    gap: float,
    rng: np.random.Generator,
    burstiness: float = 1.0,
) -> list[float]:
    """When requests arrive, in seconds after the first, in order.

    Args:
      kind: constant, poisson, or gamma: gaps from a gamma distribution. Other kinds
        arrive as constant ones do.
      count: how many.
      gap: seconds between two arrivals, on average. 0: all at once.
      rng: draws the gaps.
      burstiness: the squared coefficient of variation of gamma's gaps, which is the
        reciprocal of its shape. 1: poisson; more: in bursts; near 0: constant.
    """
    shape = {"poisson": 1.0, "gamma": 1.0 / burstiness}.get(kind)
    if shape is None or not gap:
        gaps = np.full(count, gap)
    else:
        gaps = rng.gamma(shape, gap / shape, count)
    gaps[:1] = 0
    return np.cumsum(gaps).tolist()


def sharegpt_lengths(
    count: int, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal numbers of tokens (prompts, outputs), scaled to a `length` below 1024
    tokens; each is at most half of `length`."""
    scale = min(1.0, length / 1024)
    prompts = _log_normal(rng, 161 * scale, 1.0, count, length // 2)
    return prompts, _log_normal(rng, 338 * scale, 0.8, count, length // 2)


def _log_normal(
    rng: np.random.Generator, mean: float, sigma: float, count: int, most: int
) -> np.ndarray:
    """Integers from 1 to `most` from a log-normal distribution with this mean."""
    values = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(values, 1, most).astype(int)
