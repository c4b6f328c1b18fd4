"""Keeps web pages from using a server without keys through the browser of the user who runs it.

Any page may send what a form can send (``text/plain``, forms, no type) to ``http://localhost:8000``
without asking first. It cannot read the answer, but the work is done. So a body must be declared as
JSON, for which browsers ask first (a preflight, see :mod:`nybble.server.http.cors`). A server
without keys also refuses pages of other origins.

A page may also make its own host name resolve to 127.0.0.1 after it is loaded (DNS rebinding). The
browser then considers both the same origin. So on a loopback address a server without keys answers
only to known names of its own, and to IP addresses, which cannot be rebound.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection
from ipaddress import ip_address

from aiohttp import web
from aiohttp.typedefs import Middleware

from nybble.server.http.errors import ApiError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BODIES = ("application/json", "multipart/form-data")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Values of Sec-Fetch-Site, which browsers set and pages cannot: the request comes from this
# server's own page, or from no page.
_OWN_SITES = ("same-origin", "none")


@web.middleware
async def require_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Raises ApiError 415 for a body whose type is neither JSON nor an upload's form."""
    if request.match_info.http_exception is not None:
        return await handler(request)
    if request.body_exists and request.content_type not in _BODIES:
        given = request.headers.get("Content-Type")
        raise ApiError(
            415,
            f"the Content-Type is {given!r}, expected application/json "
            "(curl: -H 'Content-Type: application/json'), or multipart/form-data for files "
            "(curl: -F)",
            code="unsupported_media_type",
        )
    return await handler(request)


class BrowserGuard:
    """Refuses requests that web pages elsewhere send. For a server without keys."""

    def __init__(self, origins: Collection[str], hosts: Collection[str] | None) -> None:
        """Set what is allowed.

        origins: of other pages that may send requests; ``*`` for any.
        hosts: names of this server, besides localhost and IP addresses; None for any name.
        """
        self._origins = frozenset(origin.lower() for origin in origins)
        self._hosts: frozenset[str] | None = None
        if hosts is not None:
            own = ("localhost", socket.gethostname())
            self._hosts = frozenset(host.lower() for host in (*hosts, *own))

    def middleware(self) -> Middleware:
        """Raises ApiError 403 for a request that another site's page made a browser send."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            host = request.headers.get("Host")  # every browser sends one
            if host is not None and not self._knows(host):
                raise ApiError(
                    403,
                    f"the Host {host!r} is not known to be this server: ask for localhost "
                    "or an address, or start it with --allowed-hosts or --api-key",
                    code="host_not_allowed",
                )
            if request.method not in _SAFE_METHODS and self._is_foreign(request):
                raise ApiError(
                    403,
                    f"pages of {request.headers.get('Origin')!r} may not use this server: it needs "
                    "--allowed-origins or --api-key",
                    code="origin_not_allowed",
                )
            return await handler(request)

        return middleware

    def _knows(self, host: str) -> bool:
        if self._hosts is None:
            return True
        name = _without_port(host.lower()).rstrip(".")
        return name in self._hosts or name.endswith(".localhost") or _is_address(name)

    def _is_foreign(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
            return False
        if request.headers.get("Sec-Fetch-Site") in _OWN_SITES:
            return False
        return origin.lower().partition("://")[2] != request.headers.get("Host", "").lower()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
