"""Text completions, models and tokens through the official client, against a server process."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

from nybble.server.api.schema import CompletionRequest

PROMPT = "the lazy dog"


def complete(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    defaults = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    return client.completions.create(prompt=prompt, **{**defaults, **options})


def tokens(server: Any, text: str) -> list[int]:
    body = httpx.post(server.url + "/tokenize", json={"prompt": text}).json()
    assert body["count"] == len(body["tokens"])
    return list(body["tokens"])


def test_text_and_its_token_ids_are_the_same_prompt(client: OpenAI, server: Any) -> None:
    by_text = complete(client).choices[0].text
    assert complete(client, tokens(server, PROMPT)).choices[0].text == by_text


def test_prompts_come_in_batches_of_both_kinds(client: OpenAI, server: Any) -> None:
    prompts = [PROMPT, "def add(first", "moon"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    for batch in (prompts, [tokens(server, prompt) for prompt in prompts]):
        answer = complete(client, batch)
        assert [choice.text for choice in answer.choices] == alone
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(len(tokens(server, prompt)) for prompt in prompts)


def test_n_continuations_of_every_prompt_are_numbered_prompt_by_prompt(client: OpenAI) -> None:
    answer = complete(client, [PROMPT, "moon"], n=2, temperature=1, seed=3)
    again = complete(client, "moon", n=2, temperature=1, seed=3)
    assert len(answer.choices) == 4
    assert [c.text for c in answer.choices[2:]] == [c.text for c in again.choices]


def test_sixteen_tokens_are_the_default(client: OpenAI) -> None:
    answer = complete(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_echo_begins_with_the_prompt_streaming_or_not(client: OpenAI, server: Any) -> None:
    plain = complete(client).choices[0].text
    for prompt in (PROMPT, tokens(server, PROMPT)):
        assert complete(client, prompt, echo=True).choices[0].text == PROMPT + plain
    chunks = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + plain


def test_logprobs_have_an_offset_for_every_token(client: OpenAI) -> None:
    words = {"guided_regex": "[a-z ]{40}"}
    choice = complete(client, logprobs=2, max_tokens=12, extra_body=words).choices[0]
    check_offsets(choice.logprobs, choice.text)
    for token, value, top in zip(
        choice.logprobs.tokens,
        choice.logprobs.token_logprobs,
        choice.logprobs.top_logprobs,
        strict=True,
    ):
        assert next(iter(top.items())) == (token, value)


def check_offsets(logprobs: Any, text: str) -> None:
    """Each token that is whole characters is found where its offset says."""
    whole = [
        (token, at)
        for token, at in zip(logprobs.tokens, logprobs.text_offset, strict=True)
        if not token.startswith(("bytes:", "<|"))
    ]
    assert len(whole) > 5
    for token, at in whole:
        assert text[at : at + len(token)] == token


@pytest.fixture(scope="module")
def expected_logprobs(tiny_model: Any) -> Any:
    """``(token ids) → float64 (n - 1, vocab)`` from transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)

    def compute(ids: list[int]) -> Any:
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)

    return compute


ECHOED = "naïve café 🙂 and then the other dog barks"


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_an_echoed_prompt_has_logprobs_as_transformers_computes_them(
    client: OpenAI, server: Any, expected_logprobs: Any, max_tokens: int
) -> None:
    ids = tokens(server, ECHOED)
    expected = expected_logprobs(ids)
    for prompt in (ECHOED, ids):
        answer = complete(client, [prompt, prompt], echo=True, logprobs=3, max_tokens=max_tokens)
        assert answer.usage.completion_tokens == 2 * max_tokens
        for choice in answer.choices:
            found = choice.logprobs
            assert choice.text.startswith(ECHOED)
            # What a random model goes on with is no UTF-8.
            found.tokens, after = found.tokens[: len(ids)], found.tokens[len(ids) :]
            found.text_offset = found.text_offset[: len(ids)]
            check_offsets(found, ECHOED)
            assert len(after) == max_tokens
            assert found.token_logprobs[0] is None
            assert found.top_logprobs[0] is None
            own = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            # The server computes in bfloat16.
            torch.testing.assert_close(
                torch.tensor(found.token_logprobs[1 : len(ids)]).double(), own, atol=0.2, rtol=0
            )
            for top, row in zip(found.top_logprobs[1 : len(ids)], expected, strict=True):
                assert max(top.values()) == pytest.approx(float(row.max()), abs=0.2)


def test_an_echoed_prompts_logprobs_stream_before_the_output(client: OpenAI) -> None:
    options: dict[str, Any] = {"echo": True, "logprobs": 1, "n": 2, "temperature": 1, "seed": 1}
    whole = complete(client, **options)
    found: dict[int, Any] = {0: ("", [], []), 1: ("", [], [])}
    for chunk in complete(client, stream=True, **options):
        (choice,) = chunk.choices
        text, of_tokens, offsets = found[choice.index]
        if choice.finish_reason is None:  # the last chunk says why it ended, and nothing else
            of_tokens += choice.logprobs.tokens
            offsets += choice.logprobs.text_offset
        found[choice.index] = (text + choice.text, of_tokens, offsets)
    for choice in whole.choices:
        expected = (choice.text, choice.logprobs.tokens, choice.logprobs.text_offset)
        assert found[choice.index] == expected


def test_nothing_but_the_prompt_may_be_asked_for(client: OpenAI) -> None:
    chunks = [chunk.choices[0] for chunk in complete(client, max_tokens=0, echo=True, stream=True)]
    assert [(each.text, each.finish_reason) for each in chunks] == [(PROMPT, None), ("", "length")]
    assert complete(client, max_tokens=0).choices[0].text == ""


def test_prompt_logprobs_come_in_vllms_form(
    client: OpenAI, server: Any, expected_logprobs: Any
) -> None:
    ids = tokens(server, PROMPT)
    answer = complete(client, [PROMPT], n=2, extra_body={"prompt_logprobs": 2})
    expected = expected_logprobs(ids)
    for choice in answer.choices:
        assert choice.logprobs is None
        first, *found = choice.prompt_logprobs
        assert first is None
        for token, row, entries in zip(ids[1:], expected, found, strict=True):
            own = entries[str(token)]
            assert own["logprob"] == pytest.approx(float(row[token]), abs=0.2)
            assert {1, 2} <= {entry["rank"] for entry in entries.values()}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    url = server.url + "/v1/chat/completions"
    chat = httpx.post(url, json=body | {"prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert chat["choices"][0]["logprobs"] is None


def test_logprobs_stream_with_the_same_offsets(client: OpenAI) -> None:
    whole = complete(client, logprobs=1).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=1, stream=True)]
    assert chunks.pop() is None  # it says why the text ended
    assert [at for chunk in chunks for at in chunk.text_offset] == whole.text_offset
    assert [token for chunk in chunks for token in chunk.tokens] == whole.tokens


def test_a_stop_token_ends_the_text(client: OpenAI, server: Any) -> None:
    logprobs = complete(client, logprobs=0, max_tokens=6).choices[0].logprobs
    stop = logprobs.tokens[2]
    (token_id,) = tokens(server, stop) if not stop.startswith("bytes:") else (None,)
    if token_id is not None:
        answer = complete(client, extra_body={"stop_token_ids": [token_id]}).choices[0]
        assert answer.finish_reason == "stop"


def test_tokens_and_text_are_each_others_inverse(server: Any) -> None:
    text = "naïve café 🙂 def add(first):\n  x"
    ids = tokens(server, text)
    response = httpx.post(server.url + "/detokenize", json={"tokens": ids})
    assert response.json() == {"prompt": text}


def test_a_chat_can_be_tokenized(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    ids = httpx.post(server.url + "/tokenize", json=body).json()["tokens"]
    text = httpx.post(server.url + "/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_models_are_listed_and_found_by_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "nybble"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("org/other")


def test_the_version_is_told(server: Any) -> None:
    assert httpx.get(server.url + "/version").json()["version"].count(".") == 2


def test_what_a_request_leaves_out_is_the_models_default_and_what_it_says_wins() -> None:
    defaults = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    silent = CompletionRequest.model_validate({"model": "m", "prompt": "a"})
    params = silent.sampling_params(5, None, defaults)
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.7, 20, 1.1)
    outspoken = CompletionRequest.model_validate(
        {"model": "m", "prompt": "a", "temperature": 0, "top_k": -1, "repetition_penalty": 1}
    )
    params = outspoken.sampling_params(5, None, defaults)
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0, 0, 1)
