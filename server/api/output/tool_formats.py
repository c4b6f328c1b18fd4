"""The formats in which families write tool calls: a table.

Sources are the chat templates of the models. The names are those of vLLM's ``--tool-call-parser``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nybble.server.api.output.calls import CallSyntax
from nybble.server.api.output.escaped_calls import EscapedCall
from nybble.server.api.output.json_calls import JsonCall, NamedCall
from nybble.server.api.output.python_calls import PythonCall
from nybble.server.api.output.tagged_calls import TaggedCall

Pieces = tuple[str, ...]


@dataclass(frozen=True)
class ToolFormat:
    """Calls in a text: ``opening (before call after) between (before call after) … closing``.

    Each part is a row of pieces, which are markers and other text. A parser takes white space
    around them as it comes and does without all of them but the first. If there is no first piece,
    an answer consists of calls and nothing else, or of none.

    names: as for ``--tool-call-parser``; the first is the format's own.
    call: how one call is written.
    whole: whether calls are a whole answer even if there is a first piece.
    aliases: other texts with which calls may begin.
    starts: texts with which a call itself may begin, without the pieces before it.
    unmarked: whether an answer may consist of calls in JSON alone, without the pieces.
    mentions: rows of texts; the chat template of such a model has all texts of one row.
    """

    names: tuple[str, ...]
    call: CallSyntax
    opening: Pieces = ()
    before: Pieces = ()
    after: Pieces = ()
    between: str = ""
    closing: Pieces = ()
    whole: bool = False
    aliases: Pieces = ()
    starts: Pieces = ()
    unmarked: bool = False
    mentions: tuple[Pieces, ...] = ()

    def fits(self, template: str) -> bool:
        """Whether a chat template is one of a model that calls tools in this format."""
        return any(all(text in template for text in row) for row in self.mentions)

    @cached_property
    def lead(self) -> Pieces:
        """What comes before the first call."""
        return tuple(piece.strip() for piece in (*self.opening, *self.before) if piece.strip())

    @property
    def bare(self) -> bool:
        """Whether an answer with calls consists of them alone."""
        return self.whole or not self.lead

    @cached_property
    def markers(self) -> Pieces:
        """With one of these calls begin."""
        return (*self.lead[:1], *self.aliases, *self.starts)

    @cached_property
    def special(self) -> Pieces:
        """All texts which may be special tokens."""
        pieces = [*self.lead, *self.aliases, *self.starts, *self.after, *self.closing]
        syntax = self.call
        if isinstance(syntax, NamedCall):
            pieces += syntax.between
        elif isinstance(syntax, TaggedCall):
            pieces += [*syntax.name, *syntax.key, *syntax.value, syntax.close]
        elif isinstance(syntax, EscapedCall):
            pieces.append(syntax.escape)
        return tuple(piece.strip() for piece in pieces if piece.strip())


_JSON = JsonCall()
_JSON_PARAMETERS = JsonCall(arguments="parameters")
_QWEN_TAGS = TaggedCall(
    name=("<function=", ">\n"),
    key=("<parameter=", ">\n"),
    value=("", "\n</parameter>\n"),
    close="</function>",
)

# Seed's values have no line breaks around them.
_SEED_TAGS = TaggedCall(
    name=("<function=", ">\n"),
    key=("<parameter=", ">"),
    value=("", "</parameter>\n"),
    close="</function>",
)

# The first that fits a chat template is its format.
TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        ("seed_oss",),
        _SEED_TAGS,
        before=("<seed:tool_call>", "\n"),
        after=("\n", "</seed:tool_call>"),
        between="\n",
        mentions=(("<seed:tool_call>",),),
    ),
    ToolFormat(
        ("qwen3_coder", "qwen3_xml", "step3p5", "mimo"),
        _QWEN_TAGS,
        before=("<tool_call>", "\n"),
        after=("\n", "</tool_call>"),
        between="\n",
        starts=("<function=",),
        mentions=(("<tool_call>", "<function="),),
    ),
    ToolFormat(
        ("glm45", "glm47"),
        TaggedCall(
            name=("", "\n"),
            key=("<arg_key>", "</arg_key>\n"),
            value=("<arg_value>", "</arg_value>\n"),
            close="</tool_call>",
        ),
        before=("<tool_call>",),
        between="\n",
        mentions=(("<tool_call>", "<arg_key>"),),
    ),
    ToolFormat(
        ("deepseek_v31",),
        NamedCall(("<｜tool▁sep｜>",)),
        opening=("<｜tool▁calls▁begin｜>",),
        before=("<｜tool▁call▁begin｜>",),
        after=("<｜tool▁call▁end｜>",),
        closing=("<｜tool▁calls▁end｜>",),
        mentions=(
            ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "tool_call_name"),
            ("<｜tool▁calls▁begin｜>", "thinking"),
        ),
    ),
    ToolFormat(
        ("deepseek_v3", "deepseek_r1"),
        NamedCall(("\n```json\n",)),
        opening=("<｜tool▁calls▁begin｜>",),
        before=("<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>"),
        after=("\n```", "<｜tool▁call▁end｜>"),
        between="\n",
        closing=("<｜tool▁calls▁end｜>",),
        mentions=(("<｜tool▁calls▁begin｜>",),),
    ),
    ToolFormat(
        ("kimi_k2",),
        NamedCall(("<|tool_call_argument_begin|>",), prefix="functions.", suffix=":[0-9]{1,3}"),
        opening=("<|tool_calls_section_begin|>",),
        before=("<|tool_call_begin|>",),
        after=("<|tool_call_end|>",),
        closing=("<|tool_calls_section_end|>",),
        mentions=(("<|tool_calls_section_begin|>",),),
    ),
    ToolFormat(
        ("mistral",),
        NamedCall(("[ARGS]",), suffix=r"(\[CALL_ID\][A-Za-z0-9]{9})?"),
        before=("[TOOL_CALLS]",),
        mentions=(("[TOOL_CALLS]", "[ARGS]"),),
    ),
    ToolFormat(
        ("mistral",),
        _JSON,
        opening=("[TOOL_CALLS]", "["),
        between=", ",
        closing=("]",),
        mentions=(("[TOOL_CALLS]",),),
    ),
    ToolFormat(
        ("granite",),
        _JSON,
        opening=("<|tool_call|>", "["),
        between=", ",
        closing=("]",),
        mentions=(("<|tool_call|>", "<|start_of_role|>"),),
    ),
    ToolFormat(
        ("granite-20b-fc",),
        _JSON,
        before=("<function_call>", " "),
        between="\n",
        mentions=(("<function_call>", "tools"),),
    ),
    ToolFormat(
        ("phi4_mini_json", "phi4"),
        _JSON,
        opening=("<|tool_call|>", "["),
        between=", ",
        closing=("]", "<|/tool_call|>"),
        aliases=("functools",),
        mentions=(("<|tool|>",), ("<|tool_call|>",), ("functools[",)),
    ),
    ToolFormat(
        ("internlm",),
        _JSON_PARAMETERS,
        before=("<|action_start|>", "<|plugin|>", "\n"),
        after=("<|action_end|>",),
        between="\n",
        mentions=(("<|action_start|>",), ("<|plugin|>",)),
    ),
    ToolFormat(
        ("cohere_command3", "cohere"),
        JsonCall("tool_name", "parameters", id="tool_call_id"),
        opening=("<|START_ACTION|>", "["),
        between=", ",
        closing=("]", "<|END_ACTION|>"),
        mentions=(("<|START_ACTION|>",),),
    ),
    ToolFormat(
        ("cohere_command_r",),
        JsonCall("tool_name", "parameters"),
        opening=("Action:", " ```json\n", "["),
        between=", ",
        closing=("]", "\n```"),
        mentions=(("Action:", "```json", "tool_name"),),
    ),
    ToolFormat(
        ("nemotron_json", "nemotron"),
        _JSON,
        opening=("<TOOLCALL>", "["),
        between=", ",
        closing=("]", "</TOOLCALL>"),
        mentions=(("<TOOLCALL>",),),
    ),
    ToolFormat(
        ("jamba", "hunyuan_a13b"),
        _JSON,
        opening=("<tool_calls>", "["),
        between=", ",
        closing=("]", "</tool_calls>"),
        mentions=(("<tool_calls>", "tools"),),
    ),
    ToolFormat(
        ("olmo3",),
        PythonCall(),
        opening=("<function_calls>",),
        between="\n",
        closing=("</function_calls>",),
        mentions=(("<function_calls>", "functions"),),
    ),
    ToolFormat(
        ("llama4_pythonic",),
        PythonCall(),
        opening=("<|python_start|>", "["),
        between=", ",
        closing=("]", "<|python_end|>"),
        whole=True,
        aliases=("[",),
        mentions=(("<|python_start|>", "tools"),),
    ),
    ToolFormat(
        ("functiongemma",),
        EscapedCall(),
        before=("<start_function_call>", "call:"),
        after=("<end_function_call>",),
        mentions=(("<start_function_call>",),),
    ),
    ToolFormat(
        ("gemma3",),
        PythonCall(),
        opening=("```tool_code", "\n"),
        between="\n",
        closing=("\n", "```"),
        mentions=(("tool_code", "tools"),),
    ),
    ToolFormat(
        ("hermes", "qwen25", "granite4", "smollm3", "exaone4", "ernie45"),
        _JSON,
        before=("<tool_call>", "\n"),
        after=("\n", "</tool_call>"),
        between="\n",
        unmarked=True,
        mentions=(("<tool_call>", "tools"),),
    ),
    ToolFormat(
        ("llama3_json", "llama4_json"),
        _JSON_PARAMETERS,
        between="; ",
        aliases=("<|python_tag|>",),
        mentions=(("<|python_tag|>", "tools"), ('"parameters"', "tools")),
    ),
    ToolFormat(
        ("pythonic",),
        PythonCall(),
        opening=("[",),
        between=", ",
        closing=("]",),
        whole=True,
        mentions=(("[func_name1(", "tools"),),
    ),
)
