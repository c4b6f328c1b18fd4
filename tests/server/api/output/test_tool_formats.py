"""Tool calls are found in every family's format, however the text is cut, and grammars write them.

The texts are as the models' cards and chat templates show them.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nybble.engine import GrammarCompiler
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.output.dialect import Dialect, Dialects
from nybble.server.api.output.events import Arguments, Call, Text
from nybble.server.api.output.markers import MarkerTokens
from nybble.server.api.output.tool_formats import TOOL_FORMATS, ToolFormat
from nybble.server.api.output.tool_parser import ToolParser
from nybble.server.api.tools import Tools

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "metric": {"type": "boolean"},
        "near": {"type": "array", "items": {"type": "string"}},
        "zip": {"type": ["string", "null"]},
    },
    "required": ["city"],
}
SCHEMAS: dict[str, dict[str, Any]] = {"weather": WEATHER, "now": {}}
BY_NAME = {name: form for form in reversed(TOOL_FORMATS) for name in form.names}
MISTRAL_OLD = next(form for form in TOOL_FORMATS if "mistral" in form.names and form.opening)
BY_NAME["mistral_old"] = MISTRAL_OLD

ROME = {"city": "Rome", "days": 3}
TWO = [("weather", ROME), ("now", {})]
CASES: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me see.",
        TWO,
    ),
    (
        "qwen3_coder",
        "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>"
        "\n</function>\n</tool_call>",
        "Let me see.",
        TWO,
    ),
    # The first marker is often forgotten, and texts may have anything in them.
    (
        "qwen3_coder",
        '<function=weather>\n<parameter=city>\nif a < b:\n  "x\\n"\n\n</parameter>\n'
        '<parameter=metric>\nTrue\n</parameter>\n<parameter=near>\n["Ostia"]\n</parameter>\n'
        "<parameter=zip>\nnull\n</parameter>\n</function>\n</tool_call>",
        "",
        [
            (
                "weather",
                {
                    "city": 'if a < b:\n  "x\\n"\n',
                    "metric": True,
                    "near": ["Ostia"],
                    "zip": None,
                },
            )
        ],
    ),
    ("qwen3_coder", "<tool_call> is a tag", "<tool_call> is a tag", []),
    (
        "seed_oss",
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n"
        "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
        "",
        TWO[:1],
    ),
    (
        "glm45",
        "Let me see.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
        "<tool_call>now\n</tool_call>",
        "Let me see.",
        TWO,
    ),
    (
        "glm47",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value><arg_key>days"
        "</arg_key><arg_value>3</arg_value></tool_call><tool_call>now</tool_call>",
        "",
        TWO,
    ),
    (
        "deepseek_v3",
        "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
        "<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        "<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Let me see.",
        TWO,
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather"
        '<｜tool▁sep｜>{"city": "Rome", "days": 3}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "",
        TWO,
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": "Rome", "days": 3}<|tool_call_end|>'
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "",
        TWO,
    ),
    (
        "mistral_old",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, '
        '{"name": "now", "arguments": {}}]',
        "",
        TWO,
    ),
    (
        "mistral",
        'Let me see.[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 3}[TOOL_CALLS]now[ARGS]{}',
        "Let me see.",
        TWO,
    ),
    (
        "mistral",
        '[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Rome", "days": 3}',
        "",
        TWO[:1],
    ),
    (
        "granite",
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, '
        '{"name": "now", "arguments": {}}]',
        "",
        TWO,
    ),
    (
        "granite-20b-fc",
        '<function_call> {"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n'
        '<function_call> {"name": "now", "arguments": {}}',
        "",
        TWO,
    ),
    (
        "phi4_mini_json",
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, '
        '{"name": "now", "arguments": {}}]<|/tool_call|>',
        "",
        TWO,
    ),
    (
        "phi4_mini_json",
        'functools[{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]',
        "",
        TWO[:1],
    ),
    (
        "internlm",
        'Let me see.<|action_start|><|plugin|>\n{"name": "weather", "parameters": '
        '{"city": "Rome", "days": 3}}<|action_end|>\n',
        "Let me see.",
        TWO[:1],
    ),
    (
        "cohere_command3",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", "parameters": '
        '{"city": "Rome", "days": 3}},\n    {"tool_call_id": "1", "tool_name": "now", '
        '"parameters": {}}\n]<|END_ACTION|>',
        "",
        TWO,
    ),
    (
        "cohere_command_r",
        'Action: ```json\n[\n    {\n        "tool_name": "weather",\n        "parameters": '
        '{"city": "Rome", "days": 3}\n    }\n]```',
        "",
        TWO[:1],
    ),
    (
        "nemotron_json",
        '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]</TOOLCALL>',
        "",
        TWO[:1],
    ),
    (
        "jamba",
        '<tool_calls>[\n  {"name": "weather", "arguments": {"city": "Rome", "days": 3}},\n'
        '  {"name": "now", "arguments": {}}\n]</tool_calls>',
        "",
        TWO,
    ),
    (
        "olmo3",
        "Let me see.\n<function_calls>\nweather(city='Rome', days=3)\nnow()\n</function_calls>",
        "Let me see.",
        TWO,
    ),
    (
        "functiongemma",
        "<start_function_call>call:weather{city:<escape>Rome<escape>,days:3}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
        "",
        TWO,
    ),
    (
        "functiongemma",
        "<start_function_call>call:weather{city:<escape>a}, b: {1}<escape>,near:[<escape>x<escape>,"
        "<escape>y<escape>],metric:true,zip:null}<end_function_call>",
        "",
        [("weather", {"city": "a}, b: {1}", "near": ["x", "y"], "metric": True, "zip": None})],
    ),
    ("gemma3", '```tool_code\nweather(city="Rome", days=3)\n```', "", TWO[:1]),
    ("gemma3", "```python\nnow()\n```", "```python\nnow()\n```", []),
    ("pythonic", "[weather(city='Rome', days=3), now()]", "", TWO),
    ("pythonic", "[see below] weather(city='Rome')", "[see below] weather(city='Rome')", []),
    (
        "pythonic",
        '[weather("a, \')", near=[\'x\', "y"], metric=False, zip=None)]',
        "",
        [("weather", {"city": "a, ')", "near": ["x", "y"], "metric": False, "zip": None})],
    ),
    (
        "llama4_pythonic",
        "<|python_start|>[weather(city='Rome', days=3), now()]<|python_end|>",
        "",
        TWO,
    ),
    ("llama4_pythonic", "[now()]", "", TWO[1:]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 3}}',
        "",
        TWO[:1],
    ),
]


def parse(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Text, and the name and arguments of each call."""
    parser = ToolParser(form, SCHEMAS)
    text, calls = "", list[tuple[str, str]]()
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Call):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert isinstance(event, Arguments)
            name, arguments = calls[event.index]
            calls[event.index] = (name, arguments + event.text)
    return text, calls


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
@given(data=st.data())
def test_calls_are_found_however_the_text_is_cut(
    name: str, text: str, content: str, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    found, found_calls = parse(BY_NAME[name], pieces)
    assert found.strip() == content
    assert [(name, json.loads(arguments)) for name, arguments in found_calls] == calls


@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.names[0])
@given(data=st.data())
def test_no_text_is_too_strange_to_read(form: ToolFormat, data: st.DataObject) -> None:
    pieces = (*form.special, "weather", "now", "(", ")", "city", "=", '"', "'", "{", "}", "[", "]")
    pieces += (",", ":", '{"name": "now", "arguments": {}}', "\n", " ", "x", "\\", "1")
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=14)))
    assert parse(form, list(text)) == parse(form, [text])


def tokenizer_with(markers: set[str]) -> Any:
    """A vocabulary of bytes and some words, which has markers as tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["weather city Rome parameters"], trainer)
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in sorted(markers)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def marked(form: ToolFormat) -> Any:
    return tokenizer_with({each for each in form.special if each[0] == "<" and each[-1] == ">"})


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (
        (
            "weather",
            {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}, "metric": {"type": "boolean"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        ),
        (
            "count",
            {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["n"],
                "additionalProperties": False,
            },
        ),
    )
]


def guide_in(form: ToolFormat, tokenizer: Any, **options: Any) -> Any:
    body = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "tools": TOOLS,
            "tool_choice": "required",
            **options,
        }
    )
    tools = Tools(Dialect(tools=form), body, MarkerTokens(tokenizer))
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    return tools.guide(compiler, [])


@pytest.mark.parametrize("as_tokens", [True, False])
@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.names[0])
def test_what_the_grammar_of_a_required_call_lets_through_is_read_as_valid_calls(
    form: ToolFormat, as_tokens: bool
) -> None:
    tokenizer = marked(form) if as_tokens else tokenizer_with(set())
    guide = guide_in(form, tokenizer)
    counts = set()
    for seed in range(6):
        choose, walk, tokens = random.Random(seed), guide.fork(), []
        for _ in range(600):
            allowed = walk.allowed().nonzero().flatten().tolist()
            end = tokenizer.eos_token_id in allowed
            if end and (len(allowed) == 1 or choose.random() < 0.5 or len(tokens) > 300):
                break
            # White space inside JSON would fill the text.
            others = [token for token in allowed if token != tokenizer.eos_token_id]
            token = choose.choice([t for t in others if tokenizer.decode([t]).strip()] or others)
            tokens.append(token)
            if walk.accept(token):
                break
        else:
            pytest.fail(f"no end: {tokenizer.decode(tokens)!r}")
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
        parser = ToolParser(form, schemas)
        events = parser.feed(text) + parser.finish()
        assert not any(isinstance(event, Text) and event.text.strip() for event in events), text
        written: dict[int, str] = {}
        for event in events:
            if isinstance(event, Arguments):
                written[event.index] = written.get(event.index, "") + event.text
        names = [event.name for event in events if isinstance(event, Call)]
        assert names, text
        for index, name in enumerate(names):
            arguments = json.loads(written[index])
            if name == "weather":
                assert arguments["city"] in ("Rome", "Oslo"), text
                assert arguments.get("metric") in (None, True, False)
            else:
                assert (name, 1 <= arguments["n"] <= 9) == ("count", True), text
        counts.add(len(names))
    assert counts


@pytest.mark.parametrize("as_tokens", [True, False])
@pytest.mark.parametrize(
    "form", [form for form in TOOL_FORMATS if not form.bare], ids=lambda form: form.names[0]
)
def test_prose_is_free_and_a_voluntary_call_is_well_formed(
    form: ToolFormat, as_tokens: bool
) -> None:
    tokenizer = marked(form) if as_tokens else tokenizer_with(set())
    guide = guide_in(form, tokenizer, tool_choice="auto")

    def says(text: str) -> bool:
        walk = guide.fork()
        for token in tokenizer.encode(text, add_special_tokens=False):
            if not walk.allowed()[token]:
                return False
            walk.accept(token)
        return True

    assert says("It is {warm} [in] Rome.\n(yes)")
    assert not says(f"Let me see. {form.lead[0]}###")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call>\n<function={% endif %}", "qwen3_coder"),
        ("<tool_call>{{ tc.name }}<arg_key>{{ k }}</arg_key>", "glm45"),
        ("{% for tool in tools %}[TOOL_CALLS] [", "mistral"),
        ("<|start_of_role|>assistant_tool_call {{ tools }} <|tool_call|>", "granite"),
        ("<|tool|>{{ message['tools'] }}<|/tool|>", "phi4_mini_json"),
        ("{{ tools }} <|action_start|><|plugin|>", "internlm"),
        ("{{ tools }} <|START_ACTION|>", "cohere_command3"),
        ("{{ tools }} <|python_tag|>", "llama3_json"),
        ("{{ tools }} <|python_start|>", "llama4_pythonic"),
        ("{{ tools }} [func_name1(params_name1=value)]", "pythonic"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type']", "deepseek_v3"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_read_from_the_chat_template(template: str, name: str | None) -> None:
    found = Dialects().of(template).tools
    assert (None if found is None else found.names[0]) == name


def test_the_format_can_be_named() -> None:
    def named(name: str, template: str = "") -> Any:
        return Dialects(tools=name).of(template).tools

    assert named("none", "{{ tools }}<tool_call>") is None
    assert Dialects(tools="openai").of("").harmony
    assert named("granite").names == ("granite",)
    assert named("mistral") is MISTRAL_OLD
    assert named("mistral", "[TOOL_CALLS]name[ARGS]").before == ("[TOOL_CALLS]",)
