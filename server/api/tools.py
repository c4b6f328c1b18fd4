"""Tool calling: the tools of a request, and grammars that make a model call them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.engine import GrammarCompiler, GrammarGuide
from nybble.engine.guide import grammar_schema
from nybble.engine.json_schema import Omission
from nybble.server.api.chat_schema import (
    AllowedToolChoice,
    ChatRequest,
    NamedToolChoice,
    Tool,
)
from nybble.server.api.output import harmony
from nybble.server.api.output.calls import WHITE_SPACE
from nybble.server.api.output.dialect import Dialect
from nybble.server.api.output.markers import MarkerTokens, quoted, terminals
from nybble.server.api.output.tool_formats import ToolFormat
from nybble.server.http.errors import ApiError

_NAMED = "named"  # a tool_choice that names one tool


@dataclass(frozen=True)
class Answer:
    """The JSON schema of an answer that calls no tool.

    strict: whether every keyword must be enforced.
    """

    schema: dict[str, Any]
    strict: bool


class AnswerError(ValueError):
    """The schema of the answer cannot be enforced; those of the tools raise ValueError itself."""


class Tools:
    """The tools of one request: for the chat template, the grammar and the parser."""

    def __init__(self, dialect: Dialect, body: ChatRequest, tokens: MarkerTokens) -> None:
        """tokens: which markers are tokens of the vocabulary.

        Raises ApiError 400 if tool_choice names a tool that is not among the tools.
        """
        self._dialect = dialect
        self._tokens = tokens
        self._parallel = body.parallel_tool_calls is not False
        self._offered = body.tools or []
        self._choice: str = "auto"
        allowed: list[str] | None = None
        match body.tool_choice:
            case NamedToolChoice(function=function):
                self._choice, allowed = _NAMED, [function.name]
            case AllowedToolChoice(allowed_tools=choice):
                self._choice, allowed = choice.mode, [tool.function.name for tool in choice.tools]
            case str(choice):
                self._choice = choice
        names = {tool.function.name for tool in self._offered}
        for name in allowed or ():
            if name not in names:
                raise ApiError(
                    400,
                    f"tool_choice names {name!r}, which is not among the tools",
                    param="tool_choice",
                    code="invalid_value",
                )
        self._callable = [
            tool for tool in self._offered if allowed is None or tool.function.name in allowed
        ]

    @property
    def named(self) -> bool:
        """Whether tool_choice names one tool. OpenAI's finish_reason is "stop" in that case."""
        return self._choice == _NAMED

    def shown(self) -> list[dict[str, Any]]:
        """The tools for the chat template."""
        return [tool.model_dump(exclude_none=True) for tool in self._offered]

    @property
    def schemas(self) -> Mapping[str, Mapping[str, Any]]:
        """The schemas of the parameters, by the names of the tools."""
        return {tool.function.name: tool.function.parameters or {} for tool in self._offered}

    def guide(
        self,
        compiler: GrammarCompiler,
        omissions: list[Omission],
        answer: Answer | None = None,
    ) -> GrammarGuide | None:
        """A grammar for calls, text and the answer; None if the output need not be constrained.

        It is None if calls are optional and a call can be told from text only once it is complete.

        omissions: the keywords which no grammar can enforce are added to it, for tools and answers
            that are not strict.

        Raises ValueError if a strict tool, and AnswerError if a strict answer, has such a keyword.
        """
        voluntary = self._choice == "auto"
        form = self._dialect.tools
        told_apart = form is None or not form.bare or self._marked(form)
        if voluntary and answer is None and not told_apart:
            for tool in self._callable:
                if tool.function.strict:
                    _parameters(tool, None)
            return None
        offered = [(tool.function.name, self._schema(tool, omissions)) for tool in self._callable]
        rules = [WHITE_SPACE]
        if answer is not None and voluntary:
            rules.append(f"answer: %json {json.dumps(_answer_schema(answer, omissions))}")
        if form is None:
            said = "answer" if answer is not None and voluntary else None
            rules += harmony.call_rules(offered, self._tokens, answer=said, required=not voluntary)
        else:
            rules += self._call_rules(form, offered)
            rules += self._start(form, voluntary=voluntary, answered=answer is not None)
        return compiler.grammar("\n".join(rules))

    def _marked(self, form: ToolFormat) -> bool:
        """Whether calls begin with a token that no text has."""
        return bool(form.lead) and self._tokens.is_token(form.lead[0])

    def _schema(self, tool: Tool, omissions: list[Omission]) -> dict[str, Any]:
        """The parameters of a tool, as a grammar takes them."""
        found: list[Omission] | None = None if tool.function.strict else []
        schema = _parameters(tool, found)
        omissions += found or ()
        return schema

    def _call_rules(
        self, form: ToolFormat, offered: Sequence[tuple[str, dict[str, Any]]]
    ) -> list[str]:
        """The rule ``call``, and the rules it needs.

        Each tool's parameters are a schema of their own, because references in it are to its own
        parts.
        """
        rules, names = [], []
        for index, (name, schema) in enumerate(offered):
            names.append(f"call_{index}")
            rules += form.call.rules(f"call_{index}", name, schema, self._tokens)
        before, after = (terminals(self._tokens, each) for each in (form.before, form.after))
        return [f"any: {' | '.join(names)}", f"call: {before} any {after}", *rules]

    def _start(self, form: ToolFormat, *, voluntary: bool, answered: bool) -> list[str]:
        """The rule ``start``, and the rules it needs."""
        between = quoted(form.between) if form.between else ""
        more = f"({between} call)*" if self._parallel and not self.named else ""
        opening, closing = (terminals(self._tokens, each) for each in (form.opening, form.closing))
        rules = [f"calls: {opening} call {more} {closing}"]
        if not voluntary:
            return ["start: calls", *rules]
        if answered:
            return ["start: calls | answer", *rules]
        rules.append(r"TEXT: /(.|\n)*/")
        if form.bare:
            return ["start: calls | TEXT", *rules]
        if self._marked(form):
            # TEXT cannot contain the marker's token, so the marker always begins a valid call.
            return ["start: TEXT calls?", *rules]
        # A text before calls ends with the first marker in it.
        if form.opening:
            rest = f"{terminals(self._tokens, form.opening[1:])} call"
        else:
            around = (form.before[1:], form.after)
            before, after = (terminals(self._tokens, each) for each in around)
            rest = f"{before} any {after}"
        intro = rf"intro[suffix={quoted(form.lead[0])}]: /(.|\n)*/"
        return [f"start: TEXT | intro {rest} {more} {closing}", intro, *rules[1:]]


def tools_of(body: ChatRequest, dialect: Dialect, tokens: MarkerTokens, model: str) -> Tools | None:
    """The tools which a request offers; None if it offers none.

    Raises ApiError 400 if the model's chat template supports no known format for tools, or if
    tool_choice demands a call and there are no tools.
    """
    if not body.tools or body.tool_choice == "none":
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(
                400,
                "tool_choice asks for a call, but the request has no tools",
                param="tool_choice",
                code="invalid_value",
            )
        return None
    if not dialect.calls_tools:
        raise ApiError(
            400,
            f"the chat template of model {model!r} has no tools in a format that is known: start "
            "the server with --tool-call-parser if it has",
            param="tools",
            code="unsupported_parameter",
        )
    return Tools(dialect, body, tokens)


def _parameters(tool: Tool, omissions: list[Omission] | None) -> dict[str, Any]:
    """The schema of a call's arguments. They are an object even if the schema does not say so."""
    given = tool.function.parameters or {}
    schema = given if "type" in given else {"type": "object", **given}
    try:
        return grammar_schema(schema, omissions)
    except ValueError as error:
        raise ValueError(f"the parameters of {tool.function.name!r}: {error}") from None


def _answer_schema(answer: Answer, omissions: list[Omission]) -> dict[str, Any]:
    try:
        return grammar_schema(answer.schema, None if answer.strict else omissions)
    except ValueError as error:
        raise AnswerError(str(error)) from None
