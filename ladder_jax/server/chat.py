"""/v1/chat/completions: answers conversations."""

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ladder_jax.config import ConfigError
from ladder_jax.serve.request import Token
from ladder_jax.server import errors, streaming
from ladder_jax.server.access import new_id
from ladder_jax.server.generation import Generation, Prompt
from ladder_jax.server.logprobs import ChatLogprobsWriter
from ladder_jax.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Message,
    Usage,
)
from ladder_jax.server.respond import respond
from ladder_jax.server.serving import Served, Serving
from ladder_jax.server.submission import Wanted, check_text_length

# OpenAI's newer name of a role -> that of chat templates.
ROLES = {"developer": "system"}
ACCEPTED_ROLES = ("system", "developer", "user", "assistant")
_TOOL_FIELDS = ("function_call", "tool_calls", "tool_call_id", "audio")


async def create(request: HTTPRequest) -> Response:
    """Answers POST /v1/chat/completions."""
    serving: Serving = request.app.state.serving
    body = await streaming.read(request, ChatRequest)
    served = serving.served(body.model)
    field = _check(body)

    wanted = Wanted(
        body,
        prompts=1,
        choices=body.n or 1,
        encode=lambda: [encode_messages(body.messages, served)],
        end_ids=served.chat_end_ids,
        default_tokens=None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        names=dict(max_tokens=field, logprobs="top_logprobs"),
    )
    writer = _Writer(body, served)
    return await respond(request, served, wanted, writer, bool(body.stream))


def _check(body: ChatRequest) -> str:
    """Raises APIError for fields that do not fit together.

    Returns the name under which the body has max_tokens.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise errors.invalid(
            "top_logprobs",
            f"top_logprobs={body.top_logprobs} is not accepted without logprobs=true",
        )
    newer = body.max_completion_tokens
    if None not in (newer, body.max_tokens) and newer != body.max_tokens:
        raise errors.invalid(
            "max_tokens",
            f"max_tokens={body.max_tokens} is not accepted: max_completion_tokens="
            f"{newer}, give one of the two",
        )
    return "max_tokens" if newer is None else "max_completion_tokens"


def encode_messages(messages: list[Message], served: Served) -> Prompt:
    """Returns the prompt of a conversation. Raises APIError if it is not accepted."""
    plain = [_message(message, i) for i, message in enumerate(messages)]
    length = sum(len(message["content"]) for message in plain)
    check_text_length("messages", length, served)
    try:
        return Prompt(served.chat.prompt(plain), None)
    except ConfigError as error:
        raise errors.invalid("messages", str(error), "invalid_value") from None


def _message(message: Message, index: int) -> dict[str, str]:
    """Returns a message as the chat template takes it."""
    where = f"messages[{index}]"
    if message.role not in ACCEPTED_ROLES:
        raise errors.invalid(
            "messages",
            f"{where}.role={message.role[:40]!r} is not accepted: it must be one of "
            f"{', '.join(ACCEPTED_ROLES)}",
            "invalid_value",
        )
    for name in _TOOL_FIELDS:
        if getattr(message, name):
            raise errors.invalid(
                "messages", f"{where}.{name} is not supported", "unsupported_value"
            )
    content = message.content
    if isinstance(content, list):
        for i, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise errors.invalid(
                    "messages",
                    f"{where}.content[{i}] is of type {part.type[:40]!r}, which is not "
                    "supported: it must be 'text', with a text",
                    "unsupported_value",
                )
        content = "".join(part.text or "" for part in content)
    if content is None:
        raise errors.invalid(
            "messages", f"{where}.content is missing", "missing_required_parameter"
        )
    plain = dict(role=ROLES.get(message.role, message.role), content=content)
    return plain if message.name is None else plain | dict(name=message.name)


class _Writer:
    """Writes the response to one body."""

    def __init__(self, body: ChatRequest, served: Served) -> None:
        self._body, self._served = body, served
        self._common: dict[str, Any] = dict(
            id=f"chatcmpl-{new_id()}",
            created=int(time.time()),
            model=served.name,
        )
        self._logprobs: dict[int, ChatLogprobsWriter] = {}
        self._begun: set[int] = set()  # choices whose role has been sent

    async def collect(self, running: Generation) -> ChatCompletion:
        """Returns the whole response, once all answers are complete."""
        tokens, finishes = await running.collect()
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(
                    role="assistant",
                    content="".join(token.text for token in tokens[index]),
                    refusal=None,
                ),
                logprobs=self._logprobs_of(running, index, tokens[index]),
                finish_reason=finishes[index],
            )
            for index in range(len(running.requests))
        ]
        return ChatCompletion(
            object="chat.completion",
            choices=choices,
            usage=Usage(**running.usage()),
            **self._common,
        )

    async def events(
        self, running: Generation, keep_alive: float
    ) -> AsyncIterator[bytes]:
        """Yields the events of a stream."""
        options = self._body.stream_options
        wants_usage = bool(options and options.include_usage)
        extra: dict[str, Any] = dict(usage=None) if wants_usage else {}
        events = streaming.Events(self._chunk(**extra))
        async for batches in running.batches(keep_alive):
            written: list[bytes] = []
            for index, tokens, finish in batches:
                text = "".join(token.text for token in tokens)
                delta = streaming.delta_json(text, index not in self._begun)
                self._begun.add(index)
                logprobs = self._logprobs_of(running, index, tokens)
                written.append(events.write(index, b"delta", delta, logprobs, finish))
            yield b"".join(written) or streaming.COMMENT
        if wants_usage:
            usage = Usage(**running.usage())
            yield streaming.event(self._chunk(usage=usage))

    def _chunk(self, **extra: Any) -> ChatChunk:
        """Returns an event without choices."""
        return ChatChunk(
            object="chat.completion.chunk", choices=[], **self._common, **extra
        )

    def _logprobs_of(
        self, running: Generation, index: int, tokens: list[Token]
    ) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        if index not in self._logprobs:
            self._logprobs[index] = ChatLogprobsWriter(
                self._served.tokenizer,
                running.prompt_of(index).ids,
                self._body.top_logprobs or 0,
            )
        return self._logprobs[index].write(tokens)
