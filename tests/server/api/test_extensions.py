"""Fields beyond OpenAI's: those that change the result, and those that clients send by habit."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nybble.engine import (
    Engine,
    GrammarCompiler,
    ParameterError,
    SamplingParams,
    StructuralTag,
)
from nybble.server.api import foreign
from nybble.server.api.body import Body
from nybble.server.api.chat_schema import ChatRequest, TokenizeRequest
from nybble.server.api.embeddings import EmbeddingRequest
from nybble.server.api.parse import UnknownFields, parse_body
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import CompletionRequest
from nybble.server.http.errors import ApiError

from ..client import CHAT, COMPLETIONS, HELLO, RESPONSES, Client, refused, run
from ..conftest import running_server

PLAIN: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {"model": "tiny", "messages": HELLO},
    CompletionRequest: {"model": "tiny", "prompt": "the lazy dog"},
    ResponsesRequest: {"model": "tiny", "input": "hello"},
    EmbeddingRequest: {"model": "tiny", "input": "hello"},
    TokenizeRequest: {"messages": HELLO},
}
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def parsed(kind: type[Body], extra: dict[str, Any]) -> Any:
    return parse_body(json.dumps(PLAIN[kind] | extra).encode(), kind)


async def posted(client: Client, path: str, body: dict[str, Any]) -> Any:
    async with client.post(path, json={"model": "tiny", **body}) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer


async def streamed(client: Client, path: str, body: dict[str, Any]) -> list[Any]:
    async with client.post(path, json={"model": "tiny", "stream": True, **body}) as response:
        assert response.status == 200
        events = (await response.read()).decode().strip().split("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_what_routers_add_is_taken_at_the_value_that_asks_for_nothing(kind: type[Body]) -> None:
    nothing = parsed(kind, {})
    for name in foreign.REFUSED:
        for value in (None, False, 0, "", [], {}, *foreign.NEUTRAL.get(name, ())):
            assert parsed(kind, {name: value}) == nothing
        with pytest.raises(ApiError) as caught:
            parsed(kind, {name: 0.5})
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)
    for name in foreign.IGNORED:
        for value in (True, 3, "x", ["x"], {"x": 1}):
            assert parsed(kind, {name: value}) == nothing


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (ChatRequest, {"echo": False}),
        (ChatRequest, {"n": None, "stream_options": {}, "logit_bias": [], "stop": ""}),
        (ChatRequest, {"stream": False, "stream_options": {"include_usage": False}}),
        (ChatRequest, {"top_logprobs": 0, "logprobs": False}),
        (ChatRequest, {"reasoning_effort": "none", "verbosity": "medium"}),
        (ChatRequest, {"max_tokens": -1, "seed": -1, "top_k": -1}),
        (ChatRequest, {"guided_json": '{"type": "object"}'}),
        (CompletionRequest, {"logprobs": False, "best_of": 1, "n": 2, "suffix": ""}),
        (CompletionRequest, {"max_tokens": -1, "response_format": {"type": "text"}}),
        (CompletionRequest, {"structured_outputs": {}}),
        (CompletionRequest, {"tools": [], "tool_choice": "auto", "reasoning_effort": "none"}),
        (ChatRequest, {"best_of": 1, "suffix": "", "function_call": "none"}),
        (ResponsesRequest, {"top_k": -1, "seed": -1, "rid": "x", "use_beam_search": False}),
        (ResponsesRequest, {"top_logprobs": 0, "reasoning": {"effort": None, "summary": "auto"}}),
        (ResponsesRequest, {"include": ["reasoning.encrypted_content"], "text": {"verbosity": ""}}),
        (EmbeddingRequest, {"normalize": True, "truncate_prompt_tokens": None}),
    ],
)
def test_neutral_values_are_taken(kind: type[Body], extra: dict[str, Any]) -> None:
    parsed(kind, extra)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, ResponsesRequest])
def test_temperatures_may_be_above_openais_2(kind: type[Body]) -> None:
    """As with vLLM and llama.cpp; the table of fields says so."""
    assert parsed(kind, {"temperature": 2.5}).temperature == 2.5
    assert SamplingParams(temperature=100).temperature == 100


@pytest.mark.parametrize(
    ("kind", "extra", "says"),
    [
        (ChatRequest, {"logit_bias": {"5": 1, "dog": 1}}, "'dog' is not a token id"),
        (ResponsesRequest, {"grammar": "root ::= x"}, "use text.format, or /v1/chat/completions"),
        (ChatRequest, {"logit_bias": {"a": 1, "b": 1}}, "'a', 'b' are not token ids"),
        (ChatRequest, {"logit_bias": {"5": 1, "7": 101}}, "token 7 is 101"),
        (EmbeddingRequest, {"input": []}, "empty"),
        (EmbeddingRequest, {"input": ""}, "empty"),
        (CompletionRequest, {"prompt": ""}, "empty"),
        (ResponsesRequest, {"include": ["everything"]}, "expected one of"),
        (ResponsesRequest, {"input": [{"type": "web_search_call"}]}, "function_call_output"),
        (ResponsesRequest, {"input": [{"type": "function_call", "name": "f"}]}, "call_id"),
        (
            CompletionRequest,
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "regex and choice exclude each other",
        ),
        (
            ChatRequest,
            {"add_generation_prompt": True, "continue_final_message": True},
            "exclude each other",
        ),
    ],
)
def test_messages_say_what_is_wrong(kind: Any, extra: dict[str, Any], says: str) -> None:
    def ask() -> None:
        body = parsed(kind, extra)
        body.sampling_params(None, None, {})

    with pytest.raises((ApiError, ParameterError), match=says):
        ask()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("image_url", "images"),
        ("input_image", "images"),
        ("input_audio", "audio"),
        ("file", "files"),
    ],
)
def test_content_that_is_no_text_is_called_what_it_is(kind: str, what: str) -> None:
    part = {"type": kind, kind: {"url": "data:"}}
    for body, extra in (
        (ChatRequest, {"messages": [{"role": "user", "content": [part]}]}),
        (ResponsesRequest, {"input": [{"role": "user", "content": [part]}]}),
    ):
        with pytest.raises(ApiError, match=f"{what} are not supported") as caught:
            parsed(body, extra)
        assert caught.value.code == "unsupported_parameter"


def test_cache_marks_in_content_change_nothing() -> None:
    marked = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    plain = {"type": "text", "text": "hi"}
    bodies = [
        parsed(ChatRequest, {"messages": [{"role": "user", "content": [part]}]})
        for part in (marked, plain)
    ]
    assert bodies[0] == bodies[1]


def test_unknown_fields_are_left_out_where_the_server_was_told_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = [{"type": "text", "text": "hi", "color": "red"}]
    body = {**PLAIN[ChatRequest], "messages": [{"role": "user", "content": content}], "usage": {}}
    data = json.dumps(body | {"stream_options": {"x": 1}, "stream": True}).encode()
    with pytest.raises(ApiError) as caught:
        parse_body(data, ChatRequest)
    assert caught.value.code == "unknown_parameter"
    with caplog.at_level(logging.WARNING):
        assert parse_body(data, ChatRequest, UnknownFields("ignore")).stream is True
        assert not caplog.messages
        warning = UnknownFields("warn")
        for _ in range(2):
            parse_body(data, ChatRequest, warning)
    named = [message.rpartition(": ")[2] for message in caplog.messages]
    assert sorted(named) == [
        "color (of ContentPart)",
        "usage (of ChatRequest)",
        "x (of StreamOptions)",
    ]
    with pytest.raises(ApiError) as caught:
        parse_body(data.replace(b'"hi"', b"5"), ChatRequest, UnknownFields("ignore"))
    assert caught.value.param == "messages[0].content[0].text"


def test_a_field_that_is_in_every_call_is_left_out_of_all_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "tool_calls": [call | {"provider": None}] * 2}
    body = {**PLAIN[ChatRequest], "messages": [*HELLO, *[said] * 200]}
    with caplog.at_level(logging.WARNING):
        found = parse_body(json.dumps(body).encode(), ChatRequest, UnknownFields("warn"))
    assert len(found.messages) == 201
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "provider (of ToolCall)"
    ]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_that_cannot_be_decompressed_is_a_400(engine: Engine, encoding: str) -> None:
    async def scenario(client: Client) -> None:
        whole = zlib.compress(
            b'{"model": "tiny", "prompt": "x"}', wbits=31 if encoding == "gzip" else 15
        )
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        for data in (b"not compressed", whole[:12], b"\x1f\x8b" + b"\0" * 40):
            async with client.post(COMPLETIONS, data=data, headers=headers) as response:
                assert response.status == 400, await response.text()
        async with client.post(COMPLETIONS, data=whole, headers=headers) as response:
            assert response.status == 200

    run(engine, scenario)


def test_tokens_can_be_kept_out_or_forced(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {**PLAIN[CompletionRequest], **GREEDY, "return_token_ids": True}
        (free,) = (await posted(client, COMPLETIONS, body))["choices"]
        tokens = free["token_ids"]
        assert len(tokens) == 8
        assert free["prompt_token_ids"] == (await tokenized(client, "the lazy dog"))["tokens"]
        only = {"allowed_token_ids": [tokens[0], 5], "logit_bias": {str(tokens[0]): -100}}
        (forced,) = (await posted(client, COMPLETIONS, body | only))["choices"]
        assert set(forced["token_ids"]) == {5}
        (a,), (b,) = (engine.tokenizer.encode(each, add_special_tokens=False) for each in "ab")
        for words, expected in ([], a), (["b", "ba"], a), (["a"], b):
            biased = {"logit_bias": {str(a): 100, str(b): 50}, "bad_words": words}
            (choice,) = (await posted(client, COMPLETIONS, body | biased))["choices"]
            assert choice["token_ids"] == [expected] * 8
        ends = {"stop_token_ids": [tokens[1]], "min_tokens": 5}
        (longer,) = (await posted(client, COMPLETIONS, body | ends))["choices"]
        assert len(longer["token_ids"]) >= 5
        assert tokens[1] not in longer["token_ids"][:5]
        nothing = {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2}
        error = await refused(client, COMPLETIONS, {**body, **nothing})
        assert error["code"] == "nothing_allowed"
        for name in ("allowed_token_ids", "logprob_token_ids", "stop_token_ids"):
            error = await refused(client, COMPLETIONS, {**body, "logprobs": 1, name: [10**6]})
            assert error["param"] == name

    run(engine, scenario)


async def tokenized(client: Client, prompt: str, **options: Any) -> Any:
    return await posted(client, "/tokenize", {"prompt": prompt, **options})


def test_what_stopped_a_text_is_part_of_it_where_asked(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = PLAIN[CompletionRequest] | {"guided_regex": "one two three", "stop": ["two"]}
        for asked, text in ((False, "one "), (True, "one two")):
            asking = body | {"include_stop_str_in_output": asked}
            (choice,) = (await posted(client, COMPLETIONS, asking))["choices"]
            assert (choice["text"], choice["finish_reason"]) == (text, "stop")
        end = sorted(engine.eos_token_ids)[0]
        told = {"include_stop_str_in_output": True, "skip_special_tokens": False}
        body = PLAIN[CompletionRequest] | {"allowed_token_ids": [end]}
        (silent,) = (await posted(client, COMPLETIONS, body))["choices"]
        (choice,) = (await posted(client, COMPLETIONS, body | told))["choices"]
        assert (silent["text"], choice["text"]) == ("", engine.tokenizer.decode([end]))

    run(engine, scenario)


def test_logprobs_of_named_tokens_and_tokens_by_their_ids(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        asked = {"logprob_token_ids": [7, 5], "return_tokens_as_token_ids": True}
        body = {**PLAIN[ChatRequest], **GREEDY, **asked, "logprobs": True}
        (choice,) = (await posted(client, CHAT, body))["choices"]
        for entry in choice["logprobs"]["content"]:
            named = [top["token"] for top in entry["top_logprobs"]]
            assert named == ["token_id:7", "token_id:5"]
        body = {**PLAIN[CompletionRequest], **GREEDY, **asked, "logprobs": 0}
        (choice,) = (await posted(client, COMPLETIONS, body))["choices"]
        for token, top in zip(
            choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True
        ):
            assert set(top) == {"token_id:7", "token_id:5", token}

    run(engine, scenario)


def test_the_last_message_is_gone_on_with_and_echoed(engine: Engine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The lazy"}]

    async def scenario(client: Client) -> None:
        ids = {"return_token_ids": True, **GREEDY}
        body = {"messages": messages, "continue_final_message": True, **ids}
        answer = await posted(client, CHAT, body)
        prompt = engine.tokenizer.decode(answer["prompt_token_ids"])
        assert prompt.endswith("The lazy")
        plain = answer["choices"][0]["message"]["content"]
        (echoed,) = (await posted(client, CHAT, body | {"echo": True}))["choices"]
        assert echoed["message"]["content"] == "The lazy" + plain
        chunks = await streamed(client, CHAT, body | {"echo": True})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "The lazy" + plain
        assert chunks[0]["choices"][0]["prompt_token_ids"] == answer["prompt_token_ids"]
        tokens = [t for chunk in chunks for t in chunk["choices"][0].get("token_ids", ())]
        assert tokens == answer["choices"][0]["token_ids"]
        without = await posted(
            client, CHAT, {"messages": HELLO, "add_generation_prompt": False, **ids}
        )
        within = await posted(client, CHAT, {"messages": HELLO, **ids})
        length = len(without["prompt_token_ids"])
        assert within["prompt_token_ids"][:length] == without["prompt_token_ids"]
        assert len(within["prompt_token_ids"]) > length

    run(engine, scenario)


def test_a_stream_ends_with_an_empty_delta_that_says_why(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        chunks = await streamed(client, CHAT, {**PLAIN[ChatRequest], **GREEDY, **usage})
        *text, end, total = chunks
        assert [chunk["choices"][0]["finish_reason"] for chunk in text] == [None] * len(text)
        assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "length")
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[0] == 0, "the role comes before the first token"
        assert 0 < counts[1] < counts[-1] == 8
        assert total["choices"] == []
        chunks = await streamed(
            client, COMPLETIONS, {**PLAIN[CompletionRequest], **GREEDY, **usage}
        )
        *text, end, total = chunks
        assert [chunk["choices"][0]["finish_reason"] for chunk in text] == [None] * len(text)
        assert (end["choices"][0]["text"], end["choices"][0]["finish_reason"]) == ("", "length")
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert 0 < counts[0] < counts[-1] == 8

    run(engine, scenario)


def test_every_chunk_has_its_token_ids_where_they_are_asked_for(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for path, body in ((CHAT, PLAIN[ChatRequest]), (COMPLETIONS, PLAIN[CompletionRequest])):
            asked = {**body, **GREEDY, "return_token_ids": True}
            (whole,) = (await posted(client, path, asked))["choices"]
            chunks = [chunk["choices"][0] for chunk in await streamed(client, path, asked)]
            assert [t for chunk in chunks for t in chunk["token_ids"]] == whole["token_ids"]
            assert chunks[0]["prompt_token_ids"]

    run(engine, scenario)


def test_a_prompt_is_cut_to_what_is_asked_for(engine: Engine) -> None:
    limit = engine.max_model_len

    async def scenario(client: Client) -> None:
        async def kept(path: str, **body: Any) -> Any:
            answer = await posted(client, path, {"max_tokens": 2, "return_token_ids": True} | body)
            return answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]

        whole = (await tokenized(client, "the lazy dog"))["tokens"]
        cut = {"prompt": "the lazy dog", "truncate_prompt_tokens": 2}
        assert await kept(COMPLETIONS, **cut) == whole[-2:]
        assert await kept(COMPLETIONS, **cut, truncation_side="right") == whole[:2]
        long = "dog " * 5000
        assert len(await kept(COMPLETIONS, prompt=long, truncate_prompt_tokens=-1)) == limit - 2
        ids = list(range(5, 300)) * 4
        assert await kept(COMPLETIONS, prompt=ids, truncate_prompt_tokens=-1) == ids[2 - limit :]
        messages = [{"role": "user", "content": long}]
        assert len(await kept(CHAT, messages=messages, truncate_prompt_tokens=-1)) == limit - 2
        body = {"input": long, "truncate_prompt_tokens": 7}
        assert (await posted(client, "/v1/embeddings", body))["usage"]["prompt_tokens"] == 7

    run(engine, scenario)


def test_constraints_in_vllms_spelling(engine: Engine) -> None:
    cases = [
        ({"json": '{"enum": ["a"]}'}, '"a"'),
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "a" "b"'}, "ab"),
    ]

    async def scenario(client: Client) -> None:
        for constraint, pattern in cases:
            body = {**PLAIN[CompletionRequest], "structured_outputs": constraint}
            (choice,) = (await posted(client, COMPLETIONS, body))["choices"]
            assert re.fullmatch(pattern, choice["text"]), choice
        schema = {"type": "object", "maxProperties": 0}
        tag = {
            "structures": [{"begin": "<f=", "schema": schema, "end": ">"}],
            "triggers": ["<f"],
        }
        triggered = {
            "type": "triggered_tags",
            "triggers": ["<f"],
            "tags": [
                {
                    "begin": "<f=",
                    "content": {"type": "json_schema", "json_schema": schema},
                    "end": ">",
                }
            ],
        }
        prompts = {"prompt": "x", "max_tokens": 4}
        for spelling in (tag, {"type": "structural_tag", "format": triggered}):
            body = prompts | {"structured_outputs": {"structural_tag": spelling}}
            await posted(client, COMPLETIONS, body)
            body = prompts | {"response_format": {"type": "structural_tag"} | spelling}
            await posted(client, COMPLETIONS, body)
        for wrong in (
            {"triggers": []},
            {"format": {"type": "any_text"}},
            tag | {"triggers": ["x"]},
        ):
            body = {**PLAIN[CompletionRequest], "structured_outputs": {"structural_tag": wrong}}
            assert (await refused(client, COMPLETIONS, body))["param"] == "structured_outputs"

    run(engine, scenario)


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"minimum": 5, "maximum": 3}])
def test_a_tag_whose_schema_nothing_matches_is_refused(
    engine: Engine, schema: dict[str, Any]
) -> None:
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    with pytest.raises(ValueError, match="nothing matches"):
        compiler.structural_tags([StructuralTag("<f", "<f=", {"type": "integer", **schema}, ">")])


def test_after_a_trigger_only_its_tag_may_come(engine: Engine) -> None:
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    tag = StructuralTag("<f", "<f=", {"type": "boolean"}, ">")
    guide = compiler.structural_tags([tag])
    for token in engine.tokenizer.encode("free text <f", add_special_tokens=False):
        assert guide.allowed()[token]
        guide.accept(token)
    allowed = [engine.tokenizer.decode([i]) for i in guide.allowed().nonzero().flatten().tolist()]
    assert {text[:1] for text in allowed} == {"="}


def test_a_template_is_taken_from_a_request_only_where_the_server_allows_it(
    engine: Engine,
) -> None:
    template = "{{ messages[0]['content'] }}!{{ documents[0]['text'] if documents }}"
    body = {"messages": HELLO, "chat_template": template, "documents": [{"text": "?"}]}

    async def closed(client: Client) -> None:
        error = await refused(client, CHAT, {"model": "tiny", **body})
        assert error["param"] == "chat_template"
        assert "--trust-request-chat-template" in error["message"]

    async def trusting(client: Client) -> None:
        found = await posted(client, "/tokenize", body)
        assert engine.tokenizer.decode(found["tokens"]) == "hello!?"
        engine.tokenizer.chat_template = template  # which knows of no tools
        tools = [{"type": "function", "function": {"name": "f"}}]
        asked = {"messages": HELLO, "tools": tools, "max_tokens": 1}
        assert (await refused(client, CHAT, {"model": "tiny", **asked}))["param"] == "tools"
        own = "{{ messages[0]['content'] }}"
        error = await refused(client, CHAT, {"model": "tiny", **body, "chat_template": own})
        assert error["param"] == "documents"
        own = template + "{{ tools }}<tool_call>"
        await posted(client, CHAT, asked | {"chat_template": own})

    run(engine, closed)
    run(engine, trusting, trust_chat_templates=True)


def test_reasoning_effort_is_said_in_the_templates_own_words(engine: Engine) -> None:
    body = {"messages": HELLO, "reasoning_effort": "low"}

    async def unknown(client: Client) -> None:
        error = await refused(client, CHAT, {"model": "tiny", **body})
        assert error["param"] == "reasoning_effort"
        await posted(client, CHAT, {**body, "reasoning_effort": "none", "max_tokens": 1})

    async def known(client: Client) -> None:
        for effort, text in (("low", "'low', True"), ("none", "'none', False")):
            found = await posted(client, "/tokenize", body | {"reasoning_effort": effort})
            assert engine.tokenizer.decode(found["tokens"]) == f"('hello', {text})"

    run(engine, unknown)
    engine.tokenizer.chat_template = "{{ messages[0].content, reasoning_effort, enable_thinking }}"
    run(engine, known)


def test_tokenize_shows_tools_and_the_tokens_spelling(engine: Engine) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}

    async def scenario(client: Client) -> None:
        found = await tokenized(client, "the dog", return_token_strs=True)
        assert found["token_strs"] == engine.tokenizer.convert_ids_to_tokens(found["tokens"])
        assert (await tokenized(client, "the dog"))["token_strs"] is None
        engine.tokenizer.chat_template = (
            "{{ messages[0].content, tools[0].function.name, add_generation_prompt }}"
        )
        body = {"messages": HELLO, "tools": [tool], "add_generation_prompt": False}
        found = await posted(client, "/tokenize", body)
        assert engine.tokenizer.decode(found["tokens"]) == "('hello', 'look_up', False)"

    run(engine, scenario)


def test_minus_one_goes_on_to_the_end_of_the_context(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"prompt": [5] * (engine.max_model_len - 30), "max_tokens": -1, "ignore_eos": True}
        usage = (await posted(client, COMPLETIONS, body))["usage"]
        assert usage["total_tokens"] == engine.max_model_len

    run(engine, scenario)


def test_a_salt_keeps_a_prefix_apart(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        async def cached(**extra: Any) -> int:
            body = {"prompt": [7] * 100, "max_tokens": 1, "priority": -3, **extra}
            usage = (await posted(client, COMPLETIONS, body))["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert await cached() == 0
        assert await cached() > 0
        assert await cached(cache_salt="a") == 0
        assert await cached(cache_salt="a") > 0

    run(engine, scenario)


def test_a_name_with_a_providers_prefix_gets_a_hint_and_models_have_a_root(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        error = await refused(client, CHAT, {"model": "openai/tiny", "messages": HELLO}, status=404)
        assert "--served-model-name openai/tiny" in error["message"]
        async with client.get("/v1/models") as response:
            (model,) = (await response.json())["data"]
        assert (model["root"], model["parent"]) == ("tiny", None)

    run(engine, scenario)


def test_items_of_responses_that_reason_and_lists_of_outputs_are_read(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        items = [
            {"role": "user", "content": "hello"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [{"type": "input_text", "text": "done"}],
            },
        ]
        body = {"input": items, "max_output_tokens": 2}
        engine.tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role, m.content }}{% endfor %}"
        )
        assert (await posted(client, RESPONSES, body))["status"] in ("completed", "incomplete")
        error = await refused(
            client, RESPONSES, {"model": "tiny", "input": [*items, {"type": "item_reference"}]}
        )
        assert error["param"] == "input[4]"

    run(engine, scenario)


def test_an_embedding_that_is_too_long_is_not_said_to_ask_for_output(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "input": [5] * (engine.max_model_len + 1)}
        error = await refused(client, "/v1/embeddings", body)
        assert "more at least" not in error["message"]
        assert error["param"] == "input"

    run(engine, scenario)


def test_a_server_may_be_told_to_leave_out_unknown_fields_of_small_and_large_bodies(
    engine: Engine,
) -> None:
    bodies = [
        PLAIN[CompletionRequest] | {"max_tokens": 1, "provider": {"order": ["x" * length]}}
        for length in (1, 100_000)
    ]

    async def closed(client: Client) -> None:
        for body in bodies:
            assert (await refused(client, COMPLETIONS, body))["param"] == "provider"

    async def open_(client: Client) -> None:
        for body in bodies:
            await posted(client, COMPLETIONS, body)

    run(engine, closed)
    run(engine, open_, unknown_fields="ignore")


def test_the_command_takes_a_template_in_place_of_the_models(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text("«{{ messages[0].content }}»")
    with running_server(tiny_model(), "--chat-template", tmp_path / "own.jinja") as server:
        tokens = httpx.post(server.url + "/tokenize", json={"messages": HELLO}).json()["tokens"]
        text = httpx.post(server.url + "/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert text == "«hello»"


def test_the_command_takes_both_options(tiny_model: Callable[..., Path]) -> None:
    body = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 1,
        "chat_template": "{{ messages[0].content }}",
        "provider": {"order": ["x"]},
    }
    options = ("--unknown-fields", "warn", "--trust-request-chat-template")
    with running_server(tiny_model(), *options) as server:
        for _ in range(2):
            assert httpx.post(server.url + CHAT, json=body).status_code == 200
        server.terminate()
        assert server.log().count("left out: provider") == 1
