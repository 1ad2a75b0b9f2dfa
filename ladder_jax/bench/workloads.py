"""Generates the requests, with arrival times, that `ladder-jax bench decode` serves.

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
    prompt: tuple[int, ...]
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
        scale = min(1.0, length / 1024)
        prompts = _log_normal(rng, 161 * scale, 1.0, requests, length // 2)
        tokens = _log_normal(rng, 338 * scale, 0.8, requests, length // 2)
    else:
        prompts = np.full(requests, prompt)
        tokens = rng.integers(outputs[0], outputs[1] + 1, requests)
    gaps = {
        "constant": np.full(requests, gap),
        "poisson": rng.exponential(gap, requests),
    }.get(kind, np.zeros(requests))
    gaps[0] = 0
    return [
        Arrival(
            float(seconds),
            tuple(rng.integers(0, vocabulary, prompt_length).tolist()),
            int(max_tokens),
        )
        for seconds, prompt_length, max_tokens in zip(np.cumsum(gaps), prompts, tokens)
    ]


def _log_normal(
    rng: np.random.Generator, mean: float, sigma: float, count: int, most: int
) -> np.ndarray:
    """Integers from 1 to `most` from a log-normal distribution with this mean."""
    values = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(values, 1, most).astype(int)
