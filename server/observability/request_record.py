"""What a request's log line and metrics say about it: never its content, never a key."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from nybble.server.api.generation import Usage
from nybble.server.http.errors import ApiError, as_api_error


@dataclass
class RequestRecord:
    """Filled in while the request is answered.

    cause: code of the error it ended with. trace_id: of OpenTelemetry, where it is
    traced. usage: of the job it started, with its adapter.
    """

    id: str
    cause: str | None = None
    trace_id: str | None = None
    usage: Usage | None = None

    def failed(self, error: Exception) -> ApiError:
        """What the client is told of what ended its request, which is noted here."""
        failure = as_api_error(error, self.id)
        self.cause = failure.cause
        return failure

    def usage_fields(self) -> dict[str, str | int | None]:
        """What the job came to, as far as it came; nothing where there was none."""
        if self.usage is None:
            return {}
        return {
            "adapter": self.usage.job.adapter,
            "sequences": self.usage.job.size,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "completion_tokens": self.usage.completion_tokens,
        }


RECORD = web.RequestKey("record", RequestRecord)
