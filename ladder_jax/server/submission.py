"""From the body of an HTTP request to requests in the engine's queue."""

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ladder_jax.config import ConfigError, require
from ladder_jax.serve.request import EngineFailed, QueueFull, Request
from ladder_jax.server import errors
from ladder_jax.server.generation import Generation, Prompt
from ladder_jax.server.protocol import Generate
from ladder_jax.server.serving import Served, Serving


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What an HTTP request wants of the engine."""

    body: Generate  # its sampling parameters and limits
    prompts: int  # how many
    choices: int  # outputs of each prompt
    # Makes the prompts, in a thread. It may raise ConfigError and APIError.
    encode: Callable[[], list[Prompt]]
    end_ids: Sequence[int]  # that end an output, unless ignore_eos
    # max_tokens where the body has none. None: what there is room for.
    default_tokens: int | None
    logprobs: int | None  # see Engine.submit
    prompt_logprobs: int | None = None  # see Engine.submit
    # {option of Engine.submit: the client's name of it}, where they differ
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def outputs(self) -> int:
        """How many requests of the engine it needs."""
        return self.prompts * self.choices


async def submit(serving: Serving, served: Served, wanted: Wanted) -> Generation:
    """Encodes the prompts and queues the engine's requests, in a thread.

    Raises APIError if the request is not accepted, or the queue has no room for all of
    it. If this coroutine is cancelled, nothing stays in the engine.
    """
    _refuse_unsupported(wanted.body)
    _check_outputs(serving, served, wanted)
    serving.check_queue(wanted.outputs)
    work = _Work(serving, served, wanted)
    serving.count_encoding(wanted.outputs)
    future = asyncio.get_running_loop().run_in_executor(serving.pool, work.run)
    try:
        prompts = await asyncio.shield(future)
    except asyncio.CancelledError:  # the client went away: the thread goes on
        work.is_abandoned = True
        future.add_done_callback(work.cancel)
        raise
    except QueueFull:
        work.cancel()
        raise serving.queue_full() from None
    except EngineFailed as error:
        work.cancel()
        raise errors.failed(str(error)) from None
    except ConfigError as error:
        work.cancel()
        fields = type(wanted.body).model_fields
        raise errors.from_config(error, fields, wanted.names) from None
    except BaseException:
        work.cancel()
        raise
    return Generation(serving, prompts, work.requests)


class _Work:
    """What a thread does for one HTTP request.

    is_abandoned: whether nobody waits for it any more.
    """

    def __init__(self, serving: Serving, served: Served, wanted: Wanted) -> None:
        self._serving, self._served, self._wanted = serving, served, wanted
        self.requests: list[Request] = []
        self.is_abandoned = False

    def run(self) -> list[Prompt]:
        """Encodes the prompts, and queues their requests until it is abandoned."""
        wanted = self._wanted
        try:
            prompts = [] if self.is_abandoned else wanted.encode()
        finally:
            self._serving.count_encoding(-wanted.outputs)
        options = _engine_options(wanted)
        for prompt in prompts:
            options["max_tokens"] = self._max_tokens(prompt)
            for choice in range(wanted.choices):
                if self.is_abandoned:
                    return prompts
                seed = (options["seed"] + choice) % 2**32
                request = self._served.engine.submit(
                    prompt.ids, **options | dict(seed=seed)
                )
                self.requests.append(request)
        return prompts

    def cancel(self, future: asyncio.Future[Any] | None = None) -> None:
        """Ends the requests that are in the engine."""
        if future is not None and not future.cancelled():
            future.exception()  # nobody else asks for it
        for request in self.requests:
            request.cancel()

    def _max_tokens(self, prompt: Prompt) -> int:
        """Returns max_tokens. Raises APIError if the prompt is too long for it."""
        options, wanted = self._serving.options, self._wanted
        body, length = wanted.body, self._served.engine.length
        # A prompt that is scored may leave no room for output.
        most = length - (wanted.prompt_logprobs is None)
        most = min(options.max_prompt_tokens or most, most)
        if len(prompt.ids) > most:
            param = "messages" if "messages" in type(body).model_fields else "prompt"
            raise prompt_too_long(param, len(prompt.ids), most)
        room = length - len(prompt.ids)
        most = options.max_output_tokens or length
        asked = getattr(body, "max_completion_tokens", None)
        asked = body.max_tokens if asked is None else asked
        if asked is None:
            default = wanted.default_tokens
            return min(room, most, room if default is None else default)
        require(asked <= most, "max_tokens", asked, f"at most {most}")
        return asked


def _check_outputs(serving: Serving, served: Served, wanted: Wanted) -> None:
    """Raises APIError if a request has more outputs than it may."""
    most = min(serving.options.max_choices, served.engine.options.queue_size)
    if wanted.outputs > most:
        raise errors.invalid(
            "n" if wanted.choices > 1 else "prompt",
            f"{wanted.prompts} prompts with {wanted.choices} outputs each are not "
            f"accepted: a request may have at most {most} outputs",
        )


def prompt_too_long(param: str, tokens: int | str, most: int) -> errors.APIError:
    """Returns the error for a prompt of too many tokens."""
    return errors.invalid(
        param,
        f"{param} has {tokens} tokens, which is not accepted: it must have at most "
        f"{most}",
        "context_length_exceeded",
    )


def check_text_length(param: str, length: int, served: Served) -> None:
    """Raises APIError if a text is certainly too long, before it is encoded.

    length: its characters.
    """
    most = served.engine.length
    if length > most * served.longest_token:
        least = -(-length // served.longest_token)
        raise prompt_too_long(param, f"at least {least}", most - 1)


def _engine_options(wanted: Wanted) -> dict[str, Any]:
    """Returns the options of Engine.submit that a body asks for, but max_tokens.

    Temperature and top_p are 1 by default, as in OpenAI's API, and the seed is random.
    """
    body = wanted.body
    given = {
        name: value
        for name in (
            *("top_p", "min_p", "presence_penalty", "frequency_penalty"),
            *("repetition_penalty", "logit_bias", "priority", "stop", "min_tokens"),
            "speculate",
        )
        if (value := getattr(body, name)) is not None
    }
    ends = () if body.ignore_eos else wanted.end_ids
    return given | dict(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        seed=secrets.randbits(32) if body.seed is None else body.seed % 2**32,
        stop_token_ids=tuple(dict.fromkeys([*ends, *(body.stop_token_ids or ())])),
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
    )


def _refuse_unsupported(body: Generate) -> None:
    """Raises APIError for a field that is known, and not supported."""
    if body.stream_options is not None and not body.stream:
        raise errors.invalid(
            "stream_options", "stream_options is not accepted without stream=true"
        )
    form = body.response_format
    if form is not None and form.type != "text":
        raise errors.invalid(
            "response_format",
            f"response_format={form.type!r} is not supported: the only form is 'text'",
            "unsupported_value",
        )
