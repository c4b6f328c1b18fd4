"""The page at ``/``: static files, read once, behind a strict Content-Security-Policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Only scripts, styles and requests of this server; text is never parsed as HTML.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Browsers ask each time and get 304 if nothing changed, so an upgrade is seen at once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    content_type: str
    etag: str


class Console:
    """The page's files. They need no key, because nothing in them is secret; their requests do."""

    def __init__(self, root_path: str = "") -> None:
        """root_path: a proxy's ``/prefix``, which requests may still have."""
        self._root_path = root_path
        self._files = {}
        for path in Path(__file__).parent.iterdir():
            if path.suffix in _TYPES:
                body = path.read_bytes()
                etag = hashlib.sha256(body).hexdigest()[:32]
                self._files[path.name] = _File(body, _TYPES[path.suffix], etag)

    def routes(self) -> list[web.RouteDef]:
        routes = [web.get("/", self.index), web.get("/console/{name}", self.file)]
        if self._root_path:
            routes.append(web.get(self._root_path, self.below_prefix))
        return routes

    async def below_prefix(self, _: web.Request) -> web.Response:
        """The page's links are relative: they need the slash at the end of its address."""
        headers = {"Location": f"{self._root_path}/"}
        return web.Response(status=308, headers=headers)

    async def index(self, request: web.Request) -> web.Response:
        return self._response(request, self._files["index.html"])

    async def file(self, request: web.Request) -> web.Response:
        file = self._files.get(request.match_info["name"])
        if file is None:
            raise web.HTTPNotFound
        return self._response(request, file)

    def _response(self, request: web.Request, file: _File) -> web.Response:
        asked = {tag.value for tag in request.if_none_match or ()}
        if asked & {file.etag, "*"}:
            response = web.Response(status=304, headers=_HEADERS)
        else:
            response = web.Response(
                body=file.body,
                content_type=file.content_type,
                charset="utf-8",
                headers=_HEADERS,
            )
        response.etag = file.etag
        return response
