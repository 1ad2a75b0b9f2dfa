"""The OpenAPI document: the bodies that the endpoints read by themselves."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ladder_jax.server.protocol import ErrorBody

_REFERENCE = "#/components/schemas/{model}"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: dict(model=ErrorBody, description=text)
    for status, text in {
        400: "A field is not accepted",
        401: "No valid API key",
        404: "No such model",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is not JSON",
        429: "Too many requests wait; see Retry-After",
        500: "The engine could not finish the request",
        503: "The server is not ready, or stops",
        504: "The request took too long",
    }.items()
}
_BODIES: dict[str, type[BaseModel]] = {}


def body(cls: type[BaseModel]) -> dict[str, Any]:
    """Returns what an endpoint's description needs to say that it reads a `cls`."""
    _BODIES[cls.__name__] = cls
    schema = {"$ref": _REFERENCE.format(model=cls.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"content": content, "required": True}}


def install(app: FastAPI) -> None:
    """Makes `app.openapi` describe the bodies, too."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                routes=app.routes,
            )
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for path in schema["paths"].values():
                for operation in path.values():
                    _finish(operation["responses"])
            for name, cls in _BODIES.items():
                own = cls.model_json_schema(ref_template=_REFERENCE)
                schemas |= own.pop("$defs", {})
                schemas[name] = own
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _finish(responses: dict[str, Any]) -> None:
    """Corrects what FastAPI says of an endpoint's responses."""
    responses.pop("422", None)  # this server answers 400
    content = responses["200"]["content"]
    schema = content["application/json"]["schema"].get("$ref", "")
    if schema.endswith("Completion"):
        content["text/event-stream"] = {}  # with stream=true
