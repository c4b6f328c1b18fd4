"""What the log and the metrics say about a request: never its content, never a key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from aiohttp import web

from nybble.engine.json_schema import Omission
from nybble.server.api.generation import Usage
from nybble.server.http.errors import ApiError, as_api_error

_MAX_WARNING = 1000  # characters: proxies limit headers
_UNPRINTABLE = re.compile(r"[^ -~]")


@dataclass
class RequestRecord:
    """Filled in while the request is answered.

    cause: code of the error it ended with.
    trace_id: OpenTelemetry's, if the request is traced.
    usage: token counts of its job, with the job's adapter.
    not_enforced: keywords of its schemas which the grammar does not enforce.
    """

    id: str
    cause: str | None = None
    trace_id: str | None = None
    usage: Usage | None = None
    not_enforced: list[Omission] = field(default_factory=list)

    def failed(self, error: Exception) -> ApiError:
        """Record the error that ended the request, and return the error to send."""
        failure = as_api_error(error, self.id)
        self.cause = failure.cause
        return failure

    def warning(self) -> str | None:
        """Value of the warning header; None if there is nothing to warn of."""
        if not self.not_enforced:
            return None
        told = "; ".join(map(str, self.not_enforced))
        text = f"not enforced by the grammar, left to the model: {told}"
        return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)[:_MAX_WARNING]

    def warning_fields(self) -> dict[str, list[str]]:
        """The keywords that are not enforced, without their paths: those are the client's data."""
        keywords = sorted({omission.keyword for omission in self.not_enforced})
        return {"not_enforced": keywords} if keywords else {}

    def usage_fields(self) -> dict[str, str | int | None]:
        """Token counts of the job so far; empty if there was no job."""
        if self.usage is None:
            return {}
        return {
            "adapter": self.usage.group.adapter,
            "sequences": self.usage.group.size,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "completion_tokens": self.usage.completion_tokens,
        }


RECORD = web.RequestKey("record", RequestRecord)
