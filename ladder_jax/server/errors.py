"""Errors of the API, in OpenAI's format: {"error": {message, type, param, code}}."""

import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from ladder_jax.config import ConfigError, short_repr

INVALID = "invalid_request_error"
SERVER = "server_error"
_MOST_MESSAGE = 500  # characters of a message: it may quote what a client sent


class APIError(Exception):
    """Ends a request with an HTTP status and a body in OpenAI's format.

    Args:
      status: the HTTP status.
      message: one line, for the client.
      type: OpenAI's kind of error.
      param: the field of the request that is wrong, or None.
      code: a name for programs, or None.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message[:_MOST_MESSAGE], type
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, Any]:
        """Returns the body of the response."""
        error = dict(
            message=self.message, type=self.type, param=self.param, code=self.code
        )
        return {"error": error}

    def response(self) -> JSONResponse:
        """Returns the whole response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def invalid(param: str | None, message: str, code: str | None = None) -> APIError:
    """Returns the error for a field that is not accepted, status 400."""
    return APIError(400, message, param=param, code=code)


def queue_full(retry_after: int) -> APIError:
    """Returns the error for a request that the queue has no room for, status 429."""
    return APIError(
        429,
        f"too many requests wait already: try again in {retry_after} s",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def unavailable(reason: str, retry_after: int = 1) -> APIError:
    """Returns the error of a server that takes no requests now, status 503."""
    return APIError(
        503,
        reason,
        type=SERVER,
        code="unavailable",
        headers={"Retry-After": str(retry_after)},
    )


def timed_out(seconds: float) -> APIError:
    """Returns the error for a request that took too long, status 504."""
    message = f"the request did not finish within {seconds:g} s"
    return APIError(504, message, type=SERVER, code="timeout")


def failed(reason: str) -> APIError:
    """Returns the error for a request that the engine could not finish, status 500."""
    return APIError(500, reason, type=SERVER, code="engine_error")


def from_validation(error: ValidationError) -> APIError:
    """Returns the error for the first field that pydantic does not accept."""
    problems = error.errors(include_url=False, include_context=False)
    problem = problems[0]
    if problem["type"] == "json_invalid":
        reason = problem["msg"].removeprefix("Invalid JSON: ")
        return invalid(None, f"the body is not JSON: {reason}", "invalid_json")
    if not problem["loc"]:
        return invalid(None, "the body must be a JSON object")
    param = str(problem["loc"][0])
    same = [other for other in problems if other["loc"][0] == param]
    if problem["type"] == "missing":
        message = f"missing required parameter: '{_path(problem['loc'])}'"
        return invalid(param, message, "missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        name = _path(problem["loc"])
        return invalid(name, f"unknown parameter: '{name}'", "unknown_parameter")
    name = _path(_beginning([other["loc"] for other in same]))
    value = short_repr(problem["input"])
    reason = ", or ".join(list(dict.fromkeys(map(_reason, same)))[:3])
    return invalid(param, f"{name}={value} is not accepted: {reason}", "invalid_value")


def _reason(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    return message.removeprefix("Input ")


def _beginning(locations: list[tuple[int | str, ...]]) -> tuple[int | str, ...]:
    """Returns the part that all places in a body begin with."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*locations))
    return tuple(parts[0] for parts in same)


def _path(location: tuple[int | str, ...]) -> str:
    """Returns a place in a body as text, such as messages[0].role."""
    text = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part.islower():  # others are names of types
            text += f".{part}"
    return text


def from_config(
    error: ConfigError, fields: Collection[str], names: Mapping[str, str]
) -> APIError:
    """Returns the error for an option that the engine does not accept.

    The message of a ConfigError begins with the option.

    Args:
      error: the engine's.
      fields: those of the request.
      names: {option of the engine: field}, where they differ.
    """
    message = " ".join(str(error).split())
    match = re.match(r"\w+", message)
    option = match[0] if match else ""
    param = names.get(option, option)
    if param not in fields:
        return invalid(None, message, "invalid_value")
    return invalid(param, param + message[len(option) :], "invalid_value")
