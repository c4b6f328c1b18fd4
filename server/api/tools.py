"""Tool calling: which convention a model follows, and grammars that hold it to a call."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from nybble.engine import GrammarCompiler, GrammarGuide
from nybble.engine.guide import JSON_OPTIONS
from nybble.server.api.chat_schema import ChatRequest, NamedToolChoice, Tool
from nybble.server.api.tool_parser import CLOSE, OPEN, Convention, ToolParser
from nybble.server.http.errors import ApiError


class Tools:
    """The tools of one request, as the model is shown them and held to them."""

    def __init__(self, convention: Convention, body: ChatRequest, marked: bool) -> None:
        """marked: whether the call's markers are tokens of their own.

        Raises ApiError 400 where tool_choice names a tool that is not there.
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
        """Whether one tool was asked for by name; OpenAI's finish_reason is "stop" then."""
        return isinstance(self._choice, NamedToolChoice)

    def shown(self) -> list[dict[str, Any]]:
        """The tools for the chat template."""
        return [tool.model_dump(exclude_none=True) for tool in self._offered]

    def parser(self) -> ToolParser:
        return ToolParser(self._convention, {tool.function.name for tool in self._offered})

    def guide(self, compiler: GrammarCompiler) -> GrammarGuide | None:
        """None where calls are voluntary and cannot be told from text before they are complete.

        Raises ValueError for parameters that are not a supported JSON schema.
        """
        if self._choice == "auto" and not (self._convention == "hermes" and self._marked):
            return None
        parameter = "arguments" if self._convention == "hermes" else "parameters"
        schema = {
            "anyOf": [_call_schema(tool, parameter) for tool in self._callable],
            "x-guidance": JSON_OPTIONS,
        }
        rules = f"json: %json {json.dumps(schema)}\n"
        if self._convention == "hermes":
            # Unquoted, a marker is the token; quoted, its spelling.
            first, last = (OPEN, CLOSE) if self._marked else (f'"{OPEN}"', f'"{CLOSE}"')
            between = r'"\n"'
            rules += rf'call: {first} "\n" json "\n" {last}'
        else:
            between = '"; "'
            rules += "call: json"
        more = f"({between} call)*" if self._parallel and not self.named else ""
        if self._choice == "auto":
            # Text has no marker in it, so a marker can only begin a well-formed call.
            return compiler.grammar(f"start: TEXT (call {more})?\nTEXT: /(.|\\n)*/\n{rules}")
        return compiler.grammar(f"start: call {more}\n{rules}")


def tools_of(body: ChatRequest, tokenizer: PreTrainedTokenizerBase, model: str) -> Tools | None:
    """The tools a request offers, or None. Raises ApiError 400 where the model knows of none."""
    if not body.tools or body.tool_choice == "none":
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    convention = _convention(tokenizer.chat_template)
    if convention is None:
        raise ApiError(
            400,
            f"model {model!r} has a chat template without tools in a convention known here "
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


def _call_schema(tool: Tool, parameter: str) -> dict[str, Any]:
    arguments = tool.function.parameters
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            parameter: {"type": "object"} if arguments is None else arguments,
        },
        "required": ["name", parameter],
        "additionalProperties": False,
    }
