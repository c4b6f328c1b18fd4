"""A model's dialect: the formats of its reasoning and of its tool calls.

It is read from the chat template, or named by the server's options.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

from nybble.server.api.output import harmony
from nybble.server.api.output.reasoning import REASONING_FORMATS, ReasoningFormat
from nybble.server.api.output.tool_formats import TOOL_FORMATS, ToolFormat

AUTO, NONE = "auto", "none"
_HARMONY = ("openai_gptoss", "gpt_oss", "openai", "harmony")
REASONING_NAMES = (
    AUTO,
    NONE,
    *_HARMONY,
    *(name for form in REASONING_FORMATS for name in form.names),
)
TOOL_NAMES = tuple(
    dict.fromkeys((AUTO, NONE, *_HARMONY, *(name for form in TOOL_FORMATS for name in form.names)))
)


@dataclass(frozen=True)
class Dialect:
    """How answers are written.

    reasoning: None if the model does not reason, or if its reasoning is not to be told apart.
    tools: None if the model calls no tools.
    harmony: whether answers are in gpt-oss' format, which has both.
    """

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    harmony: bool = False

    @property
    def reasons(self) -> bool:
        return self.harmony or self.reasoning is not None

    @property
    def calls_tools(self) -> bool:
        return self.harmony or self.tools is not None


class Dialects:
    """The dialects of chat templates, under the options of one server."""

    def __init__(self, reasoning: str = AUTO, tools: str = AUTO) -> None:
        """reasoning: one of REASONING_NAMES. tools: one of TOOL_NAMES."""
        self._reasoning = reasoning
        self._tools = tools

    def of(self, template: str) -> Dialect:
        """The dialect of a chat template."""
        return _dialect(template, self._reasoning, self._tools)


class _Format(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...

    def fits(self, template: str) -> bool: ...


F = TypeVar("F", bound=_Format)


@lru_cache(maxsize=16)
def _dialect(template: str, reasoning: str, tools: str) -> Dialect:
    speaks_harmony = harmony.CHANNEL in template
    if {reasoning, tools} & set(_HARMONY) or (reasoning == AUTO and speaks_harmony):
        return Dialect(harmony=True)
    return Dialect(
        reasoning=_chosen(REASONING_FORMATS, reasoning, template),
        tools=_chosen(TOOL_FORMATS, tools, template),
    )


def _chosen(formats: tuple[F, ...], name: str, template: str) -> F | None:
    if name == NONE:
        return None
    fitting = [form for form in formats if form.fits(template)]
    if name == AUTO:
        return next(iter(fitting), None)
    named = [form for form in formats if name in form.names]
    # Two generations of a family may share a name.
    return next((form for form in named if form in fitting), named[-1] if named else None)
