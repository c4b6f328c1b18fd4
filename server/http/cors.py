"""Cross-origin requests, for the origins a server is told to trust. Source: the Fetch standard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

from aiohttp import web
from aiohttp.typedefs import Middleware

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_METHODS = "GET, POST, DELETE, OPTIONS"
# Tells which parts of a request's schema are not enforced.
WARNING = "X-Nybble-Warning"
_EXPOSED = f"X-Request-Id, Retry-After, {WARNING}"
_PREFLIGHT_SECONDS = "600"


class Cors:
    """Tells browsers that pages from ``origins`` may read the answers; ``*`` is any page.

    Browsers are never allowed to add credentials (cookies) of their own: a page must know the key.
    """

    def __init__(self, origins: Collection[str]) -> None:
        """Raises ValueError for a value that is not an origin."""
        for origin in origins:
            scheme, separator, rest = origin.partition("://")
            if origin != "*" and not (scheme and separator and rest and "/" not in rest):
                raise ValueError(
                    f"--allowed-origins {origin!r} is not an origin: expected https://HOST[:PORT] "
                    "or *"
                )
        self.origins = frozenset(origin.lower() for origin in origins)

    def middleware(self) -> Middleware:
        """Answers preflights. It must run before keys are checked: a preflight has none."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method == "OPTIONS" and self._is_preflight(request):
                return web.Response(status=204)
            return await handler(request)

        return middleware

    async def send(self, request: web.Request, response: web.StreamResponse) -> None:
        """Adds the headers to a response, streams and errors among them."""
        if "*" not in self.origins:
            # Caches must not give one page what was meant for another.
            response.headers.add("Vary", "Origin")
        allowed = self._allowed(request)
        if allowed is None:
            return
        response.headers["Access-Control-Allow-Origin"] = allowed
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        if request.method == "OPTIONS" and self._is_preflight(request):
            wanted = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Allow-Methods"] = _METHODS
            response.headers["Access-Control-Allow-Headers"] = wanted or "Authorization"
            response.headers["Access-Control-Max-Age"] = _PREFLIGHT_SECONDS

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            "Access-Control-Request-Method" in request.headers
            and self._allowed(request) is not None
        )

    def _allowed(self, request: web.Request) -> str | None:
        origin = request.headers.get("Origin", "")
        if not origin:
            return None
        if "*" in self.origins:
            return "*"
        return origin if origin.lower() in self.origins else None
