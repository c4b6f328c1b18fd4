"""Exact counts of requests and tokens by tenant and adapter, for billing."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

# Names of adapters may come and go for ever. What exceeds this is counted together.
_MOST = 100_000
_OTHERS = "(others)"


@dataclass
class Counts:
    """requests: that had an output. cached_tokens: those of prompt_tokens that were in the prefix
    cache."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class UsageLedger:
    """Counts since the server started. Names in metrics are bounded to the busiest; here none is
    left out."""

    def __init__(self) -> None:
        self.since = int(time.time())
        self._counts: dict[tuple[str, str | None], Counts] = {}

    def add(
        self, tenant: str, adapter: str | None, *, prompt: int, cached: int, completion: int
    ) -> None:
        """Count a request. tenant: "" without one. adapter: None for the base model."""
        key = (tenant, adapter)
        if key not in self._counts and len(self._counts) >= _MOST:
            key = (tenant, _OTHERS)
        counts = self._counts.setdefault(key, Counts())
        counts.requests += 1
        counts.prompt_tokens += prompt
        counts.cached_tokens += cached
        counts.completion_tokens += completion

    def rows(self, tenant: str | None) -> list[dict[str, Any]]:
        """The counts of a tenant, or of all for None, by tenant and adapter."""
        found = sorted(self._counts.items(), key=lambda item: (item[0][0], item[0][1] or ""))
        return [
            {"tenant": owner or None, "adapter": adapter, **asdict(counts)}
            for (owner, adapter), counts in found
            if tenant in (None, owner)
        ]
