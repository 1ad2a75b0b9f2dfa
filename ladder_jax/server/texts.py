"""/tokenize, /detokenize and /tokenizer_info."""

import asyncio

from starlette.requests import Request as HTTPRequest

from ladder_jax.config import ConfigError
from ladder_jax.server import errors, streaming
from ladder_jax.server.chat import encode_messages
from ladder_jax.server.logprobs import TokenTexts
from ladder_jax.server.protocol import (
    Detokenized,
    DetokenizeRequest,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)
from ladder_jax.server.serving import Served, Serving
from ladder_jax.server.submission import check_text_length


async def tokenize(request: HTTPRequest) -> Tokens:
    """Answers POST /tokenize."""
    serving: Serving = request.app.state.serving
    body = await streaming.read(request, TokenizeRequest)
    served = serving.served(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise errors.invalid("prompt", "give either prompt or messages")
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(serving.pool, _tokenize, body, served)


def _tokenize(body: TokenizeRequest, served: Served) -> Tokens:
    if body.messages is not None:
        ids = encode_messages(body.messages, served).ids
    else:
        assert body.prompt is not None
        check_text_length("prompt", len(body.prompt), served)
        try:
            ids = served.tokenizer.prompt(body.prompt, body.add_special_tokens)
        except ConfigError as error:
            raise errors.invalid("prompt", str(error)) from None
    names: list[str] | None = None
    if body.return_token_strs:
        texts, names = TokenTexts(served.tokenizer), []
        for token in ids:
            names.append(texts.text(token))
            texts.advance(token)
    length = served.engine.length
    return Tokens(count=len(ids), max_model_len=length, tokens=ids, token_strs=names)


async def detokenize(request: HTTPRequest) -> Detokenized:
    """Answers POST /detokenize."""
    serving: Serving = request.app.state.serving
    body = await streaming.read(request, DetokenizeRequest)
    served = serving.served(body.model)
    size = served.tokenizer.size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise errors.invalid(
            "tokens", f"tokens has {wrong}, which is not an id from 0 to {size - 1}"
        )
    loop = asyncio.get_running_loop()
    text = await loop.run_in_executor(
        serving.pool, served.tokenizer.decode, body.tokens
    )
    return Detokenized(prompt=text)


async def info(request: HTTPRequest) -> TokenizerInfo:
    """Answers GET /tokenizer_info."""
    served = request.app.state.serving.served()
    names = served.tokenizer.special.names
    return TokenizerInfo(
        bos_token=names.get("bos"),
        eos_token=names["eos"],
        pad_token=names.get("pad"),
        chat_template=served.chat.template.source,
    )
