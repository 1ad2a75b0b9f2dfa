"""The options of `ladder-jax bench decode`."""

from dataclasses import dataclass
from typing import Literal

from ladder_jax.bench import machine
from ladder_jax.bench.sizes import DECODE_SIZES
from ladder_jax.bench.workloads import REALISTIC, WORKLOADS
from ladder_jax.config import require

# Tokens of the longest prompt and output, without `--prompt` and `--most`: of the
# workload uniform, and of the others.
SHORT, LONG = (4, 256), (512, 512)
# The policies of temporal fusion.
FUSION = ("no-shuffle", "rows", "ours", "speculate", "carry")


@dataclass(frozen=True)
class Arguments:
    """Compares temporal fusion with other ways of batching, under load."""

    size: str = "tiny"
    """tiny, small, m125, 1b or 8b: a model with random weights."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    weights_dtype: Literal["auto", "int8"] = "auto"
    """int8: all policies decode with int8 weights, and the bare step is also measured
    with weights in --dtype, in turn."""
    residual: str = "ladder"
    """The residual schedule."""
    workload: str = ",".join(REALISTIC)
    """Lengths of prompts and outputs: sharegpt, long-short, short-long, shared,
    uniform, or several joined by commas."""
    load: tuple[str, ...] = ("saturated", "0.8")
    """When requests arrive: saturated; shares of the capacity of per-token, such as
    0.8; constant, poisson: with --gaps."""
    gaps: tuple[float, ...] = (500.0,)
    """Milliseconds between arrivals (constant, poisson; the paper: 20 to 5000)."""
    unscaled: bool = False
    """Do not scale gaps and windows by this model's step."""
    requests: int = 32
    """Requests of a workload."""
    prompt: int | None = None
    """Tokens of the longest prompt. sharegpt scales its lengths to --prompt + --most.
    None: 4 with uniform, else 512."""
    least: int = 128
    """The fewest output tokens of a request (uniform)."""
    most: int | None = None
    """The most output tokens. None: 256 with uniform, else 512."""
    slots: int = 16
    """Requests that decode together."""
    chunk: int = 16
    """The most decode iterations of one jitted call."""
    burst_ms: float = 50.0
    """Milliseconds that the iterations of one call may take. 0: no limit."""
    temperature: float = 0.0
    """Of all requests. 0: the likeliest token."""
    drafts: int = 4
    """The most tokens that the policy speculate drafts."""
    carry_tokens: int = 16
    """The longest piece of a prompt that an iteration of the policy carry computes."""
    tensor: int = 1
    """Devices to shard the model over."""
    policies: tuple[str, ...] = ("static", "dynamic", "per-token", "ours")
    """The batching policies to compare: also sequential, concurrent, no-shuffle, rows,
    speculate, carry."""
    prefix_cache: Literal["fusion", "all", "none"] = "fusion"
    """Which policies have a prefix cache for the workload shared: those of temporal
    fusion, all (but concurrent), or none."""
    windows: tuple[float, ...] = (500.0,)
    """Milliseconds that dynamic batching waits for requests (scaled as gaps are)."""
    goodput_ttft: float = 20.0
    """Goodput counts requests up to this time to first token, in decode steps of one
    request alone."""
    goodput_tpot: float = 3.0
    """Goodput counts requests up to this mean time per output token, in the same
    steps."""
    rounds: int = 1
    """How often every policy runs a workload and load. The table shows the run with the
    median share of the bare step."""
    seed: int = 0
    """Seeds the random numbers of the workload."""
    json: str | None = None
    """Write the results to this file."""
    plots: str | None = None
    """Write PNGs to this folder: every slot's occupancy over time, latency curves."""

    @property
    def kinds(self) -> list[str]:
        """The workloads."""
        return self.workload.split(",")

    def longest(self, kind: str) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest output of a workload."""
        prompt, most = SHORT if kind == "uniform" else LONG
        return self.prompt or prompt, self.most or most

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all workloads."""
        return max(self.longest(kind)[0] for kind in self.kinds)


def check(arguments: Arguments) -> None:
    """Raises ConfigError for an option that is not accepted."""
    sizes, workloads = ", ".join(DECODE_SIZES), ", ".join(WORKLOADS)
    dtypes = ", ".join(machine.DTYPES)
    require(arguments.size in DECODE_SIZES, "size", arguments.size, f"one of {sizes}")
    require(
        arguments.dtype in machine.DTYPES, "dtype", arguments.dtype, f"one of {dtypes}"
    )
    for kind in arguments.kinds:
        require(kind in WORKLOADS, "workload", kind, f"one of {workloads}")
    positive = "requests", "prompt", "least", "most", "slots", "chunk", "tensor"
    for name in (*positive, "rounds", "carry_tokens"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, name, value, "1 or more")
    if "uniform" in arguments.kinds:
        most, least = arguments.longest("uniform")[1], arguments.least
        require(most >= least, "most", most, f"at least least={least}")


def has_prefix_cache(arguments: Arguments, policy: str) -> bool:
    """Whether a policy has a prefix cache where prompts share a beginning."""
    if arguments.prefix_cache == "fusion":
        return policy in FUSION
    return arguments.prefix_cache == "all" and policy != "concurrent"
