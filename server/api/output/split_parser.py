"""Splits an answer into reasoning, content and tool calls."""

from __future__ import annotations

from nybble.server.api.output.events import ParsedDelta, Text
from nybble.server.api.output.reasoning import ReasoningParser
from nybble.server.api.output.tool_parser import ToolParser


class SplitParser:
    """See :class:`nybble.server.api.output.events.OutputParser`. Calls are looked for behind the
    reasoning."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def calls(self) -> int:
        return 0 if self._tools is None else self._tools.calls

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._reasoning is None else self._reasoning.tokens

    def feed(self, text: str, tokens: int = 0) -> list[ParsedDelta]:
        if self._reasoning is None:
            return self._spoken([Text(text)] if text else [])
        return self._spoken(self._reasoning.feed(text, tokens))

    def finish(self) -> list[ParsedDelta]:
        events = [] if self._reasoning is None else self._spoken(self._reasoning.finish())
        return events if self._tools is None else [*events, *self._tools.finish()]

    def _spoken(self, events: list[ParsedDelta]) -> list[ParsedDelta]:
        """``events`` with the calls in their texts."""
        if self._tools is None:
            return events
        found: list[ParsedDelta] = []
        for event in events:
            found += self._tools.feed(event.text) if isinstance(event, Text) else [event]
        return found
