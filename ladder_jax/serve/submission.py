"""Checks a client's prompt and options before the engine queues the request.

To add an option of `Engine.submit`, add a field to `SubmitOptions` and a row to
`options_table`. The options of sampling have a table of their own in sampling.py.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np

from ladder_jax.config import ConfigError, short_repr
from ladder_jax.sampling import SamplingParams, make_params
from ladder_jax.serve.stop_strings import ACCEPTED, read_stop

# A ticket is the number of a request's admission to staging, from 1 to TICKETS. The
# device orders waiting requests by the int32 ticket - priority * TICKETS, so
# (2 * MAX_PRIORITY + 1) * TICKETS must be less than 2 ** 32.
MAX_PRIORITY = 1000
TICKETS = 2**21
DEFAULT_MAX_TOKENS = 200


@dataclass(frozen=True)
class Accepts:
    """Limits of one engine for the prompts and options of requests.

    tokenizer: a Tokenizer, or None if prompts must be ids.
    """

    tokenizer: Any
    vocabulary: int  # ids are below it
    length: int  # tokens of a prompt and its output together
    max_stop_ids: int
    max_logit_bias: int
    max_logprobs: int
    prompt_logprobs: bool  # whether prompts can be scored


class SubmitOptions(TypedDict, total=False):
    """The options of `Engine.submit`, see there."""

    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int] | None
    logprobs: int | None
    prompt_logprobs: int | None
    priority: int
    speculate: bool
    logit_bias: Mapping[int, float] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int


@dataclass(frozen=True)
class Submission:
    """A prompt and its options, checked; see `check_request`."""

    prompt: np.ndarray  # int32
    max_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    prompt_logprobs: int | None
    priority: int
    speculate: bool
    params: SamplingParams


class Option(NamedTuple):
    """An option of `Engine.submit`: its default and its check."""

    default: Any
    # Returns the value as the engine uses it, or raises ValueError, TypeError or
    # OverflowError if it is not accepted.
    read: Callable[[Any], Any]
    accepted: str  # the accepted values, for messages
    none_is_default: bool = False


def options_table(
    accepts: Accepts, prompt_tokens: int, scores_prompt: bool, ignores_eos: bool
) -> dict[str, Option]:
    """Returns the options of a request.

    Args:
      prompt_tokens: of its prompt.
      scores_prompt: whether it wants log-probabilities of the prompt.
      ignores_eos: whether it does not end at the tokenizer's eos_ids by default.
    """
    room = accepts.length - prompt_tokens
    last_id = accepts.vocabulary - 1
    eos = ()
    if accepts.tokenizer is not None and not ignores_eos:
        eos = accepts.tokenizer.eos_ids
    least = 0 if scores_prompt else 1
    most_logprobs = f"None, or an integer from 0 to {accepts.max_logprobs}"
    prompt_logprobs = most_logprobs
    if not accepts.prompt_logprobs:
        prompt_logprobs = "None, as this engine has decode.prompt_logprobs=False"

    def read_logprobs(value: Any) -> int | None:
        return None if value is None else integer(value, 0, accepts.max_logprobs)

    def read_prompt_logprobs(value: Any) -> int | None:
        if value is not None and not accepts.prompt_logprobs:
            raise ValueError("the engine has no program for it")
        return read_logprobs(value)

    return {
        "prompt_logprobs": Option(None, read_prompt_logprobs, prompt_logprobs),
        "max_tokens": Option(
            min(DEFAULT_MAX_TOKENS, room),
            lambda value: integer(value, least, room),
            f"an integer from {least} to {room}: {accepts.length} tokens less the "
            f"{prompt_tokens} of the prompt",
            none_is_default=True,
        ),
        "min_tokens": Option(
            0, lambda value: integer(value, 0, room), f"an integer from 0 to {room}"
        ),
        "ignore_eos": Option(False, boolean, "True or False"),
        "stop": Option((), read_stop, ACCEPTED),
        "stop_token_ids": Option(
            eos,
            lambda value: ids(value, last_id, accepts.max_stop_ids),
            f"a list of at most {accepts.max_stop_ids} ids from 0 to {last_id}",
            none_is_default=True,
        ),
        "logprobs": Option(None, read_logprobs, most_logprobs),
        "priority": Option(
            0,
            lambda value: integer(value, -MAX_PRIORITY, MAX_PRIORITY),
            f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}",
        ),
        "speculate": Option(True, boolean, "True or False"),
    }


def check_request(
    prompt: Any, options: Mapping[str, object], accepts: Accepts
) -> Submission:
    """Checks a prompt and its options. Raises ConfigError for the first mistake.

    Args:
      prompt: text, or ids in a list, a tuple, an array or another iterable.
      options: those of `options_table`, and those of sampling.make_params.
    """
    scores_prompt = options.get("prompt_logprobs") is not None
    # A prompt that fills the row leaves no room for output: it can only be scored.
    most_tokens = accepts.length - (not scores_prompt)
    prompt_ids = read_prompt(prompt, accepts, most_tokens)
    ignore_eos = options.get("ignore_eos")
    ignores_eos = isinstance(ignore_eos, (bool, np.bool_)) and bool(ignore_eos)
    table = options_table(accepts, len(prompt_ids), scores_prompt, ignores_eos)
    other_options: dict[str, Any] = dict(options)
    values: dict[str, Any] = {}
    for name, option in table.items():
        value = other_options.pop(name, option.default)
        if value is None and option.none_is_default:
            value = option.default
        try:
            values[name] = option.read(value)
        except (ValueError, TypeError, OverflowError):
            raise refusal(name, value, option.accepted) from None
    del values["ignore_eos"]  # it has decided on stop_token_ids
    max_tokens, min_tokens = values["max_tokens"], values["min_tokens"]
    if min_tokens > max_tokens:
        raise refusal("min_tokens", min_tokens, f"at most max_tokens={max_tokens}")
    if values["stop"]:
        need_tokenizer(accepts, "stop is text")
    bias = other_options.pop("logit_bias", None)
    params = make_params(
        bias, accepts.max_logit_bias, accepts.vocabulary, **other_options
    )
    return Submission(prompt=prompt_ids, params=params, **values)


# ---------------------------------------------------------------- readers of a value


def integer(value: Any, least: int, most: int) -> int:
    """Returns an integer of Python or NumPy as an int.

    Raises TypeError for bools and floats, ValueError for numbers out of range.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError("a bool")
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError("out of range")
    return number


def boolean(value: Any) -> bool:
    """Returns a bool of Python or NumPy as a bool. Raises TypeError for others."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError("not a bool")
    return bool(value)


def ids(value: Any, last_id: int, most: int) -> tuple[int, ...]:
    """Returns at most so many token ids as a tuple."""
    tokens = sequence(value, most + 1)
    if len(tokens) > most:
        raise ValueError("too many")
    return tuple(integer(token, 0, last_id) for token in tokens)


def sequence(value: Any, most: int | None) -> tuple[Any, ...]:
    """Returns the first `most` items of an ordered iterable (None: all of them)."""
    if isinstance(value, (str, bytes, bytearray, Mapping, Set)):
        raise TypeError("not a sequence")
    if not isinstance(value, Iterable):
        raise TypeError("not a sequence")
    return tuple(itertools.islice(value, most))


def read_prompt(prompt: Any, accepts: Accepts, most_tokens: int) -> np.ndarray:
    """Returns a prompt's ids, int32, at most `most_tokens`.

    Raises ConfigError if it is not accepted.
    """
    original_prompt = prompt
    if isinstance(prompt, str):
        need_tokenizer(accepts, "prompt is text")
        try:
            prompt = accepts.tokenizer.prompt(prompt)
        except UnicodeError:
            raise refusal(
                "prompt", original_prompt, "text that UTF-8 can encode"
            ) from None
    accepted = f"text, or ids from 0 to {accepts.vocabulary - 1}"
    if hasattr(prompt, "dtype") and hasattr(prompt, "shape"):  # NumPy's or JAX's array
        prompt = np.asarray(prompt)
        if prompt.ndim != 1 or (prompt.size and prompt.dtype.kind not in "iu"):
            description = f"array of shape {prompt.shape} and type {prompt.dtype}"
            raise refusal("prompt", Verbatim(description), accepted)
        prompt = prompt[: most_tokens + 1].tolist()
    try:
        tokens = sequence(prompt, most_tokens + 1)
    except (ValueError, TypeError):
        raise refusal("prompt", original_prompt, accepted) from None
    if not tokens:
        raise refusal("prompt", original_prompt, "at least one token")
    if len(tokens) > most_tokens:
        description = f"{len(tokens)} or more tokens"
        accepted = f"fewer than {most_tokens + 1} tokens"
        raise refusal("prompt", Verbatim(description), accepted)
    try:
        prompt_ids = ids(tokens, accepts.vocabulary - 1, len(tokens))
    except (ValueError, TypeError, OverflowError):
        raise refusal("prompt", original_prompt, accepted) from None
    return np.asarray(prompt_ids, np.int32)


def need_tokenizer(accepts: Accepts, reason: str) -> None:
    """Raises ConfigError, with the reason for it, if the engine has no tokenizer."""
    if accepts.tokenizer is None:
        raise ConfigError(f"{reason}, but this engine has no tokenizer: give ids")


# ---------------------------------------------------------------- messages


class Verbatim(str):
    """A description of a value, which messages show without quotes."""

    def __repr__(self) -> str:
        return str(self)


def refusal(name: str, value: Any, accepted: str) -> ConfigError:
    """Returns the error for a value that is not accepted; its message is one line."""
    text = short_repr(value)
    return ConfigError(f"{name}={text} is not accepted: it must be {accepted}")
