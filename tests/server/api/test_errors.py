"""What is refused is refused quickly, in OpenAI's shape, and names the parameter."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.engine import Engine
from nybble.server.api.chat_schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from nybble.server.api.parse import parse_body
from nybble.server.api.prompts import Prompts
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import CompletionRequest
from nybble.server.app import MAX_BODY_BYTES
from nybble.server.http.errors import ApiError

from ..client import CHAT, COMPLETIONS, HELLO, RESPONSES, Client, refused, run

BAD_IN_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 100.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": 17}, "n"),  # more than the server takes at once
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"max_completion_tokens": -2}, "max_completion_tokens"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 1000}, "stop"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"frequency_penalty": 1e999}, "frequency_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"functions": [{}]}, "functions"),
    ({"tempratur": 1}, "tempratur"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": "x " * 2000}]}, "messages"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
]


def test_a_bad_chat_parameter_is_named(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for extra, param in BAD_IN_CHATS:
            body = {"model": "tiny", "messages": HELLO, **extra}
            text = json.dumps(body).replace("Infinity", "1e999").encode()
            assert (await refused(client, CHAT, text))["param"] == param, str(extra)[:99]

    run(engine, scenario)


BAD_IN_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["x", 1]}, "prompt"),
    ({"prompt": [[1], "x"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [-1], "echo": True}, "prompt"),
    ({"prompt": [10**30], "echo": True}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [1] * 10**6}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"max_tokens": 512}, "max_tokens"),
]


def test_a_bad_completion_parameter_is_named(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for extra, param in BAD_IN_COMPLETIONS:
            body = {"model": "tiny", "prompt": "x", **extra}
            found = (await refused(client, COMPLETIONS, body))["param"]
            assert found == param, str(extra)[:99]

    run(engine, scenario)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO, "max_tokens": 2}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 2}),
        (RESPONSES, {"input": "x", "max_output_tokens": 2}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}], ids=str)
def test_a_request_without_a_model_is_for_the_base_model(
    engine: Engine, path: str, body: dict[str, Any], model: dict[str, Any]
) -> None:
    async def scenario(client: Client) -> None:
        async with client.post(path, json=body | model) as response:
            assert response.status == 200, await response.text()
            assert (await response.json())["model"] == "tiny"

    run(engine, scenario)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/v1/files", "--batches or --fine-tuning"),
        ("/v1/batches/batch_1", "--batches"),
        ("/v1/fine_tuning/jobs", "--fine-tuning"),
    ],
)
def test_what_is_switched_off_names_the_option_that_switches_it_on(
    engine: Engine, path: str, options: str
) -> None:
    async def scenario(client: Client) -> None:
        for ask in (client.get, client.post):
            async with ask(path) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (404, "not_found")
                assert error["message"] == f"this server was started without {options}"

    run(engine, scenario)


def test_missing_unknown_and_too_much_have_codes_of_their_own(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        cases = [
            ({"model": "tiny"}, 400, "missing_required_parameter"),
            ({"model": "tiny", "messages": HELLO, "x": 1}, 400, "unknown_parameter"),
            ({"model": "other", "messages": HELLO}, 404, "model_not_found"),
            (
                {"model": "tiny", "messages": HELLO, "max_tokens": 600},
                400,
                "context_length_exceeded",
            ),
        ]
        for body, status, code in cases:
            assert (await refused(client, CHAT, body, status))["code"] == code

    run(engine, scenario)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 1_000_000 + b"}",
    ],
)
def test_what_is_not_json_is_refused(engine: Engine, data: bytes) -> None:
    async def scenario(client: Client) -> None:
        assert (await refused(client, CHAT, data))["code"] == "invalid_json"

    run(engine, scenario)


def test_an_oversize_body_is_refused(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        error = await refused(client, CHAT, b" " * (MAX_BODY_BYTES + 1), 413)
        assert error["code"] == "request_too_large"

    run(engine, scenario)


def test_text_beyond_any_context_is_refused_unread_but_counted_where_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x " * 2_000_000
    seen: list[int] = []
    encode = Prompts._encode
    monkeypatch.setattr(
        Prompts,
        "_encode",
        lambda self, text, special: (seen.append(1), encode(self, text, special))[1],
    )

    async def scenario(client: Client) -> None:
        for path, body, param in (
            (COMPLETIONS, {"prompt": ["x", long]}, "prompt"),
            (CHAT, {"messages": [{"role": "user", "content": long}]}, "messages"),
            (RESPONSES, {"input": long}, "input"),
            ("/v1/embeddings", {"input": [long]}, "input"),
        ):
            error = await refused(client, path, {"model": "tiny", **body})
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert not seen
        async with client.post("/tokenize", json={"prompt": "x " * 10_000}) as response:
            assert (await response.json())["count"] >= 10_000

    run(engine, scenario)


def test_stop_strings_that_nearly_match_all_the_time_cost_little(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        stops = ["a" * length + "b" for length in range(240, 256)]
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "guided_regex": "a{2000}"}
        async with client.post(COMPLETIONS, json=body | {"stop": stops}) as response:
            choice = (await response.json())["choices"][0]
        assert choice["finish_reason"] == "length"
        assert set(choice["text"]) == {"a"}  # what was held back comes out at the end

    run(engine, scenario)


def test_an_empty_list_and_a_long_one_are_refused_in_plain_words(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body: dict[str, Any] = {"model": "tiny", "messages": []}
        error = await refused(client, CHAT, body)
        assert error["message"] == "messages: expected at least 1, but there are none"
        error = await refused(client, "/v1/responses", {"model": "tiny", "input": []})
        assert error["message"] == "input: expected at least 1, but there are none"
        body = {"model": "tiny", "prompt": ["a", ""]}
        error = await refused(client, COMPLETIONS, body)
        assert error["message"].endswith("[1] is empty")

    run(engine, scenario)


def test_a_value_of_a_wrong_type_is_told_every_type_that_is_right(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        error = await refused(client, "/v1/responses", {"model": "tiny", "input": 5})
        assert error["message"] == "input: expected a string or a list"
        body = {"model": "tiny", "prompt": "a", "max_tokens": "5"}
        error = await refused(client, COMPLETIONS, body)
        assert error["message"] == "max_tokens: expected a whole number"

    run(engine, scenario)


@pytest.mark.parametrize(
    ("field", "value", "begins"),
    [
        ("thinking", {"type": "enabled", "budget_tokens": 100}, "thinking.budget_tokens is 100"),
        ("output_config", {"effort": "low"}, "output_config.effort is 'low'"),
    ],
)
def test_errors_name_the_fields_of_messages_that_were_sent(
    engine: Engine, field: str, value: Any, begins: str
) -> None:
    """The tiny model's template knows no reasoning."""

    async def scenario(client: Client) -> None:
        hello = [{"role": "user", "content": "hello"}]
        body = {"model": "tiny", "messages": hello, "max_tokens": 200, field: value}
        async with client.post("/v1/messages", json=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["message"].startswith(begins)

    run(engine, scenario)


def test_unknown_paths_and_methods_answer_in_the_same_shape(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for method, path, status, code in [
            ("GET", "/v1/nothing", 404, "not_found"),
            ("GET", CHAT, 405, "method_not_allowed"),
            ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ]:
            async with client.request(method, path) as response:
                assert response.status == status
                error = (await response.json())["error"]
                assert set(error) >= {"message", "type"}
                assert error["code"] == code

    run(engine, scenario)


def test_keys_are_required_where_set_but_not_for_probes(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for header in (None, "Bearer wrong", "Bearer", "Basic one", "one", "Bearer \udcff"):
            headers = {} if header is None else {"Authorization": header}
            async with client.get("/v1/models", headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert (await response.json())["error"]["code"] == "invalid_api_key"
        for key in ("one", "two"):
            async with client.get(
                "/v1/models", headers={"Authorization": f"Bearer {key}"}
            ) as response:
                assert response.status == 200
        for path in ("/health", "/metrics", "/version"):
            async with client.get(path) as response:
                assert response.status == 200

    run(engine, scenario, api_keys=("one", "two"))


def test_a_request_id_is_taken_over_or_made(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        for sent, expected in [("abc-1", "abc-1"), ("x" * 200, None), ("a b", None), ("", None)]:
            async with client.get("/v1/models", headers={"X-Request-Id": sent}) as response:
                answered = response.headers["X-Request-Id"]
                assert answered == expected if expected else len(answered) == 32
        stream = {"model": "tiny", "prompt": "x", "stream": True}
        async with client.post(COMPLETIONS, json=stream, headers={"X-Request-Id": "s"}) as response:
            assert response.headers["X-Request-Id"] == "s"

    run(engine, scenario)


def test_a_full_server_says_when_to_come_back(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        long = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "n": 2}
        async with client.post(COMPLETIONS, json={**long, "stream": True}) as response:
            await response.content.readline()
            async with client.post(COMPLETIONS, json=long) as second:
                assert second.status == 429
                assert int(second.headers["Retry-After"]) > 0
                assert (await second.json())["error"]["type"] == "rate_limit_error"

    run(engine, scenario, max_sequences=3)


def test_a_flood_is_shed_and_nothing_admitted_is_lost(engine: Engine) -> None:
    async def ask(client: Client, index: int) -> tuple[int, Any, str | None]:
        body = {"model": "tiny", "prompt": f"{index} " * 20, "max_tokens": 60, "temperature": 0}
        async with client.post(COMPLETIONS, json=body | {"ignore_eos": True}) as response:
            return response.status, await response.json(), response.headers.get("Retry-After")

    async def scenario(client: Client) -> None:
        answers = await asyncio.gather(*(ask(client, index) for index in range(200)))
        admitted = [index for index, (status, _, _) in enumerate(answers) if status == 200]
        assert len(admitted) >= 16
        for status, body, retry_after in answers:
            if status != 200:
                assert (status, body["error"]["code"]) == (429, "overloaded")
                assert int(retry_after or 0) > 0
        for index in admitted[:3] + admitted[-3:]:
            _, alone, _ = await ask(client, index)
            assert alone["choices"] == answers[index][1]["choices"]
        assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total

    run(engine, scenario, max_sequences=16)


def test_an_engine_that_fails_ends_a_stream_with_an_error_event(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
        async with client.post(COMPLETIONS, json={**body, "stream": True}) as response:
            assert response.status == 200
            await response.content.readline()

            def fail(*_: object) -> None:
                raise RuntimeError("the device is gone")

            monkeypatch.setattr(engine._runner, "run", fail)
            events = (await response.read()).decode().strip().split("\n\n")
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed"
        assert "data: [DONE]" not in events
        error = await refused(client, COMPLETIONS, body, 503)
        async with client.get("/health") as response:
            assert response.status == 503
            assert "engine" in (await response.json())["error"]["message"]

    run(engine, scenario)


def test_a_model_without_a_chat_template_is_named(engine: Engine) -> None:
    engine.tokenizer.chat_template = None

    async def scenario(client: Client) -> None:
        error = await refused(client, CHAT, {"model": "tiny", "messages": HELLO})
        assert error["code"] == "no_chat_template"
        assert "'tiny'" in error["message"]

    run(engine, scenario)


def test_a_hostile_chat_template_cannot_reach_python(engine: Engine) -> None:
    engine.tokenizer.chat_template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}"
    )

    async def scenario(client: Client) -> None:
        error = await refused(client, CHAT, {"model": "tiny", "messages": HELLO})
        assert "unsafe" in error["message"]

    run(engine, scenario)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "kind",
    [ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest],
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_json_is_a_request_or_a_400(kind: Any, data: st.DataObject) -> None:
    names = st.sampled_from(sorted(kind.model_fields))
    body = data.draw(st.dictionaries(names | st.text(max_size=3), JSON, max_size=6))
    refusal = None
    try:
        parse_body(json.dumps(body).encode(), kind)
    except ApiError as error:
        refusal = error
    assert refusal is None or (refusal.status == 400 and "\n" not in refusal.message)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path, and a body for it with up to two fields of any kind."""
    path, kind, base = draw(
        st.sampled_from(
            [
                (CHAT, ChatRequest, {"messages": HELLO, "max_tokens": 2}),
                (COMPLETIONS, CompletionRequest, {"prompt": "x", "max_tokens": 2}),
                (RESPONSES, ResponsesRequest, {"input": "x", "max_output_tokens": 2}),
            ]
        )
    )
    limits = {"model", "max_tokens", "max_output_tokens"}
    names = st.sampled_from(sorted(kind.model_fields.keys() - limits))
    extra = draw(st.dictionaries(names, JSON | st.booleans(), max_size=2))
    return path, {"model": "tiny", **base, **extra}


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(given=st.lists(bodies(), min_size=5, max_size=5))
def test_no_body_makes_the_server_fail(
    engine: Engine, given: list[tuple[str, dict[str, Any]]]
) -> None:
    async def scenario(client: Client) -> None:
        for path, body in given:
            async with client.post(path, json=body) as response:
                text = await response.text()
                if response.status == 404:  # a mixture of adapters that are not there
                    assert "adapter" in body
                    assert "model_not_found" in text
                else:
                    assert response.status in (200, 400), text

    run(engine, scenario)
