"""Accepts paths below a proxy's prefix, and paths with too many slashes."""

from __future__ import annotations

import re

from aiohttp import web
from aiohttp.web_urldispatcher import PlainResource, UrlMappingMatchInfo


class OtherSpellings(PlainResource):
    """Finds the route for another spelling of its path. Add this resource after all others.

    ``//v1//models/`` is taken as ``/v1/models``, because some clients append to a base URL which
    ends in a slash. ``root_path`` is removed, because some proxies leave their prefix in the path.
    """

    def __init__(self, router: web.UrlDispatcher, root_path: str) -> None:
        """root_path: ``/prefix``, or empty."""
        super().__init__("/")  # the router tries this index last, for any path
        self._router = router
        self._root_path = root_path

    async def resolve(self, request: web.Request) -> tuple[UrlMappingMatchInfo | None, set[str]]:
        path = re.sub("/{2,}", "/", request.rel_url.raw_path)
        if self._root_path and path.startswith(f"{self._root_path}/"):
            path = path.removeprefix(self._root_path)
        path = path.rstrip("/") or "/"
        if path == request.rel_url.raw_path:
            return None, set()
        url = request.rel_url.with_path(path, encoded=True)
        found = await self._router.resolve(request.clone(rel_url=url))
        if isinstance(found.http_exception, web.HTTPMethodNotAllowed):
            return None, found.http_exception.allowed_methods
        return (None if found.http_exception else found), set()


def matched_path(request: web.Request) -> str:
    """The path pattern of the request's route, or its own path if no route matches."""
    resource = request.match_info.route.resource
    return request.path if resource is None else resource.canonical
