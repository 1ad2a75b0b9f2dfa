"""The page at `/`: slots, queue and latencies live, and a box to try a prompt.

The page is plain HTML, CSS and JavaScript in static/, and loads nothing from elsewhere.
"""

import hashlib
from importlib import resources

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response, StreamingResponse

from ladder_jax.server.feed import Feed

TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Beside the headers that access.Gate gives every response.
HEADERS = {
    # Scripts, styles and connections of this server alone, nothing written inline.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # a browser asks whether its copy is the newest
}
NO_STORE = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx passes each event on at once
}
EVENTS = "text/event-stream"


def router(feed: Feed) -> APIRouter:
    """Returns the routes of the page and of the state that it shows."""
    files = load_files()
    routes = APIRouter()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def page(request: Request) -> Response:
        return files["index.html"].response(request)

    @routes.api_route(
        "/static/{name}", methods=["GET", "HEAD"], include_in_schema=False
    )
    def static(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        return files[name].response(request)

    @routes.get("/state", include_in_schema=False)
    async def state(request: Request) -> Response:
        if EVENTS in request.headers.get("accept", ""):
            return StreamingResponse(feed.watch(), media_type=EVENTS, headers=NO_STORE)
        sample = await feed.newest()
        return Response(sample.body, media_type="application/json", headers=NO_STORE)

    return routes


class File:
    """One file of the page, in memory.

    Args:
      name: its name, which tells its type.
      body: its bytes.
    """

    def __init__(self, name: str, body: bytes) -> None:
        self.body, self.type = body, TYPES[name.rpartition(".")[2]]
        self.tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'

    def response(self, request: Request) -> Response:
        """Returns the file, or status 304 if the browser has it."""
        headers = {**HEADERS, "ETag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.type, headers=headers)


def load_files() -> dict[str, File]:
    """Returns the files of static/ by their names."""
    folder = resources.files(__package__).joinpath("static")
    return {
        path.name: File(path.name, path.read_bytes())
        for path in folder.iterdir()
        if path.name.rpartition(".")[2] in TYPES
    }
