"""One streamed completion against an OpenAI-compatible server, timed token by token."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Timing:
    """The times of one request, in seconds from the moment it was sent.

    arrivals: when each event with text arrived.
    tokens: generated tokens, as the server counts them.
    draft_tokens, accepted_draft_tokens: verified, and those that were what the model says.
    error: what went wrong; None if nothing did.
    """

    arrivals: Sequence[float]
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    @property
    def first(self) -> float:
        """Time to first token."""
        return self.arrivals[0]

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Client:
    """Sends completions to ``url`` (…/v1) for ``model``. extra: further fields of each request."""

    session: aiohttp.ClientSession
    url: str
    model: str
    headers: dict[str, str] = field(default_factory=dict)
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    async def complete(self, prompt: str | list[int], max_tokens: int) -> Timing:
        """Generate up to ``max_tokens`` greedy tokens. A failure is returned as ``error``.

        If the server knows ``ignore_eos``, it generates exactly ``max_tokens``.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        start = time.perf_counter()
        arrivals: list[float] = []
        usage: dict[str, Any] = {}
        try:
            async with self.session.post(
                f"{self.url}/completions", json=body, headers=self.headers
            ) as response:
                if response.status != 200:
                    return Timing((), error=f"{response.status}: {await response.text()}")
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        return Timing(arrivals, error=str(event["error"]))
                    # The last chunk may only say why the text ended.
                    choices = event.get("choices", ())
                    if any(each["text"] or not each.get("finish_reason") for each in choices):
                        arrivals.append(time.perf_counter() - start)
                    usage = event.get("usage") or usage
        except (TimeoutError, aiohttp.ClientError) as error:
            return Timing(arrivals, error=f"{type(error).__name__}: {error}")
        if not usage:
            return Timing(arrivals, error="the stream ended without a usage event")
        drafts = usage.get("draft_tokens_details") or {}  # if the server speculates and says so
        return Timing(
            arrivals,
            usage["prompt_tokens"],
            usage["completion_tokens"],
            draft_tokens=drafts.get("draft_tokens", 0),
            accepted_draft_tokens=drafts.get("accepted_draft_tokens", 0),
        )
