"""The arguments of `ladder-jax bench serve`."""

import json
from dataclasses import dataclass, field
from typing import Literal

from ladder_jax.arguments import FLAT
from ladder_jax.bench.load_requests import Load, read_load
from ladder_jax.bench.sizes import DECODE_SIZES
from ladder_jax.config import ConfigError, Decode, require


@dataclass(frozen=True)
class Arguments:
    """Measures servers of the OpenAI API under load: latencies, throughput, goodput.
    Servers run already (--urls), or are started here."""

    urls: tuple[str, ...] = ()
    """NAME=URL of servers that run already."""
    commands: tuple[str, ...] = ()
    """NAME=COMMAND of servers to start. {port} in a command is the port, {weights} a
    folder of Hugging Face weights (--size), {checkpoint} ours, {dtype} their dtype and
    {cache} an empty folder for compiled programs."""
    checkpoint: str | None = None
    """Start ladder-jax serve with this checkpoint."""
    size: str | None = None
    """Start ladder-jax serve with random weights of this size: tiny, small, m125, 1b or
    8b."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype that the model of --size computes in."""
    serve_options: str = ""
    """More options for ladder-jax serve, as in --serve-options="--port 0"."""
    engine: bool = False
    """Measure the engine of --checkpoint or --size without HTTP, too."""
    start_timeout: float = 600.0
    """Seconds in which a server must start."""
    startup: int = 0
    """Start each server so many times with an empty folder for compiled programs, and
    again with the full one, and measure how long that takes. No load is sent."""
    loads: tuple[str, ...] = ("saturated",)
    """The loads: requests a second, 90%, saturated, users:16."""
    arrivals: Literal["poisson", "gamma", "constant"] = "poisson"
    """How the times between requests are distributed."""
    burstiness: float = 4.0
    """For gamma: the variance of the times over their squared mean. Poisson has 1."""
    requests: int = 64
    """Requests of a load, in each round."""
    seconds: float | None = None
    """Loads with a rate send requests for so long, whatever --requests says."""
    rounds: int = 1
    """How often each load is sent to each server, in turns."""
    warmup: int = 16
    """Requests that each server gets first, which do not count."""
    lengths: Literal["uniform", "sharegpt"] = "uniform"
    """uniform: as the next two options say. sharegpt: log-normal, with 161 prompt and
    338 output tokens on average, scaled to --max-length."""
    prompt_tokens: tuple[int, ...] = (64,)
    """Tokens of a prompt: one number, or the least and the most."""
    output_tokens: tuple[int, ...] = (128,)
    """Tokens of an output: one number, or the least and the most."""
    file: str | None = None
    """A JSONL file with a request a line: "prompt" (text or ids) or "prompt_tokens",
    and "max_tokens". Its lines are used again where they are too few."""
    prompts: Literal["ids", "text", "chat"] = "ids"
    """What prompts are: random ids, as many random words, or these as a chat's first
    message."""
    vocabulary: int | None = None
    """Ids of prompts are below it. None: the model's of --size, else 256."""
    distinct: int | None = None
    """Repeat so many different requests. None: all are different."""
    check: bool = False
    """Generate each of the --distinct requests alone first, and count the outputs under
    load that are not the same."""
    ignore_eos: bool = True
    """Ask for outputs of full length, by the field ignore_eos."""
    temperature: float = 0.0
    """The temperature of every request."""
    extra_body: str = ""
    """A JSON object with more fields for every request."""
    timeout: float = 600.0
    """Seconds after which the client gives a request up."""
    goodput_ttft: float = 2000.0
    """Goodput counts requests up to this time to first token, in ms."""
    goodput_tpot: float = 200.0
    """Goodput counts requests up to this mean time per output token, in ms."""
    seed: int = 0
    """Seeds arrivals, lengths and prompts."""
    json: str | None = None
    """Write the results to this file."""
    plots: str | None = None
    """Write PNGs to this folder: latency curves of each load, and Pareto curves of all
    loads."""
    decode: Decode = field(  # those of ladder-jax serve
        default_factory=lambda: Decode(
            slots=16, max_logprobs=20, max_stop_ids=16, max_logit_bias=300
        ),
        metadata=FLAT,
    )

    @property
    def length(self) -> int:
        """The most tokens of a request."""
        if self.decode.max_length is not None:
            return self.decode.max_length
        if self.lengths == "sharegpt" or self.file is not None:
            return 1024
        return -(-(self.prompt_tokens[-1] + self.output_tokens[-1]) // 64) * 64


def check(arguments: Arguments) -> list[Load]:
    """Returns the loads. Raises ConfigError for arguments that are not accepted."""
    one = arguments.checkpoint is None or arguments.size is None
    require(one, "size", arguments.size, "left out with --checkpoint")
    ours = arguments.checkpoint is not None or arguments.size is not None
    if not (ours or arguments.urls or arguments.commands):
        raise ConfigError(
            "no server is named: give --urls, --commands, --checkpoint or --size"
        )
    require(
        ours or not arguments.engine,
        "engine",
        arguments.engine,
        "left out without --checkpoint or --size",
    )
    if arguments.size is not None:
        sizes = ", ".join(DECODE_SIZES)
        require(
            arguments.size in DECODE_SIZES, "size", arguments.size, f"one of {sizes}"
        )
    for name in ("requests", "rounds"):
        value = getattr(arguments, name)
        require(value >= 1, name, value, "1 or more")
    for name in ("warmup", "startup"):
        value = getattr(arguments, name)
        require(value >= 0, name, value, "0 or more")
    for name in ("burstiness", "timeout", "goodput_ttft", "goodput_tpot"):
        value = getattr(arguments, name)
        require(value > 0, name, value, "greater than 0")
    for name in ("seconds", "distinct", "vocabulary"):
        value = getattr(arguments, name)
        require(value is None or value > 0, name, value, "greater than 0, or None")
    for name in ("prompt_tokens", "output_tokens"):
        value = getattr(arguments, name)
        in_order = len(value) in (1, 2) and 1 <= value[0] <= value[-1]
        require(in_order, name, value, "a number from 1, or the least and the most")
    require(
        arguments.distinct is not None or not arguments.check,
        "check",
        arguments.check,
        "left out without --distinct",
    )
    require(
        arguments.prompts == "ids" or not arguments.engine,
        "prompts",
        arguments.prompts,
        "ids with --engine",
    )
    require(
        is_object(arguments.extra_body or "{}"),
        "extra_body",
        arguments.extra_body,
        "a JSON object",
    )
    require(arguments.loads, "loads", arguments.loads, "one load or more")
    return [read_load(text) for text in arguments.loads]


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
