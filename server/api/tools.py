"""Tool calling: which convention a model follows, and grammars that make it call a tool."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.engine import GrammarCompiler, GrammarGuide
from nybble.engine.guide import JSON_OPTIONS, grammar_schema
from nybble.engine.json_schema import Omission
from nybble.server.api.chat_schema import ChatRequest, NamedToolChoice, Tool
from nybble.server.api.tool_parser import CLOSE, OPEN, Convention, ToolParser
from nybble.server.http.errors import ApiError


@dataclass(frozen=True)
class Answer:
    """The JSON schema of an answer that calls no tool.

    strict: whether every keyword must be enforced.
    """

    schema: dict[str, Any]
    strict: bool


class AnswerError(ValueError):
    """The schema of the answer cannot be enforced; those of the tools raise ValueError itself."""


# The white space which the library allows inside JSON.
_WHITE_SPACE = f"WS: /{JSON_OPTIONS['whitespace_pattern']}/"


class Tools:
    """The tools of one request: for the chat template, the grammar and the parser."""

    def __init__(self, convention: Convention, body: ChatRequest, marked: bool) -> None:
        """marked: whether the markers around a call are single tokens of the vocabulary.

        Raises ApiError 400 if tool_choice names a tool that is not among the tools.
        """
        self._convention: Convention = convention
        self._marked = marked
        self._parallel = body.parallel_tool_calls is not False
        self._offered = body.tools or []
        self._choice = body.tool_choice or "auto"
        names = [tool.function.name for tool in self._offered]
        if isinstance(self._choice, NamedToolChoice):
            name = self._choice.function.name
            if name not in names:
                raise ApiError(
                    400,
                    f"tool_choice names {name!r}, which is not among the tools",
                    param="tool_choice",
                    code="invalid_value",
                )
            self._callable = [tool for tool in self._offered if tool.function.name == name]
        else:
            self._callable = self._offered

    @property
    def named(self) -> bool:
        """Whether tool_choice names one tool. OpenAI's finish_reason is "stop" in that case."""
        return isinstance(self._choice, NamedToolChoice)

    def shown(self) -> list[dict[str, Any]]:
        """The tools for the chat template."""
        return [tool.model_dump(exclude_none=True) for tool in self._offered]

    def parser(self) -> ToolParser:
        """A parser for the text of one sequence."""
        return ToolParser(self._convention, {tool.function.name for tool in self._offered})

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
        told_apart = answer is not None or (self._convention == "hermes" and self._marked)
        if voluntary and not told_apart:
            for tool in self._callable:
                if tool.function.strict:
                    _parameters(tool, None)
            return None
        rules = [_WHITE_SPACE, *self._call_rules(omissions)]
        between = r'"\n"' if self._convention == "hermes" else '"; "'
        more = f" ({between} call)*" if self._parallel and not self.named else ""
        start = f"call{more}"
        if voluntary and answer is not None:
            start += " | answer"
            rules.append(f"answer: %json {json.dumps(_answer_schema(answer, omissions))}")
        elif voluntary:
            # TEXT cannot contain the marker's token, so the marker always begins a valid call.
            start = f"TEXT ({start})?"
            rules.append(r"TEXT: /(.|\n)*/")
        return compiler.grammar("\n".join([f"start: {start}", *rules]))

    def _call_rules(self, omissions: list[Omission]) -> list[str]:
        """The rule ``call``, and the rules it needs.

        Each tool's parameters are a schema of their own, because references in it are to its own
        parts.
        """
        parameter = "arguments" if self._convention == "hermes" else "parameters"
        names, rules = [], []
        for index, tool in enumerate(self._callable):
            found: list[Omission] | None = None if tool.function.strict else []
            schema = _parameters(tool, found)
            omissions += found or ()
            parts = [
                *("{", json.dumps("name"), ":", json.dumps(tool.function.name), ","),
                *(json.dumps(parameter), ":"),
            ]
            tokens = [json.dumps(part) for part in parts] + [f"arguments_{index}", json.dumps("}")]
            names.append(f"json_{index}")
            rules.append(f"json_{index}: " + " WS? ".join(tokens))
            rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
        json_of_any = " | ".join(names)
        if self._convention != "hermes":
            return [f"call: {json_of_any}", *rules]
        # In the grammar an unquoted marker is the single token, and a quoted one is its text.
        first, last = (OPEN, CLOSE) if self._marked else (f'"{OPEN}"', f'"{CLOSE}"')
        return [rf'call: {first} "\n" ({json_of_any}) "\n" {last}', *rules]


def tools_of(body: ChatRequest, tokenizer: PreTrainedTokenizerBase, model: str) -> Tools | None:
    """The tools which a request offers; None if it offers none.

    Raises ApiError 400 if the model's chat template supports no known convention for tools, or if
    tool_choice demands a call and there are no tools.
    """
    if not body.tools or body.tool_choice == "none":
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    convention = _convention(body.chat_template or tokenizer.chat_template)
    if convention is None:
        raise ApiError(
            400,
            f"the chat template of model {model!r} has no tools in a supported convention "
            "(Hermes and Qwen's <tool_call>, Llama 3's JSON)",
            param="tools",
            code="unsupported_parameter",
        )
    markers = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return Tools(convention, body, marked={OPEN, CLOSE} <= markers)


def _convention(template: str | dict[str, str] | None) -> Convention | None:
    text = template if isinstance(template, str) else "".join((template or {}).values())
    if "tools" not in text:
        return None
    if OPEN in text:
        return "hermes"
    if "<|python_tag|>" in text or '"parameters"' in text:
        return "llama3"
    return None


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
