"""The limits of sampling parameters are the same over every HTTP API as in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble import LLM
from nybble.engine import LIMITS, Engine, ParameterError, SamplingParams
from nybble.server.api.openapi import openapi_document

from ..client import CHAT, COMPLETIONS, HELLO, RESPONSES, Client, refused, run

MESSAGES = "/v1/messages"
WRONG: list[dict[str, Any]] = [
    {"n": 0},
    {"n": 129},
    {"max_tokens": -2},
    {"min_tokens": -1},
    {"temperature": 100.5},
    {"top_p": 0.0},
    {"top_k": -2},
    {"min_p": 1.5},
    {"repetition_penalty": 0.0},
    {"presence_penalty": 3.0},
    {"frequency_penalty": -3.0},
    {"logit_bias": {5: 101.0}},
    {"logit_bias": dict.fromkeys(range(1025), 1)},
    {"bad_words": [" "]},
    {"bad_words": ["a"] * 257},
    {"allowed_token_ids": []},
    {"seed": 2**63},
    {"stop": ["a"] * 17},
    {"stop": ["a", "b" * 257]},
    {"stop_token_ids": [5] * 17},
    {"logprobs": 21},
    {"prompt_logprobs": -1},
    {"logprob_token_ids": [5] * 129, "logprobs": 1},
]
PLAIN: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a"},
    CHAT: {"messages": HELLO},
    RESPONSES: {"input": "a"},
    MESSAGES: {"messages": HELLO, "max_tokens": 1},
}
# What an API calls a parameter.
NAMES = {
    CHAT: {"logprobs": "top_logprobs"},
    RESPONSES: {"logprobs": "top_logprobs", "max_tokens": "max_output_tokens"},
    MESSAGES: {"stop": "stop_sequences"},
}


def test_what_python_refuses_every_api_refuses_in_the_same_words(engine: Engine) -> None:
    schemas = openapi_document()["paths"]

    def fields(path: str) -> set[str]:
        body = schemas[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        return set(openapi_document()["components"]["schemas"][name]["properties"])

    async def scenario(client: Client) -> None:
        for path, plain in PLAIN.items():
            known, names, tried = fields(path), NAMES.get(path, {}), 0
            for wrong in WRONG:
                (first, *_) = wrong
                asked = {names.get(name, name): value for name, value in wrong.items()}
                if path == CHAT and "logprobs" in wrong:
                    asked |= {"logprobs": True}
                # A chat's own least number of tokens is 1.
                if not asked.keys() <= known or (first == "max_tokens" and path != COMPLETIONS):
                    continue
                tried += 1
                with pytest.raises(ParameterError) as caught:
                    SamplingParams(**wrong)
                body = {"model": "tiny", **plain, **asked}
                name = names.get(first, first)
                expected = str(caught.value).replace(first, name, 1)
                if path == MESSAGES:
                    async with client.post(path, json=body) as response:
                        error = (await response.json())["error"]
                        assert response.status == 400, error
                else:
                    error = await refused(client, path, json.loads(json.dumps(body)))
                    assert (error["param"], error["code"]) == (name, "invalid_value"), error
                assert error["message"] == expected
            assert tried >= (5 if path in (RESPONSES, MESSAGES) else 20), path

    run(engine, scenario)


def test_the_openapi_document_shows_the_limits() -> None:
    schemas = openapi_document()["components"]["schemas"]
    properties = schemas["CompletionRequest"]["properties"]
    for name, limit in LIMITS.items():
        branches = properties[name]["anyOf"]
        found = next(each for each in branches if each.get("type") not in ("null", "string"))
        assert limit.schema.items() <= found.items(), name
    for body, name, limited in (
        ("MessagesRequest", "stop_sequences", "stop"),
        ("MessagesRequest", "top_p", "top_p"),
        ("ResponsesRequest", "top_logprobs", "logprobs"),
        ("ResponsesRequest", "seed", "seed"),
        ("ChatRequest", "top_logprobs", "logprobs"),
    ):
        found = schemas[body]["properties"][name]["anyOf"][0]
        assert LIMITS[limited].schema.items() <= found.items(), (body, name)


def test_n_answers_are_the_same_from_python_and_over_http(tiny_model: Callable[..., Path]) -> None:
    prompts = ["the quick brown", "def add("]
    options: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 8}
    choices: list[Any] = []

    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": prompts, "return_token_ids": True, **options}
        async with client.post(COMPLETIONS, json=body) as response:
            choices.extend((await response.json())["choices"])

    with LLM(tiny_model(), device="cpu", kv_cache_bytes=4 << 20, progress=False) as llm:
        run(llm._engine, scenario)
        found = llm.generate(prompts, SamplingParams(**options))
    assert len(found) == len(prompts)
    every = [each for first in found for each in (first, *first.others)]
    assert [list(each.token_ids) for each in every] == [one["token_ids"] for one in choices]
    assert [each.text for each in every] == [one["text"] for one in choices]
    assert len({each.text for each in every}) == 6
