"""Tool calls: found in text however it is cut, forced where asked for, streamed as deltas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nybble.engine import Engine, GrammarCompiler
from nybble.engine.json_schema import Omission
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.output.dialect import Dialect
from nybble.server.api.output.events import Arguments, Call, ParsedDelta, Text
from nybble.server.api.output.markers import MarkerTokens
from nybble.server.api.output.tool_formats import TOOL_FORMATS
from nybble.server.api.output.tool_parser import ToolParser
from nybble.server.api.tools import Answer, Tools

from ..client import CHAT, HELLO, Client, refused, run, without_white_space
from ..conftest import started_engine

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["utc", "cet"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
# A node whose children are nodes, and one of two kinds: what Pydantic writes for such a model.
TREE = {
    "$defs": {
        "Color": {"enum": ["red", "blue"], "type": "string"},
        "Node": {
            "type": "object",
            "properties": {
                "color": {"$ref": "#/$defs/Color"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
            },
            "required": ["color", "children"],
            "additionalProperties": False,
        },
    },
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}},
    "required": ["root"],
    "additionalProperties": False,
}
# Refers to itself as a whole.
LIST = {
    "type": "object",
    "properties": {"head": {"type": "integer"}, "tail": {"$ref": "#"}},
    "required": ["head"],
    "additionalProperties": False,
}
STRICT = {
    "type": "function",
    "function": {"name": "f", "strict": True, "parameters": {"not": {"required": ["a"]}}},
}
HERMES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call>"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LLAMA = HERMES.replace("<tool_call>", "<|python_tag|>")


FORMATS = {name: form for form in TOOL_FORMATS for name in form.names}


def tools_in(name: str, body: ChatRequest, tokenizer: Any) -> Tools:
    """The tools of a request to a model which calls them in a format."""
    return Tools(Dialect(tools=FORMATS[name]), body, MarkerTokens(tokenizer))


def summary(events: list[ParsedDelta]) -> tuple[str, list[tuple[str, str]]]:
    """Text, and the name and arguments of each call."""
    text, calls = "", []
    for event in events:
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


def parse(convention: Any, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(FORMATS[convention], {"f": {}, "g": {}})
    events = [event for piece in pieces for event in parser.feed(piece)]
    return summary(events + parser.finish())


CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "just <text> with a < b", "just <text> with a < b", []),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>',
        "Let me see.",
        [("f", '{"a": [1, "}"]}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>\n{"arguments": {"x": "\\"{"}, "name": "other"}\n</tool_call>\n',
        "",
        [("f", "{}"), ("other", '{"x": "\\"{"}')],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> then', "then", [("f", "{}")]),
    ("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("hermes", '<tool_call>{"x": 1}', '<tool_call>{"x": 1}', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", 'a <tool_call>{"na', 'a<tool_call>{"na', []),
    # Nothing but calls, without the markers.
    ("hermes", '\n{"name": "f", "arguments": {"a": "}"}}\n', "", [("f", '{"a": "}"}')]),
    (
        "hermes",
        '{"arguments": {}, "name": "g"}\n{"name": "f", "arguments": {"b": 1}}',
        "",
        [("g", "{}"), ("f", '{"b": 1}')],
    ),
    *(
        ("hermes", text, text, [])
        for text in (
            '{"name": "Bob", "arguments": {}}',
            '{"name": "f", "arguments": {}} calls f.',
            'Say {"name": "f", "arguments": {}}',
            '{"name": "f", "arguments": {}, "age": 5}',
            '{"name": "f", "arguments": [1]}',
            '{"name": "f", "arguments": {"a"',
            '{"name": "f"}',
            "{is it}",
        )
    ),
    (
        "hermes",
        '{"a": 1}\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        '{"a": 1}',
        [("f", "{}")],
    ),
    ("hermes", "ends in <tool_", "ends in <tool_", []),
    ("llama3_json", ' {"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        "llama3_json",
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": null}}',
        "",
        [("f", "{}"), ("g", '{"b": null}')],
    ),
    ("llama3_json", '{"name": "Bob", "age": 5}', '{"name": "Bob", "age": 5}', []),
    ("llama3_json", '{"age": 5}', '{"age": 5}', []),
    ("llama3_json", "no, {is it}", "no, {is it}", []),
    ("llama3_json", '{"name": "f", "name": "Bob"}', "", [("f", "{}")]),
    # Half a surrogate pair: nothing that has it can be sent.
    (
        "hermes",
        '<tool_call>{"name": "\\ud800"}</tool_call>',
        '<tool_call>{"name": "\\ud800"}</tool_call>',
        [],
    ),
]


@pytest.mark.parametrize(("convention", "text", "content", "calls"), CASES)
@given(data=st.data())
def test_calls_are_found_however_the_text_is_cut(
    convention: str, text: str, content: str, calls: list[tuple[str, str]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, found_calls = parse(convention, pieces)
    assert found_calls == calls
    assert found.split() == content.split() or found == content


PIECES = (
    *("<tool_call>", "</tool_call>", "<tool", "_call>", "text", " ", "\n", ";", "{", "}", ":", ","),
    *(
        '"name"',
        '"f"',
        '"g"',
        '"other"',
        '"arguments"',
        '"parameters"',
        '{"a": 1}',
        "[1]",
        "5",
        '"',
    ),
    *(
        "\\",
        '"\\ud800"',
        '{"name": "f", "arguments": {"a": "}"}}',
        '{"name": "g", "parameters": {}}',
    ),
)


@given(
    text=st.one_of(
        st.text(alphabet='<tool_cal>/{}":,\\nf 1'),
        st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    ),
    convention=st.sampled_from(["hermes", "llama3_json"]),
)
def test_no_text_is_too_strange_to_read(text: str, convention: str) -> None:
    whole = parse(convention, [text])
    assert parse(convention, list(text)) == whole


@pytest.fixture
def engine(tiny_model: Any) -> Iterator[Engine]:
    """With room for the tools in the prompt."""
    with started_engine(tiny_model(max_length=2048)) as engine:
        yield engine


def request(**options: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": HELLO,
        "tools": [WEATHER, CLOCK],
        "max_tokens": 200,
        "temperature": 1,
        "seed": 3,
        **options,
    }


def allowed(*names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}


@pytest.mark.parametrize("template", [HERMES, LLAMA])
def test_required_and_named_calls_are_valid_streaming_or_not(engine: Engine, template: str) -> None:
    engine.tokenizer.chat_template = template
    named = {"type": "function", "function": {"name": "clock"}}
    one = allowed("clock")

    async def scenario(client: Client) -> None:
        for choice, reason in (("required", "tool_calls"), (named, "stop"), (one, "tool_calls")):
            body = request(tool_choice=choice, parallel_tool_calls=False, max_tokens=800)
            body["logit_bias"] = without_white_space(engine.tokenizer)
            answer = await (await client.post(CHAT, json=body)).json()
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            assert answer["choices"][0]["finish_reason"] == reason
            assert answer["choices"][0]["message"]["content"] is None
            arguments = json.loads(call["function"]["arguments"])
            if choice in (named, one) or call["function"]["name"] == "clock":
                assert arguments["zone"] in ("utc", "cet")
            else:
                assert set(arguments) == {"city"}

            streamed = await (await client.post(CHAT, json={**body, "stream": True})).text()
            events = [json.loads(e[6:]) for e in streamed.strip().split("\n\n")[:-1]]
            deltas = [c["delta"] for e in events for c in e["choices"]]
            pieces = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
            assert pieces[0]["id"].startswith("call_")
            assert pieces[0]["function"]["name"] == call["function"]["name"]
            text = "".join(piece["function"]["arguments"] for piece in pieces)
            assert text == call["function"]["arguments"]
            assert events[-1]["choices"][0]["finish_reason"] == reason

    run(engine, scenario)


def test_offered_tools_leave_the_model_free(engine: Engine) -> None:
    engine.tokenizer.chat_template = HERMES

    async def scenario(client: Client) -> None:
        answers = []
        for choice in ("auto", None, "none"):
            body = request(tool_choice=choice, max_tokens=10, ignore_eos=True)
            answers.append(await (await client.post(CHAT, json=body)).json())
        for answer in answers:
            assert answer["choices"][0]["message"]["content"]
            assert "tool_calls" not in answer["choices"][0]["message"]
        # With "none" the model is not even shown them.
        assert answers[0]["usage"]["prompt_tokens"] > answers[2]["usage"]["prompt_tokens"] + 50

    run(engine, scenario)


def test_results_of_calls_reach_the_template_with_arguments_as_objects(engine: Engine) -> None:
    engine.tokenizer.chat_template = HERMES
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    call = {"id": "c1", "type": "function", "function": function}

    async def scenario(client: Client) -> None:
        messages = [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        ]
        tokens = await (await client.post("/tokenize", json={"messages": messages})).json()
        text = engine.tokenizer.decode(tokens["tokens"])
        assert "assistant\nRome<|im_end|>" in text
        assert "tool\nsunny" in text

        # What is no object, as the arguments of an answer that was cut short, is text.
        shown = HERMES.replace("arguments.city", "arguments")
        engine.tokenizer.chat_template = shown
        for broken in ("{", '{"city": "\\ud800"}', '{"city": NaN}', '{"city": ' + "[" * 99, "[1]"):
            function["arguments"] = broken
            tokens = await (await client.post("/tokenize", json={"messages": messages})).json()
            text = engine.tokenizer.decode(tokens["tokens"])
            assert f"assistant\n{broken}<|im_end|>" in text
        # A template that takes objects only gets what can be read of them.
        engine.tokenizer.chat_template = shown.replace(
            "{{ c.function.arguments }}",
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
        )
        for broken, read in (('{"city": "Ro', "city=Ro"), ("nonsense", "")):
            function["arguments"] = broken
            tokens = await (await client.post("/tokenize", json={"messages": messages})).json()
            text = engine.tokenizer.decode(tokens["tokens"])
            assert f"assistant\n{read}<|im_end|>" in text

    run(engine, scenario)


def test_arguments_are_a_text_for_templates_that_add_them_to_one(engine: Engine) -> None:
    """As DeepSeek's do."""
    engine.tokenizer.chat_template = HERMES.replace(
        "{{ c.function.arguments.city }}", "{{ 'json:' + c.function.arguments }}"
    )
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    call = {"id": "c1", "type": "function", "function": function}

    async def scenario(client: Client) -> None:
        messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
        tokens = await (await client.post("/tokenize", json={"messages": messages})).json()
        assert 'assistant\njson:{"city": "Rome"}' in engine.tokenizer.decode(tokens["tokens"])

    run(engine, scenario)


def test_mistrals_templates_get_ids_of_nine_characters(engine: Engine) -> None:
    engine.tokenizer.chat_template = HERMES.replace("<tool_call>", "[TOOL_CALLS]").replace(
        "{{ m.content }}",
        "{% for id in (m.tool_calls or [{'id': m.tool_call_id}])|map(attribute='id')|select %}"
        "{% if id|length != 9 %}{{ raise_exception('nine!') }}{% endif %}{% endfor %}"
        "{{ m.content }}",
    )
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}

    async def scenario(client: Client) -> None:
        for id in ("call_0123456789abcdef", "t1"):
            messages = [
                *HELLO,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": id, "type": "function", "function": function}],
                },
                {"role": "tool", "content": "sunny", "tool_call_id": id},
            ]
            async with client.post(CHAT, json=request(messages=messages, max_tokens=1)) as answer:
                assert answer.status == 200, await answer.text()

    run(engine, scenario)


def test_tools_are_shown_where_the_template_reads_them(engine: Engine) -> None:
    """In the system's message, as Phi-4-mini's does, or as most do; /tokenize says the same."""
    tools = request()["tools"]
    functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    phi = HERMES.replace("tools or []", "[]").replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.role == 'system' and 'tools' in m %}"
        "{{ '<|tool|>' + m['tools'] + '<|/tool|>' }}{% endif %}",
    )

    async def prompt(client: Client, messages: list[dict[str, Any]]) -> str:
        body = {"messages": messages, "tools": tools}
        found = await (await client.post("/tokenize", json=body)).json()
        asked = request(messages=messages, max_tokens=1)
        async with client.post(CHAT, json=asked) as response:
            assert (await response.json())["usage"]["prompt_tokens"] == found["count"]
        return str(engine.tokenizer.decode(found["tokens"]))

    async def scenario(client: Client) -> None:
        engine.tokenizer.chat_template = phi
        shown = f"<|tool|>{functions}<|/tool|><|im_end|>\n<|im_start|>user\nhello"
        assert f"system\n{shown}" in await prompt(client, HELLO)
        brief = [{"role": "system", "content": "be brief"}, *HELLO]
        assert f"system\nbe brief{shown}" in await prompt(client, brief)
        engine.tokenizer.chat_template = HERMES.replace("<tool_call>", "<|tool|>")
        found = await prompt(client, HELLO)
        assert tools[0]["function"]["name"] in found
        assert "system" not in found

    run(engine, scenario)


def test_a_result_whose_call_was_cut_off_is_shown_to_the_template(engine: Engine) -> None:
    """As clients send it that keep the last turns alone."""
    engine.tokenizer.chat_template = HERMES

    async def scenario(client: Client) -> None:
        orphan = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
        tokens = await (await client.post("/tokenize", json={"messages": [orphan, *HELLO]})).json()
        assert "tool\nsunny" in engine.tokenizer.decode(tokens["tokens"])

    run(engine, scenario)


def test_a_message_with_an_empty_list_of_calls_is_one_without(engine: Engine) -> None:
    engine.tokenizer.chat_template = HERMES.replace(
        "{{ m.content }}",
        # As Llama 3.1's: it looks at the first of the calls there are.
        "{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.name }}{% endif %}{{ m.content }}",
    )

    async def scenario(client: Client) -> None:
        messages = [*HELLO, {"role": "assistant", "content": "hi", "tool_calls": []}, *HELLO]
        async with client.post(CHAT, json=request(messages=messages, max_tokens=1)) as response:
            assert response.status == 200, await response.text()

    run(engine, scenario)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "clock"}}}, "tool_choice"),
        ({"tool_choice": allowed("nope")}, "tool_choice"),
        ({"tool_choice": allowed()}, "tool_choice.allowed_tools.tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "search"}]}, "tools[0].type"),
        ({"guided_regex": "a"}, "tools"),
        (
            {
                "tools": [STRICT],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"tools": [STRICT]}, "tools"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"not": {}}, "strict": True},
                }
            },
            "response_format",
        ),
    ],
)
def test_what_cannot_be_called_is_refused(
    engine: Engine, options: dict[str, Any], param: str
) -> None:
    engine.tokenizer.chat_template = HERMES

    async def scenario(client: Client) -> None:
        assert (await refused(client, CHAT, request(**options)))["param"] == param

    run(engine, scenario)


def test_a_model_whose_template_knows_no_tools_refuses_them(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        assert (await refused(client, CHAT, request()))["param"] == "tools"

    run(engine, scenario)


@pytest.fixture(scope="module")
def marked(tiny_model: Any) -> Any:
    """A tokenizer which has the markers as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return tokenizer


@dataclass
class Speaker:
    """Says a text token by token to a guide of ``tools``."""

    tokenizer: Any
    tools: Tools
    answer: Answer | None = None
    omissions: list[Omission] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
        guide = self.tools.guide(compiler, self.omissions, self.answer)
        assert guide is not None
        self.guide = guide

    def says(self, text: str, *, end: bool = True) -> bool:
        """Whether the guide allows all of ``text``, and to end with it."""
        guide = self.guide.fork()
        for token in self.tokenizer.encode(text, add_special_tokens=False):
            if not guide.allowed()[token]:
                return False
            if guide.accept(token):
                return True
        return bool(guide.allowed()[self.tokenizer.eos_token_id]) or not end


def offered(*parameters: Any, **options: Any) -> ChatRequest:
    tools = [
        {"type": "function", "function": {"name": f"f{index}", "parameters": each}}
        for index, each in enumerate(parameters)
    ]
    return ChatRequest.model_validate(request(tools=tools, **options))


def said(name: str, arguments: Any) -> str:
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def test_parameters_are_a_schema_of_their_own(marked: Any) -> None:
    """Their references are to their own parts, of two tools with the same names too."""
    body = offered(TREE, LIST, tool_choice="required")
    speaker = Speaker(marked, tools_in("hermes", body, marked))
    leaf = {"color": "red", "children": []}
    assert speaker.says(said("f0", {"root": {"color": "blue", "children": [leaf, leaf]}}))
    assert not speaker.says(said("f0", {"root": {"color": "green", "children": []}}))
    assert not speaker.says(said("f0", {"root": {"color": "red", "children": [5]}}))
    assert speaker.says(said("f1", {"head": 1, "tail": {"head": 2, "tail": {"head": 3}}}))
    assert not speaker.says(said("f1", {"head": 1, "tail": {"name": "f1", "arguments": {}}}))
    assert not speaker.omissions


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {"a": {"type": "integer"}}}])
def test_arguments_are_an_object_whatever_the_schema_leaves_out(
    marked: Any, parameters: Any
) -> None:
    body = offered(parameters, tool_choice="required")
    speaker = Speaker(marked, tools_in("hermes", body, marked))
    assert speaker.says(said("f0", {"a": 5}))
    assert not speaker.says(said("f0", [5]))


ANSWER = Answer({"type": "object", "required": ["x"], "additionalProperties": {"const": 1}}, False)


@pytest.mark.parametrize("tokens", [True, False])
def test_with_a_response_format_an_answer_is_a_call_or_has_the_format(
    marked: Any, engine: Engine, tokens: bool
) -> None:
    body = offered(LIST)
    tokenizer = marked if tokens else engine.tokenizer
    speaker = Speaker(tokenizer, tools_in("hermes", body, tokenizer), ANSWER)
    assert speaker.says('{"x": 1}')
    assert not speaker.says("text")
    assert not speaker.says('{"x": 2}')
    assert speaker.says(said("f0", {"head": 1}))
    assert not speaker.says(said("f0", {"head": "x"}))
    speaker = Speaker(marked, tools_in("llama3_json", body, marked), ANSWER)
    assert speaker.says('{"name": "f0", "parameters": {"head": 1}}')
    assert not speaker.says('{"name": "f0", "parameters": {"head": "x"}}')
    assert speaker.says('{"x": 1}')


def test_a_required_call_is_a_call_whatever_the_format(marked: Any) -> None:
    body = offered(LIST, tool_choice="required")
    speaker = Speaker(marked, tools_in("hermes", body, marked), ANSWER)
    assert speaker.says(said("f0", {"head": 1}))
    assert not speaker.says('{"x": 1}')


def test_what_no_grammar_can_express_of_parameters_is_told(engine: Engine) -> None:
    engine.tokenizer.chat_template = HERMES
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "Object", "not": {"required": ["a"]}}},
    }

    async def scenario(client: Client) -> None:
        body = request(tools=[tool], tool_choice="required", max_tokens=1)
        async with client.post(CHAT, json=body) as response:
            assert response.status == 200
            warning = response.headers["X-Nybble-Warning"]
            assert '#/type: "Object" is not a type of JSON Schema' in warning
            assert "#/not: not is not supported" in warning
        tool["function"]["strict"] = True  # type: ignore[index]
        error = await refused(client, CHAT, body)
        assert "the parameters of 'f': #/type" in error["message"]

    run(engine, scenario)


def test_where_markers_are_tokens_a_voluntary_call_is_held_to_its_schema(marked: Any) -> None:
    speaker = Speaker(marked, tools_in("hermes", ChatRequest.model_validate(request()), marked))
    assert speaker.says("")
    assert speaker.says("free <text> {\n")
    assert not speaker.says("free </tool_call>", end=False)
    utc, call = said("clock", {"zone": "utc"}), said("clock", {"zone": "x"})
    assert speaker.says(f"free <text> {{\n{utc}")
    assert speaker.says(f"{utc}\n{utc}")
    assert not speaker.says(call)
    assert not speaker.says("<tool_call>\n<tool_call>", end=False)
