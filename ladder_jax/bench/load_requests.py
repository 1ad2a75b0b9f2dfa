"""The requests of `ladder-jax bench serve`: loads, arrivals, lengths, prompts."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ladder_jax.bench.workloads import Arrival, paced_times, sharegpt_lengths
from ladder_jax.config import ConfigError, require

ARRIVALS = ("poisson", "gamma", "constant")
LENGTHS = ("uniform", "sharegpt")
PROMPTS = ("ids", "text", "chat")
# Most tokenizers have each of these words, with the space before it, as one token.
WORDS = (
    "time year people way day man thing woman life child world school state family "
    "student group country problem hand part place case week company system program "
    "question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city name"
).split()


@dataclass(frozen=True)
class Load:
    """How fast requests come: at a rate, at a share of a server's capacity, or one
    after another from each of some users."""

    name: str  # as in `--loads`
    rate: float = math.inf  # requests a second; inf: all at once
    share: float | None = None  # of the capacity; `rate` is then still to be found
    users: int = 0  # each sends its next request when its last one has ended; 0: none


def read_load(text: str) -> Load:
    """Reads an item of `--loads`. Raises ConfigError if it is none."""
    accepted = (
        "saturated, requests a second such as 2.5, a share of the capacity such as "
        "90%, or users:16"
    )
    kind, _, count = text.partition(":")
    try:
        if text == "saturated":
            return Load(text)
        if kind == "users":
            users = int(count)
            require(users >= 1, "loads", text, accepted)
            return Load(text, users=users)
        is_share = text.endswith("%")
        value = float(text.removesuffix("%"))
    except ValueError:
        require(False, "loads", text, accepted)
        raise
    require(0 < value < math.inf, "loads", text, accepted)
    return Load(text, share=value / 100) if is_share else Load(text, rate=value)


class Shape(NamedTuple):
    """What the requests of a run look like, see the options of `bench serve`."""

    lengths: str  # of LENGTHS
    prompt_tokens: tuple[int, ...]  # a number, or the least and the most
    output_tokens: tuple[int, ...]
    length: int  # the most tokens of a request (sharegpt)
    prompts: str  # of PROMPTS
    vocabulary: int  # ids are below it
    file: str | None  # rows of prompts and lengths
    distinct: int | None  # how many different requests there are
    seed: int


class Question(NamedTuple):
    """What a request asks for; the load says when."""

    prompt: str | tuple[int, ...]
    max_tokens: int


def question_of(request: Arrival) -> Question:
    """What a request asks for."""
    return Question(request.prompt, request.max_tokens)


def questions(shape: Shape, count: int, stream: int = 0) -> list[Question]:
    """The questions of `count` requests; the same for the same shape and `stream`.

    Without `distinct`, those of different streams differ, so that no prompt is in a
    server's prefix cache.
    """
    if shape.distinct is not None:
        few = shape._replace(distinct=None)
        return list(islice(cycle(questions(few, shape.distinct)), count))
    rng = np.random.default_rng([shape.seed, stream])
    if shape.file is not None:
        rows = islice(cycle(read_rows(shape.file)), count)
        return [_question_of_row(row, shape, rng) for row in rows]
    if shape.lengths == "sharegpt":
        prompts, outputs = sharegpt_lengths(count, shape.length, rng)
    else:
        prompts, outputs = (
            rng.integers(bounds[0], bounds[-1] + 1, count)
            for bounds in (shape.prompt_tokens, shape.output_tokens)
        )
    return [
        Question(_prompt(shape, int(tokens), rng), int(most))
        for tokens, most in zip(prompts, outputs)
    ]


def _prompt(shape: Shape, tokens: int, rng: np.random.Generator) -> Any:
    """Random ids, or as many random words."""
    if shape.prompts == "ids":
        return tuple(rng.integers(0, shape.vocabulary, tokens).tolist())
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), tokens))


def schedule(
    asked: Sequence[Question],
    load: Load,
    arrivals: str,
    burstiness: float,
    seed: int,
) -> list[Arrival]:
    """The questions with the arrival times of `load`; all are 0 where users send.

    The last request of a load with a rate arrives after (requests - 1) / rate seconds.
    """
    count, gap = len(asked), 0.0 if load.users else 1 / load.rate
    rng = np.random.default_rng(seed)
    times = paced_times(arrivals, count, gap, rng, burstiness)
    return [Arrival(seconds, *question) for seconds, question in zip(times, asked)]


# ---------------------------------------------------------------- files


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file, see `--file`. Raises ConfigError for a bad row."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"file={path!r} cannot be read: {error}") from None
    rows = list(_rows(text, path))
    require(rows, "file", path, "a file with at least one row")
    return rows


def _rows(text: str, path: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        ok = isinstance(row, dict) and all(
            key not in row or _fits(key, row[key])
            for key in ("prompt", "prompt_tokens", "max_tokens")
        )
        if not ok or not {"prompt", "prompt_tokens"} & set(row):
            raise ConfigError(
                f"{path}, line {number}: a row must be a JSON object with prompt (text "
                "or ids) or prompt_tokens (a number), and may have max_tokens"
            )
        yield row


def _fits(key: str, value: Any) -> bool:
    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if key != "prompt":
        return is_count(value) and value > 0
    is_ids = isinstance(value, list) and value and all(map(is_count, value))
    return isinstance(value, str) or bool(is_ids)


def _question_of_row(
    row: dict[str, Any], shape: Shape, rng: np.random.Generator
) -> Question:
    prompt = row.get("prompt")
    if prompt is None:
        prompt = _prompt(shape, row["prompt_tokens"], rng)
    elif isinstance(prompt, list):
        prompt = tuple(prompt)
    bounds = shape.output_tokens
    most = row.get("max_tokens", int(rng.integers(bounds[0], bounds[-1] + 1)))
    return Question(prompt, most)
