"""What a request's log line and metrics say about it: never its content, never a key."""

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

    cause: code of the error it ended with. trace_id: of OpenTelemetry, where it is
    traced. usage: of the job it started, with its adapter. not_enforced: what its schemas say and
    the grammar made of them does not.
    """

    id: str
    cause: str | None = None
    trace_id: str | None = None
    usage: Usage | None = None
    not_enforced: list[Omission] = field(default_factory=list)

    def failed(self, error: Exception) -> ApiError:
        """What the client is told of what ended its request, which is noted here."""
        failure = as_api_error(error, self.id)
        self.cause = failure.cause
        return failure

    def warning(self) -> str | None:
        """What the client is told beside its answer, as a header's value, or None."""
        if not self.not_enforced:
            return None
        told = "; ".join(map(str, self.not_enforced))
        text = f"not enforced by the grammar, left to the model: {told}"
        return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)[:_MAX_WARNING]

    def warning_fields(self) -> dict[str, list[str]]:
        """The keywords, without the rest of the path, which is the client's own."""
        keywords = sorted({omission.keyword for omission in self.not_enforced})
        return {"not_enforced": keywords} if keywords else {}

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
