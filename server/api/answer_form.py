"""The form of one request's answers: its reasoning and tool calls, read and guided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nybble.engine import ReasoningLimit
from nybble.server.api.output import harmony
from nybble.server.api.output.dialect import Dialect
from nybble.server.api.output.events import OutputParser
from nybble.server.api.output.markers import MarkerTokens
from nybble.server.api.output.reasoning import Place, ReasoningParser
from nybble.server.api.output.split_parser import SplitParser
from nybble.server.api.output.tool_parser import ToolParser
from nybble.server.api.tools import Tools


@dataclass(frozen=True)
class AnswerForm:
    """How the answers to one prompt are written.

    tokens: which markers are tokens.
    tools: the request's tools; None if it offers none.
    prompt: the text which is answered.
    continued: whether the prompt ends with the beginning of the answer.
    split: whether reasoning is told apart from content.
    """

    dialect: Dialect
    tokens: MarkerTokens
    tools: Tools | None
    prompt: str
    continued: bool = False
    split: bool = True

    @property
    def reasons(self) -> bool:
        """Whether reasoning is told apart from content."""
        return self.split and self.dialect.reasons

    @property
    def _place(self) -> Place:
        form = self.dialect.reasoning
        assert form is not None
        return form.place(self.prompt, continued=self.continued)

    @property
    def without_reasoning(self) -> str:
        """What stands behind the prompt if the answer comes next, whether the template can be told
        so or not. "" if the prompt has opened no reasoning."""
        if self.dialect.harmony:
            return harmony.FINAL
        form = self.dialect.reasoning
        return f"\n{form.close}\n\n" if form is not None and self._place == "inside" else ""

    def parser(self) -> OutputParser:
        """A parser for the text of one sequence."""
        if self.dialect.harmony:
            calls = self.tools is not None
            return harmony.HarmonyParser(self.prompt, calls=calls, split=self.split)
        form = self.dialect.reasoning
        reasoning = tools = None
        if form is not None and self.split:
            reasoning = ReasoningParser(form, self._place)
        if self.tools is not None and self.dialect.tools is not None:
            tools = ToolParser(self.dialect.tools, self.tools.schemas)
        return SplitParser(reasoning, tools)

    @property
    def shown_special_tokens(self) -> frozenset[int]:
        """The special tokens which the parser needs to see in the text."""
        if self.dialect.harmony:
            return self.tokens.special(harmony.MARKERS)
        markers: list[str] = []
        if self.dialect.reasoning is not None:
            markers += self.dialect.reasoning.markers
        if self.tools is not None and self.dialect.tools is not None:
            markers += self.dialect.tools.special
        return self.tokens.special(markers)

    def lead(self, *, calls: bool) -> str:
        """A grammar of what comes before the guided part of an answer, which it calls ``@answer``.
        "" if nothing does.

        calls: whether the guided part is that of tools.
        """
        if self.dialect.harmony:
            return (harmony.analysis_lead if calls else harmony.final_lead)(self.tokens)
        form = self.dialect.reasoning
        if form is None:
            return ""
        return form.lead(self.tokens, self._place)

    def limit(self, tokens: int, encode: Callable[[str], tuple[int, ...]]) -> ReasoningLimit:
        """How reasoning is ended after ``tokens`` tokens. encode: text and markers to token ids."""
        if self.dialect.harmony:
            return ReasoningLimit(
                tokens,
                harmony.OPEN,
                harmony.CLOSE,
                encode(harmony.CLOSING),
                inside=False,
                barred=encode(harmony.BARRED)[0],
            )
        form = self.dialect.reasoning
        assert form is not None
        inside = self._place == "inside"
        return ReasoningLimit(tokens, form.open, form.close, encode(form.close), inside)
