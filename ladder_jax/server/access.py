"""What stands before every endpoint: request ids, API keys, headers, the access log."""

import asyncio
import hashlib
import hmac
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ladder_jax.config import ConfigError
from ladder_jax.server import errors
from ladder_jax.server.logs import LogWriter

log = logging.getLogger(__name__)
# Under these names, the scope has functions: one that drops the connection at once, and
# one that returns whether `send` waits for the client.
ABORT, IS_PAUSED = "ladder_jax.abort", "ladder_jax.is_paused"
KEYS_VARIABLE = "LADDER_JAX_API_KEYS"
# Paths that need no key: they neither read nor write text.
PUBLIC = frozenset({"/", "/health", "/ready", "/metrics", "/state", "/openapi.json"})
PUBLIC_PREFIX = "/static/"
# Probes ask for these every few seconds: they are not logged.
PROBES = frozenset({"/health", "/ready", "/metrics"})
MOST_PATH = 200  # characters of a path that are logged
PIECE = 2**16  # bytes of a response that are sent at once
_random = random.Random()
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": (
        "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'none'; object-src 'none'"
    ),
    "cache-control": "no-store",
}
_HEADERS = [(name.encode(), text.encode()) for name, text in SECURITY_HEADERS.items()]


class ClientGone(Exception):
    """The client closed the connection before the response was complete."""


class Keys:
    """The API keys. Comparison takes the same time for all keys that are wrong."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, authorization: str) -> bool:
        """Whether a header `Authorization: Bearer KEY` has one of the keys."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        found = False
        for known in self._digests:  # all of them, so that the time does not depend
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: str | None) -> tuple[str, ...]:
    """Returns the keys of a file, one a line, and of LADDER_JAX_API_KEYS (commas).

    Lines that begin with # are comments. Raises ConfigError if the file cannot be read
    or has no key, or if no HTTP header can carry one.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    _check_keys(keys, f"{KEYS_VARIABLE}: key")
    if path is not None:
        try:
            # utf-8-sig: editors of Windows put a mark before the first key.
            lines = Path(path).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(
                f"api_key_file={path!r} is not accepted ({reason}): it must be a text "
                "file with one key a line"
            ) from None
        found = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(found):
            raise ConfigError(f"api_key_file={path!r} has no key: put one on each line")
        _check_keys(found, f"api_key_file={path!r}: key")
        keys += found
    return tuple(dict.fromkeys(key for key in keys if key))


def _check_keys(keys: list[str], where: str) -> None:
    """Raises ConfigError for a key that clients cannot send; it does not show it."""
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and (key.isprintable() or not key)):
            raise ConfigError(
                f"{where} {number} is not accepted: it must be of ASCII letters, "
                "digits and marks, as HTTP headers are"
            )


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Returns the client's X-Request-Id if it is a plain word, else a new one."""
    for name, value in headers:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return text
    return new_id()


def new_id() -> str:
    """Returns 32 hexadecimal digits that nobody has had.

    It makes no system call, unlike uuid4: each one may cost the event loop the GIL.
    """
    return f"{_random.getrandbits(128):032x}"


class Gate:
    """ASGI middleware: gives every request an id, checks its key, and logs it.

    It adds the security headers to every response, and drops clients that do not read
    theirs. An exception of the application becomes a 500 in OpenAI's format.

    Args:
      app: the application.
      keys: the API keys; none: every client is accepted.
      writer: gets a line about every request.
      refused: counts a request without a key.
      write_timeout: seconds until a client must have read something.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        writer: LogWriter,
        refused: Callable[[errors.APIError], object],
        write_timeout: float,
    ) -> None:
        self._app, self._keys, self._writer = app, keys, writer
        self._refused, self._write_timeout = refused, write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = id = request_id(scope["headers"])
        fields: dict[str, Any] = {}
        state["log"] = fields
        status = 0
        is_paused = scope.get("extensions", {}).get(IS_PAUSED, _may_wait)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                headers = message["headers"] = list(headers)
                there = {name for name, _ in headers}
                headers.append((b"x-request-id", id.encode("ascii")))
                headers += [pair for pair in _HEADERS if pair[0] not in there]
            try:
                for piece in _pieces(message):
                    if is_paused():
                        async with asyncio.timeout(self._write_timeout):
                            await send(piece)
                    else:  # a timeout would cost more than an event
                        await send(piece)
            except TimeoutError:
                fields["error"] = "slow_reader"
                if abort := scope.get("extensions", {}).get(ABORT):
                    abort()
                raise ClientGone from None

        try:
            if self._refuses(scope):
                error = _unauthorized()
                self._refused(error)
                await error.response()(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except Exception as raised:
            if fields.get("error") == "slow_reader":
                return
            log.exception("request %s failed", id)
            if status:  # the response has begun: uvicorn closes the connection
                raise
            reason = f"{type(raised).__name__} in the server, see its log"
            response = errors.failed(reason).response()
            await response(scope, receive, send_with_headers)
        finally:
            if scope["path"] not in PROBES:
                client = scope.get("client")
                self._writer.write(
                    "request",
                    id=id,
                    client=client[0] if client else None,
                    method=scope["method"],
                    path=scope["path"][:MOST_PATH],
                    status=status,
                    seconds=round(time.perf_counter() - started, 6),
                    **fields,
                )

    def _refuses(self, scope: Scope) -> bool:
        """Whether a request lacks the key that it needs."""
        path = scope["path"]
        if not self._keys or path in PUBLIC or path.startswith(PUBLIC_PREFIX):
            return False
        if scope["method"] == "OPTIONS":  # CORS: browsers ask without a key
            return False
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(values) != 1 or not self._keys.accepts(values[0].decode("latin-1"))


def _may_wait() -> bool:
    """Whether `send` waits, of a server that does not say."""
    return True


def _pieces(message: Message) -> Iterable[Message]:
    """Splits a long body: uvicorn waits for the client between two messages alone."""
    if len(message.get("body", b"")) <= PIECE:
        return (message,)
    return _split(message)


def _split(message: Message) -> Iterator[Message]:
    body = message["body"]
    for start in range(0, len(body), PIECE):
        is_last = start + PIECE >= len(body)
        yield {
            "type": message["type"],
            "body": body[start : start + PIECE],
            "more_body": message.get("more_body", False) or not is_last,
        }


def _unauthorized() -> errors.APIError:
    return errors.APIError(
        401,
        "no valid API key: send the header Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
