"""Log-probabilities of tokens, in the shapes of both APIs."""

import math
from collections.abc import Sequence

from ladder_jax.data.tokenizer import Tokenizer
from ladder_jax.serve.request import Request, Token
from ladder_jax.server.protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    TokenLogprob,
)

LEAST = -9999.0  # JSON has no -inf
# Of the tokens before one, only the last that stands for text changes its text.
_CONTEXT = 64


class TokenTexts:
    """The texts of tokens one after the other: what each adds to a text.

    A special token has its name; bytes that are no whole character are written as
    `bytes:\\xe2\\x82`, as OpenAI does.

    Args:
      tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._previous: int | None = None

    def skip(self, tokens: Sequence[int]) -> None:
        """The next token follows `tokens`."""
        for token in tokens[-_CONTEXT:]:
            self.advance(token)

    def advance(self, token: int) -> None:
        """The next token follows `token`."""
        if self._tokenizer.token_bytes(token, self._previous) is not None:
            self._previous = token

    def data(self, token: int) -> bytes:
        """Returns the bytes of a token that may come next."""
        data = self._tokenizer.token_bytes(token, self._previous)
        if data is None:
            return (self._tokenizer.token_name(token) or "").encode()
        return data

    def text(self, token: int) -> str:
        """Returns the text of a token that may come next."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """Returns a log-probability that JSON can write."""
    return logprob if math.isfinite(logprob) else LEAST


class CompletionLogprobsWriter:
    """Writes the log-probabilities of one output of a completion.

    Args:
      tokenizer: of the tokens.
      count: how many likeliest tokens to write.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._texts, self._count = TokenTexts(tokenizer), count
        self._offset = 0  # characters of the text so far
        # The first token of `write` follows those of `skip`.
        self.skip = self._texts.skip

    def write(self, tokens: Sequence[Token]) -> CompletionLogprobs:
        """Returns those of the next tokens."""
        written = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
        )
        for token in tokens:
            if token.id is not None:
                self._write(written, token)
            self._offset += len(token.text)
        return written

    def _write(self, written: CompletionLogprobs, token: Token) -> None:
        assert token.id is not None and written.top_logprobs is not None
        written.tokens.append(self._texts.text(token.id))
        written.text_offset.append(self._offset)
        logprob = None if token.logprob is None else finite(token.logprob)
        written.token_logprobs.append(logprob)
        if logprob is None:
            written.top_logprobs.append(None)
        else:
            # Two tokens may have the same text: the likelier one stays. The token
            # itself is always there, as in OpenAI's API.
            top = [*token.top[: self._count], (token.id, logprob)]
            texts: dict[str, float] = {}
            for id, value in top:
                texts.setdefault(self._texts.text(id), finite(value))
            written.top_logprobs.append(texts)
        self._texts.advance(token.id)


class ChatLogprobsWriter:
    """Writes the log-probabilities of one answer.

    Args:
      tokenizer: of the tokens.
      prompt: the ids before the answer.
      count: how many likeliest tokens to write.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], count: int) -> None:
        self._texts, self._count = TokenTexts(tokenizer), count
        self._texts.skip(prompt)

    def write(self, tokens: Sequence[Token]) -> ChatLogprobs:
        """Returns those of the next tokens."""
        content: list[ContentLogprob] = []
        for token in tokens:
            if token.id is None or token.logprob is None:
                continue
            top = [self._one(*pair) for pair in token.top[: self._count]]
            own = self._one(token.id, token.logprob)
            content.append(
                ContentLogprob(
                    token=own.token,
                    logprob=own.logprob,
                    bytes=own.bytes,
                    top_logprobs=top,
                )
            )
            self._texts.advance(token.id)
        return ChatLogprobs(content=content, refusal=None)

    def _one(self, id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(
            token=self._texts.text(id),
            logprob=finite(logprob),
            bytes=list(self._texts.data(id)),
        )


def prompt_tokens(request: Request, tokenizer: Tokenizer, text: str) -> list[Token]:
    """Returns the tokens of a scored prompt, as those of an output.

    text: the prompt's text; its tokens have no other. Where the tokenizer has changed
    it, some of them begin where it ends.
    """
    stream = tokenizer.stream()
    tokens: list[Token] = []
    rest = len(text)
    for token, score in zip(request.prompt.tolist(), request.prompt_logprobs):
        logprob, top = score or (None, ())
        added = stream.push(token)[:rest]
        rest -= len(added)
        tokens.append(Token(token, added, logprob, top))
    if rest and tokens:
        last = tokens[-1]
        tokens[-1] = last._replace(text=last.text + text[-rest:])
    return tokens
