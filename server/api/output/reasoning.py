"""Reasoning: how each family marks it, and splitting it from the answer.

The names of the formats are those of vLLM's and SGLang's ``--reasoning-parser``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nybble.server.api.output.events import ParsedDelta, Reasoning, Text
from nybble.server.api.output.markers import MarkerTokens, may_become, unsettled

Place = Literal["before", "inside", "after"]


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning between two markers, at the beginning of an answer.

    names: as for ``--reasoning-parser``; the first is the format's own.
    open, close: the markers.
    answer: markers around the answer which follows, for families that have them.
    implicit: whether an answer begins with reasoning even if nothing opens it. No template says
        so: such a format is used only if it is asked for.
    mentions: what a chat template of such a model has in it; by default the opening marker or the
        closing one.
    """

    names: tuple[str, ...]
    open: str
    close: str
    answer: tuple[str, str] | None = None
    implicit: bool = False
    mentions: tuple[str, ...] = ()

    def fits(self, template: str) -> bool:
        """Whether a chat template is one of a model that reasons in this format."""
        if self.implicit:
            return False
        if self.mentions:
            return all(text in template for text in self.mentions)
        return self.open in template or self.close in template

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.open, self.close, *(self.answer or ()))

    def place(self, prompt: str, *, continued: bool) -> Place:
        """Where an answer to ``prompt`` begins: before its reasoning, inside, or after it.

        continued: whether the prompt ends with a part of the answer.
        """
        end = prompt.rstrip()
        if not continued:
            # Templates begin an answer's reasoning in the prompt's last line.
            end = end[end.rfind("\n") + 1 :]
        opened, closed = end.rfind(self.open), end.rfind(self.close)
        if opened != closed:  # one of them is there
            return "inside" if opened > closed else "after"
        return "inside" if self.implicit else "before"

    def lead(self, tokens: MarkerTokens, place: Place) -> str:
        """A grammar of what comes before the answer, which it calls ``@answer``. "" for nothing."""
        if place == "after" and self.answer is None:
            return ""
        close, rules = tokens.terminal(self.close), [r"GAP: /\n{0,2}/"]
        if tokens.is_token(self.close):
            thought = f"TEXT {close}"
            rules.append(r"TEXT: /(.|\n)*/")
        else:
            thought = "thought"
            rules.append(rf"thought[suffix={close}]: /(.|\n)*/")
        answer = "@answer"
        if self.answer is not None:
            begin, end = map(tokens.terminal, self.answer)
            answer = f"({begin} GAP @answer GAP {end} | @answer)"
        start = {
            "before": f"({tokens.terminal(self.open)} {thought} GAP)? {answer}",
            "inside": f"{thought} GAP {answer}",
            "after": f"GAP {answer}",
        }[place]
        return "\n".join([f"start: {start}", *rules])


# The first that fits a chat template is its format.
REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(("seed_oss",), "<seed:think>", "</seed:think>"),
    ReasoningFormat(
        ("granite", "granite32"),
        "Here is my thought process:",
        "Here is my response:",
    ),
    ReasoningFormat(
        ("granite33", "ernie45"),
        "<think>",
        "</think>",
        answer=("<response>", "</response>"),
        mentions=("<think>", "<response>"),
    ),
    ReasoningFormat(
        ("hunyuan_a13b", "hunyuan"),
        "<think>",
        "</think>",
        answer=("<answer>", "</answer>"),
        mentions=("<think>", "<answer>"),
    ),
    ReasoningFormat(
        ("cohere_command3", "cohere_command", "cohere"),
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        answer=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ReasoningFormat(("mistral", "magistral"), "[THINK]", "[/THINK]"),
    ReasoningFormat(("exaone_deep",), "<thought>", "</thought>"),
    ReasoningFormat(("kimi",), "◁think▷", "◁/think▷"),
    ReasoningFormat(
        (
            *("think", "qwen3", "glm45", "smollm3", "exaone4", "deepseek_v3", "deepseek_v31"),
            *("olmo3", "phi4", "step3", "minimax_m2", "nemotron_v3", "kimi_k2", "mimo", "holo2"),
        ),
        "<think>",
        "</think>",
    ),
    ReasoningFormat(
        ("deepseek_r1", "qwq"),
        "<think>",
        "</think>",
        implicit=True,
    ),
)


class ReasoningParser:
    """Splits the text of one sequence into reasoning and the rest. White space around reasoning is
    dropped.
    """

    def __init__(self, form: ReasoningFormat, place: Place) -> None:
        self._form = form
        self._state: Literal["start", "open", "thought", "gap", "answer"] = (
            "start" if place == "before" else "open" if place == "inside" else "gap"
        )
        self._buffer = ""
        self._fresh = True  # whether nothing of this part has been returned yet
        self._end = ""  # the marker that ends the answer, once its beginning has come
        self._tokens = self._undecided = 0

    @property
    def tokens(self) -> int:
        """How many of the tokens were reasoning, its markers included."""
        return self._tokens

    def feed(self, text: str, tokens: int = 0) -> list[ParsedDelta]:
        """See :class:`nybble.server.api.output.events.OutputParser`."""
        if self._state in ("open", "thought"):
            self._tokens += tokens
        elif self._state == "start":
            self._undecided += tokens
        self._buffer += text
        events: list[ParsedDelta] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[ParsedDelta]:
        """The events of the text that was held back."""
        held, self._buffer = self._buffer, ""
        if self._state in ("open", "thought"):
            held = held.strip() if self._fresh else held.rstrip()
            return [Reasoning(held)] if held else []
        if self._fresh and self._state != "start":
            held = held.lstrip()
        return [Text(held)] if held else []

    def _step(self, events: list[ParsedDelta]) -> bool:
        """Consume something from the buffer; False if more text is needed first."""
        if self._state == "start":
            return self._start()
        if self._state == "open":
            return self._skip((self._form.open,), "thought")
        if self._state == "thought":
            return self._think(events)
        if self._state == "gap":
            return self._skip((self._form.answer or ("",))[:1], "answer")
        return self._answer(events)

    def _start(self) -> bool:
        text = self._buffer.lstrip()
        if not text or may_become((self._form.open,), text):
            return False
        if text.startswith(self._form.open):
            self._buffer, self._state = text, "open"
            self._tokens += self._undecided
        else:
            self._state, self._fresh = "answer", False
        return True

    def _skip(self, markers: Sequence[str], then: Literal["thought", "answer"]) -> bool:
        """Skip white space and one of ``markers``, if it is there."""
        text = self._buffer.lstrip()
        marker = next((each for each in markers if each and text.startswith(each)), None)
        if marker is not None:
            text = text[len(marker) :].lstrip()
            if then == "answer" and self._form.answer is not None:
                self._end = self._form.answer[1]
        elif not text or may_become(markers, text):
            self._buffer = text
            return False
        self._buffer, self._state, self._fresh = text, then, True
        return True

    def _think(self, events: list[ParsedDelta]) -> bool:
        text, close = self._buffer, self._form.close
        at = text.find(close)
        settled = text[:at] if at >= 0 else text[: len(text) - unsettled((close,), text)]
        settled = settled.rstrip()
        told = settled.lstrip() if self._fresh else settled
        if told:
            events.append(Reasoning(told))
            self._fresh = False
        if at < 0:
            self._buffer = text[len(settled) :]
            return False
        self._buffer, self._state = text[at + len(close) :], "gap"
        return True

    def _answer(self, events: list[ParsedDelta]) -> bool:
        text = self._buffer.lstrip() if self._fresh else self._buffer
        at = text.find(self._end) if self._end else -1
        if at >= 0:
            text, rest = text[:at].rstrip(), text[at + len(self._end) :]
            self._end, self._buffer = "", rest
        elif self._end:
            kept = text[: len(text) - unsettled((self._end,), text)].rstrip()
            text, self._buffer = kept, text[len(kept) :]
        else:
            self._buffer = ""
        if text:
            events.append(Text(text))
            self._fresh = False
        if at >= 0:
            self._fresh = True  # nor is white space behind the answer a part of it
        return at >= 0
