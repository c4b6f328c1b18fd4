"""Chat completions through the official client, against a server process."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown fox"}]


def chat(client: OpenAI, **options: Any) -> Any:
    defaults = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**{**defaults, **options})


def streamed(client: OpenAI, **options: Any) -> list[Any]:
    return list(chat(client, stream=True, **options))


def text(chunks: list[Any], index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def test_a_chat_completion_has_text_finish_reason_and_usage(client: OpenAI) -> None:
    answer = chat(client, extra_body={"ignore_eos": True})
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_stream_adds_up_to_the_whole_answer(client: OpenAI) -> None:
    chunks = streamed(client, max_tokens=30)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text(chunks) == chat(client, max_tokens=30).choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] in ("stop", "length")
    assert not any(reasons[:-1])


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: OpenAI) -> None:
    chunks = streamed(client, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(client).usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_same_prompt_again_is_found_in_the_cache(client: OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "moon " * 40}]
    chat(client, messages=long)
    again = chat(client, messages=long).usage
    assert again.prompt_tokens - 17 < again.prompt_tokens_details.cached_tokens
    assert again.prompt_tokens_details.cached_tokens < again.prompt_tokens


def test_n_choices_share_the_prompt_and_differ(client: OpenAI) -> None:
    answer = chat(client, n=3, temperature=1.5, seed=1, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    one = chat(client, temperature=1.5, seed=2, max_tokens=12)
    assert one.choices[0].message.content == answer.choices[1].message.content
    assert one.usage.prompt_tokens == answer.usage.prompt_tokens


def test_n_choices_stream_under_their_index(client: OpenAI) -> None:
    options: Any = {"n": 2, "temperature": 1.5, "seed": 5}
    chunks = streamed(client, **options)
    whole = chat(client, **options)
    for index in (0, 1):
        assert text(chunks, index) == whole.choices[index].message.content


def test_logprobs_spell_the_answer_in_bytes(client: OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3, max_tokens=30).choices[0]
    spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert spelled.decode(errors="replace").startswith(choice.message.content.rstrip("\ufffd")[:5])
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        # Greedy: the chosen token is the likeliest.
        assert token.top_logprobs[0].bytes == token.bytes


def test_usage_in_every_event_counts_the_tokens_so_far(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options, max_tokens=5, logprobs=True))
    seen = 0
    for chunk in chunks:
        for choice in chunk.choices:
            seen += len(choice.logprobs.content) if choice.logprobs else 0
        assert chunk.usage.completion_tokens == seen
        assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + seen
    assert chunks[0].usage.completion_tokens == 0
    assert seen == 5


def test_logprobs_stream_one_entry_per_token(client: OpenAI) -> None:
    options: Any = {"logprobs": True, "top_logprobs": 1, "max_tokens": 20}
    entries = [
        entry
        for chunk in streamed(client, **options)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    whole = chat(client, **options).choices[0].logprobs.content
    assert [entry.token for entry in entries] == [entry.token for entry in whole]


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    whole = chat(client, max_tokens=30).choices[0].message.content
    stop = whole[3:6]
    answer = chat(client, max_tokens=30, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_max_completion_tokens_is_the_newer_name(client: OpenAI) -> None:
    answer = chat(client, max_tokens=None, max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3


def test_extension_parameters_are_honoured(client: OpenAI) -> None:
    greedy = chat(client).choices[0].message.content
    hot = chat(client, temperature=2, extra_body={"top_k": 1, "min_p": 0.1})
    assert hot.choices[0].message.content == greedy
    penalized = chat(client, max_tokens=40, extra_body={"repetition_penalty": 50.0})
    assert penalized.choices[0].message.content != chat(client, max_tokens=40).choices[0]


def test_text_parts_and_the_developer_role_are_understood(client: OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    plain: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]
    answers = [chat(client, messages=messages) for messages in (parts, plain)]
    assert answers[0].choices[0].message == answers[1].choices[0].message


def test_harmless_parameters_are_accepted(client: OpenAI) -> None:
    chat(client, user="u", metadata={"a": "b"}, store=True, service_tier="auto", seed=None)


def test_the_models_template_decides_what_roles_there_are(client: OpenAI) -> None:
    tool: list[Any] = [{"role": "tool", "content": "5", "tool_call_id": "c"}]
    with pytest.raises(openai.BadRequestError, match="unknown role tool"):
        chat(client, messages=tool)


def test_many_asynchronous_streams_each_get_their_own_answer(server: Any) -> None:
    async def one(client: AsyncOpenAI, number: int, stream: bool) -> str:
        options: Any = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"question {number}"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        if not stream:
            answer = await client.chat.completions.create(**options)
            return str(answer.choices[0].message.content)
        chunks = [c async for c in await client.chat.completions.create(stream=True, **options)]
        return text(chunks)

    async def scenario() -> None:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            together = await asyncio.gather(*(one(client, n, True) for n in range(24)))
            alone = [await one(client, n, False) for n in range(24)]
        assert together == alone

    asyncio.run(scenario())
