"""Generates requests with arrival times for `ladder-jax bench decode`, and the times
and lengths of those of `ladder-jax bench serve`.

A workload says how long prompts and outputs are:

    sharegpt    log-normal lengths of 161 prompt and 338 output tokens on average,
                scaled to fit (the means are from memory, not checked)
    long-short  long prompts with short answers: 1/2 to all of the longest prompt, 1/32
                to 1/8 of the longest output
    short-long  short prompts with long answers: the reverse
    shared      prompts that begin with the same 1,000 tokens, or as many as fit, and
                end with a question of 1/32 to 1/8 of the longest prompt; outputs are
                1/8 to 1/2 of the longest
    uniform     prompts of one length, and outputs of uniform length: with short
                prompts, scheduling is measured and not prefill
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ladder_jax.config import require

REALISTIC = ("sharegpt", "long-short", "short-long", "shared")
WORKLOADS = (*REALISTIC, "uniform")
SYSTEM_PROMPT = 1000  # tokens that all prompts of `shared` begin with, if they fit
LONG, MIDDLE, SHORT = (1 / 2, 1), (1 / 8, 1 / 2), (1 / 32, 1 / 8)
# The least and the greatest length, as shares of the longest prompt and output. For
# `shared` the first is the question's.
SHARES = {
    "long-short": (LONG, SHORT),
    "short-long": (SHORT, LONG),
    "shared": (SHORT, MIDDLE),
}


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
    seed: int = 0,
) -> list[Arrival]:
    """The requests of a workload. All arrive at once: see `arriving`.

    Args:
      kind: of WORKLOADS.
      requests: how many.
      prompt: tokens of the longest prompt (not for sharegpt).
      outputs: the least and the most output tokens; the least is of uniform alone
        (not for sharegpt).
      length: the most tokens of a request. Only sharegpt uses it, to scale its lengths.
      vocabulary: the number of token ids that prompts are drawn from.
      seed: of all random numbers.
    """
    require(kind in WORKLOADS, "workload", kind, f"one of {', '.join(WORKLOADS)}")
    rng = np.random.default_rng(seed)
    begin: tuple[int, ...] = ()
    if kind == "sharegpt":
        prompts, tokens = sharegpt_lengths(requests, length, rng)
    elif kind == "uniform":
        prompts = np.full(requests, prompt)
        tokens = rng.integers(outputs[0], outputs[1] + 1, requests)
    else:
        of_prompt, of_output = SHARES[kind]
        prompts = _uniform(rng, prompt, of_prompt, requests)
        tokens = _uniform(rng, outputs[1], of_output, requests)
        if kind == "shared":
            size = min(SYSTEM_PROMPT, prompt - int(prompts.max()))
            begin = tuple(rng.integers(0, vocabulary, size).tolist())
    return [
        Arrival(
            0.0,
            (*begin, *rng.integers(0, vocabulary, prompt_length).tolist()),
            int(max_tokens),
        )
        for prompt_length, max_tokens in zip(prompts, tokens)
    ]


def _uniform(
    rng: np.random.Generator, longest: int, shares: tuple[float, float], count: int
) -> np.ndarray:
    """Integers from one share of `longest` to another, and at least 1."""
    least, most = (max(1, int(longest * share)) for share in shares)
    return rng.integers(least, most + 1, count)


def arriving(
    arrivals: Sequence[Arrival], kind: str, gap: float, seed: int = 0
) -> list[Arrival]:
    """The same requests, in the same order, at other times: see `paced_times`."""
    rng = np.random.default_rng([seed, 1])
    times = paced_times(kind, len(arrivals), gap, rng)
    return [replace(one, seconds=time) for one, time in zip(arrivals, times)]


def paced_times(
    kind: str,
    count: int,
    gap: float,
    rng: np.random.Generator,
    burstiness: float = 1.0,
) -> list[float]:
    """`arrival_times`, scaled so that the last is (count - 1) gaps after the first.

    A few random gaps would have another mean.
    """
    times = arrival_times(kind, count, gap, rng, burstiness)
    if not gap or not times[-1]:
        return times
    factor = gap * (count - 1) / times[-1]
    return [seconds * factor for seconds in times]


def arrival_times(
    kind: str,
    count: int,
    gap: float,
    rng: np.random.Generator,
    burstiness: float = 1.0,
) -> list[float]:
    """When requests arrive, in seconds after the first, in order.

    Args:
      kind: constant; poisson: exponential gaps (Flover, arXiv 2305.13484: of 20 to
        5000 ms on average, for a model whose step takes 11.3 ms); gamma: gaps from a
        gamma distribution.
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
