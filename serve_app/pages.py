"""The page at `/`: the files of serve_app/web, under headers that let it load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import FastAPI, Request, Response

from cluster.errors import NotFound

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
INDEX = "index.html"
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """`/` and `/web/{file}` for the files that come with the package; others are NotFound."""
    found = {
        one.name: one.read_bytes()
        for one in (files("serve_app") / "web").iterdir()
        if one.is_file() and f".{one.name.rpartition('.')[2]}" in TYPES
    }

    def answer(request: Request, name: str) -> Response:
        if name not in found:
            raise NotFound(f"no file {name!r} belongs to the page")
        content = found[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {**HEADERS, "etag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=TYPES[f".{name.rpartition('.')[2]}"], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer(request, INDEX)

    @app.get("/web/{name}", include_in_schema=False)
    async def part(request: Request, name: str) -> Response:
        return answer(request, name)
