"""Answers in the form that was asked for, from a model that would say anything."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from transformers import AutoTokenizer

from nybble.engine import (
    DisallowedTokenError,
    Engine,
    GrammarCompiler,
    GuideError,
    Request,
    SamplingParams,
)
from nybble.server.http.errors import as_api_error

from ..client import COMPLETIONS, Client, run, without_white_space
from .test_chat import chat, streamed, text

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "kind": {"enum": ["fox", "dog"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


# Digits are bounded so that random weights cannot go on counting.
BOUNDED = json.loads(json.dumps(SCHEMA).replace('"integer"', '"integer", "maximum": 99'))


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_json_schema_is_kept_streaming_or_not(
    client: OpenAI, tiny_model: Callable[..., Path], temperature: float
) -> None:
    options: Any = {
        "logit_bias": without_white_space(AutoTokenizer.from_pretrained(tiny_model())),
        "response_format": json_schema(BOUNDED),
        "max_tokens": 300,
        "temperature": temperature,
        "seed": 1,
    }
    choice = chat(client, **options).choices[0]
    assert choice.finish_reason == "stop"
    answer = json.loads(choice.message.content)
    assert set(answer) == {"name", "ages", "kind"}
    assert answer["kind"] in ("fox", "dog")
    assert text(streamed(client, **options)) == choice.message.content


def test_the_clients_helper_parses_into_a_model(client: OpenAI) -> None:
    class Flag(BaseModel):
        on: bool

    messages: Any = [{"role": "user", "content": "x"}]
    parsed = client.chat.completions.parse(
        model="tiny", messages=messages, response_format=Flag, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Flag)


def test_a_json_object_begins_as_one(client: OpenAI) -> None:
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=5)
    assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("guided", "pattern"),
    [
        ({"guided_regex": r"[a-c]{3}-\d{2}"}, r"[a-c]{3}-\d{2}"),
        ({"guided_choice": ["yes", 'no "quoted"', "größer\n"]}, 'yes|no "quoted"|größer\n'),
        ({"guided_grammar": 'start: "a" b\nb: "b" | "c" b'}, r"ac*b"),
        ({"guided_json": {"const": "moon"}}, '"moon"'),
        ({"guided_grammar": 'root ::= "a"{2} sun\nsun ::= "sun" | "moon"'}, "aa(sun|moon)"),
        ({"guided_choice": ['x ::= "y"']}, 'x ::= "y"'),  # is no grammar
        ({"grammar": 'root ::= "a"{5}', "json_schema": {}}, "aaaaa"),
        ({"ebnf": "root ::= [ab]", "regex": ""}, "[ab]"),
        ({"regex": "[ab]{3}", "ebnf": None, "grammar": ""}, "[ab]{3}"),
        ({"json_schema": {"const": "moon"}}, '"moon"'),
        ({"json_schema": '{"const": "moon"}'}, '"moon"'),
        ({"response_format": {"type": "json_object", "schema": {"const": 42}}}, "42"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 42}}}},
            "42",
        ),
    ],
)
def test_guided_answers_match(client: OpenAI, guided: dict[str, Any], pattern: str) -> None:
    answers = chat(client, n=3, temperature=1.5, extra_body=guided, max_tokens=60).choices
    for choice in answers:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.message.content)
    completion = client.completions.create(
        model="tiny", prompt="x", max_tokens=60, extra_body={**guided, "ignore_eos": True}
    )
    assert re.fullmatch(pattern, completion.choices[0].text)


def test_an_answer_cut_short_says_so(client: OpenAI) -> None:
    choice = chat(client, max_tokens=2, extra_body={"guided_regex": "a{50}"}).choices[0]
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        ({"extra_body": {"guided_grammar": "start: missing"}}, "guided_grammar"),
        ({"extra_body": {"grammar": "root ::= this is (no grammar"}}, "grammar"),
        ({"extra_body": {"ebnf": "root ::= missing"}}, "ebnf"),
        ({"extra_body": {"guided_grammar": "a" * (1 << 20)}}, "guided_grammar"),
        ({"extra_body": {"grammar": 'root ::= "a"', "regex": "a"}}, "grammar"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"guided_json": {"type": "nope"}}}, "guided_json"),
        ({"extra_body": {"guided_json": {"$ref": "http://x.test/y"}}}, "guided_json"),
        ({"response_format": json_schema({"not": {}})}, "response_format"),
        ({"response_format": json_schema({"pattern": "a(?=b)"})}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}},
            "guided_regex",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    client: OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **options)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"extra_body": {"guided_grammar": 'start: start "a"'}}, "guided_grammar"),
        ({"extra_body": {"ebnf": 'root ::= root "a"'}}, "ebnf"),
        ({"extra_body": {"guided_regex": "[^\\x00-\\U0010FFFF]"}}, "guided_regex"),
        ({"extra_body": {"guided_json": {"$ref": "#"}}}, "guided_json"),
        ({"response_format": json_schema({"$ref": "#"})}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"$ref": "#"}}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"enum": []}}}, "response_format"),
    ],
)
def test_what_nothing_matches_is_refused(
    client: OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="nothing matches") as refused:
        chat(client, **options)
    assert refused.value.param == param


def test_a_grammar_which_cannot_go_on_fails_instead_of_ending(client: OpenAI) -> None:
    grammar = {"guided_grammar": 'start: "a" /[^\\x00-\\U0010FFFF]/'}
    with pytest.raises(openai.BadRequestError, match="guided decoding failed") as failed:
        chat(client, extra_body=grammar, max_tokens=5)
    assert failed.value.param == "guided_grammar"


def test_what_is_too_large_is_refused_before_it_begins(client: OpenAI) -> None:
    """The library compiles it, and says so only when it is asked for the next token twice."""
    with pytest.raises(openai.BadRequestError, match="cannot be compiled: it is too large") as no:
        chat(client, extra_body={"guided_regex": "((a{100}){100}){100}"}, max_tokens=5)
    assert no.value.param == "guided_regex"


def test_the_first_grammar_finds_the_vocabulary_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read one stops every other thread of Python for a second or more."""

    async def scenario(client: Client) -> None:
        monkeypatch.delattr("llguidance.LLTokenizer")
        body = {"model": "tiny", "prompt": "x", "guided_choice": ["yes", "no"]}
        async with client.post(COMPLETIONS, json=body) as response:
            assert response.status == 200, await response.text()
            assert (await response.json())["choices"][0]["text"] in ("yes", "no")

    run(engine, scenario)


def test_a_token_that_a_grammar_excludes_is_the_servers_fault(engine: Engine) -> None:
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    guide = compiler.regex("[ab]{3}")
    allowed = guide.allowed()
    with pytest.raises(DisallowedTokenError, match="excluded by the request's grammar") as fault:
        guide.accept(int((~allowed).nonzero()[0]))
    assert as_api_error(fault.value, "id").status == 500


def test_the_empty_text_may_be_all_that_matches(client: OpenAI) -> None:
    choice = chat(client, extra_body={"guided_choice": [""]}, max_tokens=5).choices[0]
    assert (choice.message.content or "", choice.finish_reason) == ("", "stop")


def test_white_space_inside_json_has_an_end(engine: Engine) -> None:
    """A model may prefer it to every token that goes on, and would fill its answer with it."""
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    guide = compiler.json_schema({"type": "object", "required": ["a"]})
    guide.accept(engine.tokenizer.convert_tokens_to_ids("{"))
    for space in "\n\t":
        (token,) = engine.tokenizer.encode(space, add_special_tokens=False)
        begun, count = guide.fork(), 0
        while begun.allowed()[token]:
            begun.accept(token)
            count += 1
            assert count < 100
        assert count > 0


def test_without_strict_what_no_grammar_can_express_is_left_to_the_model(client: OpenAI) -> None:
    """And the rest is enforced; the header says what is not."""
    schema = {
        "type": "object",
        "properties": {
            "größe\n": {"type": "string", "pattern": "^(?!x)", "maxLength": 4},
            "kind": {"enum": ["fox", "dog"]},
        },
        "required": ["größe\n", "kind"],
        "additionalProperties": False,
        "not": {"required": ["z"]},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        response = client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            response_format=wanted,  # type: ignore[arg-type]
            max_tokens=200,
            stream=stream,
        )
        warning = response.headers["X-Nybble-Warning"]
        assert "#/not: not is not supported" in warning
        assert r"#/properties/gr\xf6\xdfe\n/pattern: error: look-around" in warning
        if not stream:
            answer = json.loads(response.parse().choices[0].message.content)
            assert answer["kind"] in ("fox", "dog")

    wanted["json_schema"]["strict"] = True  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="#/not: not is not supported"):
        chat(client, response_format=wanted)


def test_a_guided_sequence_leaves_its_neighbours_alone(engine: Engine) -> None:
    compiler = GrammarCompiler(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
    guide = compiler.regex("[ab]{12}")
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

    async def say(name: str, guided: bool) -> str:
        request = Request(name, (70, 80, 90), params, guide.fork() if guided else None)
        return "".join([output.text async for output in engine.generate(request)])

    async def scenario() -> None:
        alone = await say("alone", False)
        together = await asyncio.gather(*(say(str(n), n % 2 == 0) for n in range(6)))
        assert [together[n] for n in (1, 3, 5)] == [alone] * 3
        assert all(re.fullmatch("[ab]{1,12}", together[n]) for n in (0, 2, 4))

    asyncio.run(scenario())


def test_a_guide_that_fails_ends_its_own_sequence_only(engine: Engine) -> None:
    import torch

    class Broken:
        def allowed(self) -> torch.Tensor:
            return torch.ones(engine.vocab_size, dtype=torch.bool)

        def accept(self, token: int) -> bool:
            raise GuideError("too complex")

    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    async def say(name: str, guide: Any) -> int:
        request = Request(name, (70, 80, 90), params, guide)
        return len([output async for output in engine.generate(request)])

    async def scenario() -> None:
        good = asyncio.create_task(say("good", None))
        with pytest.raises(GuideError, match="too complex"):
            await say("bad", Broken())
        assert await good == 8
        stats = engine.stats()
        assert (stats.running, stats.kv_blocks_free) == (0, stats.kv_blocks_total)
        assert engine.healthy

    asyncio.run(scenario())
