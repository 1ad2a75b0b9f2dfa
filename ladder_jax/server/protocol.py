"""The bodies of requests and responses, as OpenAI's API has them.

A request may have no other fields than these: like OpenAI's server, this one answers
with an error that names the field. `null` is the same as no value.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field


class OneError(FailFast):
    """A list is not checked further after its first wrong item: a body of a million of
    them must not become a million errors."""

    __hash__ = object.__hash__  # unions of Annotated types need it


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], OneError()]
MOST_STOPS, MOST_STOP_LENGTH = 16, 256
MOST_CHOICES = 128


class RequestBody(BaseModel):
    """A body that accepts its own fields alone, of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ResponseBody(BaseModel):
    """A body that the server writes."""

    model_config = ConfigDict(extra="forbid")


# ---------------------------------------------------------------- requests


class StreamOptions(RequestBody):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send the usage counts in a last event."""
    include_obfuscation: bool | None = None
    """Accepted; this server adds no padding to events."""


class ResponseFormat(RequestBody):
    """The form of an answer: text, and no other."""

    type: str
    json_schema: Any = None


StopString = Annotated[str, Field(min_length=1, max_length=MOST_STOP_LENGTH)]


class Generate(RequestBody):
    """The fields that completions and chat completions share."""

    model: str | None = None
    """The model's name, see /v1/models."""
    stream: bool | None = None
    """Send server-sent events while the output grows."""
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """No stop token ends the output before it has so many tokens."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 or -1: all tokens."""
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    logit_bias: (
        dict[
            Annotated[str, Field(pattern="^[0-9]{1,10}$")],
            Annotated[float, Field(ge=-100, le=100)],
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=MOST_STOPS), OneError()]
        | None
    ) = None
    stop_token_ids: Ids | None = None
    """Ids that end the output, beside those that always do."""
    ignore_eos: bool | None = None
    """The tokens that end a generation do not end this one."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    """Requests with a higher one leave the queue first."""
    speculate: bool | None = None
    """false: draft no tokens of this output, if the server does (--speculate)."""
    response_format: ResponseFormat | None = None
    # Of OpenAI's API, without an effect here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Generate):
    """The body of /v1/completions."""

    prompt: (
        str | Ids | Annotated[list[str], OneError()] | Annotated[list[Ids], OneError()]
    )
    """Text or token ids, or a list of either."""
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Generate so many outputs, and return the n with the highest log-probability per
    token."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    """Return the log-probabilities of tokens, and of so many likeliest ones."""
    echo: bool | None = None
    """Return the prompt before the output."""
    suffix: str | None = None
    """Not supported."""


class ContentPart(RequestBody):
    """A part of a message: text, and no other."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class Message(RequestBody):
    """A message of a conversation."""

    role: str
    content: str | Annotated[list[ContentPart], OneError()] | None = None
    name: str | None = None
    # Of answers of the API, which clients send back.
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    reasoning_content: str | None = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: str | None = None


class ChatRequest(Generate):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1), OneError()]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Return the log-probabilities of tokens."""
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    """Return those of so many likeliest tokens, too."""
    # Without an effect here; other values are refused.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None


class TokenizeRequest(RequestBody):
    """The body of /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), OneError()] | None = None
    add_special_tokens: bool | None = None
    """Whether a prompt gets a begin token. Default: as in completions."""
    return_token_strs: bool | None = None
    """Return the text of each token, too."""


class DetokenizeRequest(RequestBody):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Ids


# ---------------------------------------------------------------- responses


class ErrorDetails(ResponseBody):
    """What was wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseBody):
    """An error."""

    error: ErrorDetails


class Usage(ResponseBody):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(ResponseBody):
    """Log-probabilities of a completion: lists with one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseBody):
    """One output of a completion, or what has been added to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(ResponseBody):
    """A completion, or an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(ResponseBody):
    """The log-probability of a token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """The log-probability of a token of an answer, and those of the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(ResponseBody):
    """Log-probabilities of an answer: one entry a token."""

    content: list[ContentLogprob]
    refusal: None = None


class AssistantMessage(ResponseBody):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseBody):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(ResponseBody):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(ResponseBody):
    """What has been added to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ResponseBody):
    """What has been added to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(ResponseBody):
    """An event of a stream of answers."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(ResponseBody):
    """A model that the server serves."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ladder_jax"
    max_model_len: int


class ModelList(ResponseBody):
    """All models that the server serves."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(ResponseBody):
    """The ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokenizerInfo(ResponseBody):
    """What clients need to know of the tokenizer, beside /tokenize."""

    bos_token: str | None
    eos_token: str
    pad_token: str | None
    chat_template: str


class Detokenized(ResponseBody):
    """The text of ids."""

    prompt: str


class Health(ResponseBody):
    """The state of the server."""

    status: Literal["starting", "ready", "draining", "failed"]
    detail: str | None = None
