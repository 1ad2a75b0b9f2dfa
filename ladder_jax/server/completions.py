"""/v1/completions: continues texts."""

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ladder_jax.config import ConfigError
from ladder_jax.serve.request import Token
from ladder_jax.server import errors, streaming
from ladder_jax.server.access import new_id
from ladder_jax.server.generation import Finish, Generation, Prompt
from ladder_jax.server.logprobs import CompletionLogprobsWriter, prompt_tokens
from ladder_jax.server.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from ladder_jax.server.respond import respond
from ladder_jax.server.serving import Served, Serving
from ladder_jax.server.submission import Wanted, check_text_length

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def create(request: HTTPRequest) -> Response:
    """Answers POST /v1/completions."""
    serving: Serving = request.app.state.serving
    body = await streaming.read(request, CompletionRequest)
    served = serving.served(body.model)
    _check(body)

    given = _prompts(body)
    wanted = Wanted(
        body,
        prompts=len(given),
        choices=body.best_of or body.n or 1,
        encode=lambda: [encode_prompt(prompt, served) for prompt in given],
        end_ids=() if _shows_stop(body) else served.tokenizer.eos_ids,
        default_tokens=DEFAULT_MAX_TOKENS,
        logprobs=_engine_logprobs(body),
        prompt_logprobs=_prompt_logprobs(body),
        names=dict(prompt_logprobs="logprobs"),
    )
    writer = _Writer(body, served)
    return await respond(request, served, wanted, writer, bool(body.stream))


def _check(body: CompletionRequest) -> None:
    """Raises APIError for fields that do not fit together."""
    n, best_of = body.n or 1, body.best_of
    if body.suffix:
        raise errors.invalid(
            "suffix", "suffix is not supported: leave it out", "unsupported_parameter"
        )
    if best_of is not None and best_of < n:
        raise errors.invalid(
            "best_of", f"best_of={best_of} is not accepted: it must be n={n} or more"
        )
    if best_of is not None and best_of > n and body.stream:
        raise errors.invalid(
            "best_of",
            f"best_of={best_of} is not accepted with stream=true: it must be n={n}",
        )


def _engine_logprobs(body: CompletionRequest) -> int | None:
    """Returns the engine's option logprobs; best_of needs those of the tokens."""
    if body.logprobs is None and (body.best_of or 1) > (body.n or 1):
        return 0
    return body.logprobs


def _prompt_logprobs(body: CompletionRequest) -> int | None:
    """Returns the engine's option prompt_logprobs: echo returns those of the prompt.

    The engine accepts max_tokens=0 for a prompt that is scored.
    """
    if not body.echo:
        return None
    return 0 if body.logprobs is None and body.max_tokens == 0 else body.logprobs


def _shows_stop(body: CompletionRequest) -> bool:
    """Whether the token that ends the output is shown in its log-probabilities.

    lm-eval sends echo, logprobs and max_tokens=1 to score a prompt, and leaves out the
    last token of the response: there must be one.
    """
    return bool(body.echo and body.logprobs is not None and body.max_tokens == 1)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Returns the prompts of a body. Raises APIError if there is none, or it is []."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given or not all(len(p) for p in given if not isinstance(p, str)):
        raise errors.invalid(
            "prompt", "prompt=[] is not accepted: it must be text or ids"
        )
    return given


def encode_prompt(prompt: str | list[int], served: Served) -> Prompt:
    """Returns a prompt as ids. Raises APIError if it is not accepted."""
    if not isinstance(prompt, str):
        return Prompt(prompt, None)
    check_text_length("prompt", len(prompt), served)
    try:
        return Prompt(served.tokenizer.prompt(prompt), prompt)
    except ConfigError as error:
        raise errors.invalid("prompt", str(error)) from None


class _Writer:
    """Writes the response to one body."""

    def __init__(self, body: CompletionRequest, served: Served) -> None:
        self._body, self._served = body, served
        self._id = f"cmpl-{new_id()}"
        self._created = int(time.time())
        self._logprobs: dict[int, CompletionLogprobsWriter] = {}
        self._echoed: set[int] = set()  # outputs whose prompt has been written

    def usage(self, running: Generation) -> Usage:
        """Returns the counts of tokens so far."""
        return Usage(**running.usage())

    async def collect(self, running: Generation) -> Completion:
        """Returns the whole response, once all outputs are complete."""
        tokens, finishes = await running.collect()
        choices: list[CompletionChoice] = []
        for index in self._best(running, tokens):
            text, logprobs, finish = self._added(
                running, index, tokens[index], finishes[index]
            )
            choice = CompletionChoice(
                index=len(choices), text=text, logprobs=logprobs, finish_reason=finish
            )
            choices.append(choice)
        return self._completion(choices, usage=self.usage(running))

    def _best(self, running: Generation, tokens: list[list[Token]]) -> list[int]:
        """Returns the numbers of the outputs to return: of each prompt the n best."""
        n = self._body.n or 1
        if n == running.choices:
            return list(range(len(running.requests)))
        best: list[int] = []
        for first in range(0, len(running.requests), running.choices):
            outputs = range(first, first + running.choices)
            best += sorted(outputs, key=lambda i: -_score(tokens[i]))[:n]
        return best

    async def events(
        self, running: Generation, keep_alive: float
    ) -> AsyncIterator[bytes]:
        """Yields the events of a stream."""
        options = self._body.stream_options
        wants_usage = bool(options and options.include_usage)
        extra: dict[str, Any] = dict(usage=None) if wants_usage else {}
        events = streaming.Events(self._completion([], **extra))
        async for batches in running.batches(keep_alive):
            written: list[bytes] = []
            for index, tokens, finish in batches:
                text, logprobs, end = self._added(running, index, tokens, finish)
                content = streaming.text_json(text)
                written.append(events.write(index, b"text", content, logprobs, end))
            yield b"".join(written) or streaming.COMMENT
        if wants_usage:
            yield streaming.event(self._completion([], usage=self.usage(running)))

    def _completion(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._served.name,
            choices=choices,
            **fields,
        )

    def _added(
        self, running: Generation, index: int, tokens: list[Token], finish: Finish
    ) -> tuple[str, CompletionLogprobs | None, Finish]:
        """Returns what `tokens` add to output number `index`, and its finish."""
        text = "".join(token.text for token in tokens)
        echo = ""
        if self._body.echo and index not in self._echoed:
            self._echoed.add(index)
            echo = self._prompt_text(running.prompt_of(index))
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._write_logprobs(running, index, echo, tokens)
        if finish == "length" and _shows_stop(self._body) and tokens:
            is_stop = tokens[-1].id in self._served.tokenizer.eos_ids
            finish = "stop" if is_stop and not self._body.ignore_eos else finish
        return echo + text, logprobs, finish

    def _prompt_text(self, prompt: Prompt) -> str:
        """Returns the text of a prompt that is echoed.

        A character that its ids do not complete is left to the output.
        """
        if prompt.text is not None:
            return prompt.text
        return "".join(map(self._served.tokenizer.stream().push, prompt.ids))

    def _write_logprobs(
        self, running: Generation, index: int, echo: str, tokens: list[Token]
    ) -> CompletionLogprobs:
        """Returns the log-probabilities of the prompt, if it is echoed, and tokens."""
        writer = self._logprobs.get(index)
        if writer is None:
            tokenizer, count = self._served.tokenizer, self._body.logprobs or 0
            writer = CompletionLogprobsWriter(tokenizer, count)
            self._logprobs[index] = writer
            request = running.requests[index]
            if self._body.echo:
                tokens = [*prompt_tokens(request, tokenizer, echo), *tokens]
            else:
                writer.skip(request.prompt.tolist())
        return writer.write(tokens)


def _score(tokens: list[Token]) -> float:
    """Returns the mean log-probability of an output's tokens."""
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
