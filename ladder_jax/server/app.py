"""The application: its paths, its errors and what stands before them."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from ladder_jax.serve.engine import Engine
from ladder_jax.server import (
    chat,
    completions,
    errors,
    metrics,
    openapi,
    page,
    protocol,
    texts,
)
from ladder_jax.server.access import MOST_PATH, ClientGone, Gate, Keys
from ladder_jax.server.feed import Feed
from ladder_jax.server.logs import LogWriter
from ladder_jax.server.serving import Options, Serving
from ladder_jax.server.state import state


def create_app(
    engine: Engine | None = None,
    options: Options | None = None,
    writer: LogWriter | None = None,
    *,
    on_startup: Callable[[], object] | None = None,
) -> FastAPI:
    """Returns the application. `app.state.serving` is its Serving.

    Args:
      engine: serves the requests; its thread is started with the application. None:
        the server is not ready until `app.state.serving.serve(engine)`.
      options: limits and settings.
      writer: of the log (default: to stderr).
      on_startup: is called once the event loop runs, before the port opens.
    Raises ConfigError if the engine has no tokenizer, or a chat template that is not
    valid.
    """
    options = options or Options()
    writer = writer or LogWriter()
    serving = Serving(options, writer)
    if engine is not None:
        serving.serve(engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if serving.engine is not None:
            serving.engine.start()
        if on_startup is not None:
            on_startup()
        yield
        serving.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="ladder_jax",
        summary="OpenAI's API over one engine of ladder_jax",
        redirect_slashes=False,  # a redirect repeats the client's Host header
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.serving = serving
    _add_paths(app)
    app.add_exception_handler(errors.APIError, _api_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_middleware(
        Gate,
        keys=Keys(options.api_keys),
        writer=writer,
        refused=serving.metrics.refused,
        write_timeout=options.write_timeout,
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


# Path, function, body, response, summary.
POSTS: list[tuple[str, Callable[..., Any], type, type, str]] = [
    (
        "/v1/completions",
        completions.create,
        protocol.CompletionRequest,
        protocol.Completion,
        "Continue texts",
    ),
    (
        "/v1/chat/completions",
        chat.create,
        protocol.ChatRequest,
        protocol.ChatCompletion,
        "Answer a conversation",
    ),
    (
        "/tokenize",
        texts.tokenize,
        protocol.TokenizeRequest,
        protocol.Tokens,
        "The ids of a text or a conversation",
    ),
    (
        "/detokenize",
        texts.detokenize,
        protocol.DetokenizeRequest,
        protocol.Detokenized,
        "The text of ids",
    ),
]


def _add_paths(app: FastAPI) -> None:
    for path, answer, body, response, summary in POSTS:
        app.add_api_route(
            path,
            answer,
            methods=["POST"],
            response_model=response,
            responses=openapi.ERRORS,
            openapi_extra=openapi.body(body),
            summary=summary,
        )
    status: dict[int | str, dict[str, Any]] = {
        503: dict(model=protocol.Health, description="Not now")
    }
    for path, endpoint, model, others in (
        ("/tokenizer_info", texts.info, protocol.TokenizerInfo, openapi.ERRORS),
        ("/v1/models", _models, protocol.ModelList, openapi.ERRORS),
        ("/v1/models/{model:path}", _model, protocol.ModelCard, openapi.ERRORS),
        ("/health", _health, protocol.Health, status),
        ("/ready", _ready, protocol.Health, status),
    ):
        app.add_api_route(path, endpoint, response_model=model, responses=others)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_api_route(
        "/metrics", _metrics, methods=["GET", "HEAD"], include_in_schema=False
    )
    app.include_router(page.router(Feed(lambda: state(app.state.serving))))
    openapi.install(app)


async def _models(request: HTTPRequest) -> protocol.ModelList:
    """The models that the server serves: one."""
    card = _card(request.app.state.serving)
    return protocol.ModelList(data=[card])


async def _model(request: HTTPRequest, model: str) -> protocol.ModelCard:
    """One model."""
    return _card(request.app.state.serving, model)


def _card(serving: Serving, model: str | None = None) -> protocol.ModelCard:
    served = serving.served(model)
    return protocol.ModelCard(
        id=served.name, created=served.created, max_model_len=served.engine.length
    )


async def _health(request: HTTPRequest) -> JSONResponse:
    """Whether the server lives: 503 only if it has failed."""
    lifecycle = request.app.state.serving.lifecycle
    return _status(lifecycle, lifecycle.status != "failed")


async def _ready(request: HTTPRequest) -> JSONResponse:
    """Whether the server takes requests: 503 while it starts, drains, or has failed."""
    lifecycle = request.app.state.serving.lifecycle
    return _status(lifecycle, lifecycle.status == "ready")


def _status(lifecycle: Any, good: bool) -> JSONResponse:
    body = dict(status=lifecycle.status, detail=lifecycle.detail)
    return JSONResponse(body, 200 if good else 503)


async def _metrics(request: HTTPRequest) -> Response:
    text = request.app.state.serving.metrics.text()
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


# ---------------------------------------------------------------- errors


async def _api_error(request: HTTPRequest, error: errors.APIError) -> Response:
    request.scope["state"]["log"]["error"] = error.code or error.type
    request.app.state.serving.metrics.refused(error)
    return error.response()


async def _http_error(request: HTTPRequest, error: HTTPException) -> Response:
    path = request.scope["path"][:MOST_PATH]  # request.url fails for a bad Host header
    message = f"{request.method} {path}: {error.detail}"
    headers = dict(error.headers or {})
    return errors.APIError(error.status_code, message, headers=headers).response()


async def _client_gone(request: HTTPRequest, error: Exception) -> Response:
    request.scope["state"]["log"]["error"] = "disconnected"
    return Response(status_code=499)  # nobody reads it
