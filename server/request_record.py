"""What a request's log line and metrics say about it: never its content, never a key."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web
from nybble.server.generation import Usage


@dataclass
class RequestRecord:
    """Filled in while the request is answered.

    cause: code of the error it ended with. usage: of the job it started, with its adapter.
    """

    id: str
    cause: str | None = None
    usage: Usage | None = None


RECORD = web.RequestKey("record", RequestRecord)
