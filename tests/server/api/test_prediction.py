"""Predicted outputs: what a client expects is drafted, and the answer stays what it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest
from openai import OpenAI

from ..conftest import ServerProcess, running_server

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def drafting(tiny_model: Callable[..., Path]) -> Iterator[ServerProcess]:
    with running_server(tiny_model(), "--speculate", "ngram") as process:
        yield process


def post(url: str, body: Any) -> bytes:
    headers = {"Content-Type": "application/json"}
    return urlopen(Request(url, json.dumps(body).encode(), headers)).read()  # type: ignore[no-any-return]


def ask(url: str, **options: Any) -> Any:
    """A random text of two letters, whose tokens are those that the text is encoded to."""
    client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    defaults = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "seed": 4}
    tokens = json.loads(post(url + "/tokenize", {"prompt": "QZ"}))["tokens"]
    return client.chat.completions.create(
        **{**defaults, **options}, extra_body={"allowed_token_ids": tokens}
    )


def predicted(content: Any) -> Any:
    return {"type": "content", "content": content}


def test_an_answer_that_was_expected_is_accepted_in_drafts_and_the_same(
    drafting: ServerProcess,
) -> None:
    plain = ask(drafting.url)
    text = plain.choices[0].message.content
    assert plain.usage.completion_tokens_details is None
    for content in (text, [{"type": "text", "text": text}]):
        answer = ask(drafting.url, prediction=predicted(content))
        assert answer.choices[0].message.content == text
        details = answer.usage.completion_tokens_details
        assert details.accepted_prediction_tokens > 20
        drafts = answer.usage.draft_tokens_details
        assert drafts["accepted_draft_tokens"] == details.accepted_prediction_tokens
        assert drafts["draft_tokens"] - drafts["accepted_draft_tokens"] == (
            details.rejected_prediction_tokens
        )
    metrics = urlopen(drafting.url + "/metrics").read().decode()
    accepted = re.search(
        r"^nybble_accepted_draft_tokens_total{method=.ngram.} ([\d.]+)$", metrics, re.MULTILINE
    )
    assert accepted is not None
    assert float(accepted[1]) >= 2 * details.accepted_prediction_tokens


def test_an_answer_that_was_not_expected_is_the_same_too(drafting: ServerProcess) -> None:
    text = ask(drafting.url).choices[0].message.content
    wrong = "QQZZQZ" * 5
    answer = ask(drafting.url, prediction=predicted(wrong), stream=True)
    chunks = list(answer)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text


def test_a_server_without_drafts_takes_predictions_and_counts_none(client: OpenAI) -> None:
    answer = ask(str(client.base_url).removesuffix("/v1/"), prediction=predicted("a text"))
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == details.rejected_prediction_tokens == 0


@pytest.mark.parametrize(
    "prediction", [{"type": "text", "content": "a"}, {"type": "content"}, {"content": 5}]
)
def test_a_prediction_of_another_form_is_refused(client: OpenAI, prediction: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prediction"):
        ask(str(client.base_url).removesuffix("/v1/"), prediction=prediction)


def test_a_server_with_a_draft_model_drafts_without_the_prediction_and_counts_none_of_it(
    tiny_model: Callable[..., Path],
) -> None:
    draft = str(tiny_model(seed=1))
    options = ("--draft-model", draft, "--speculate", "draft")
    with running_server(tiny_model(), *options) as process:
        answer = ask(process.url, prediction=predicted("QZQZ"))
        details = answer.usage.completion_tokens_details
        assert details.accepted_prediction_tokens == details.rejected_prediction_tokens == 0
        metrics = urlopen(process.url + "/metrics").read().decode()
        assert re.search(r"^nybble_draft_tokens_total{method=.draft.} [1-9]", metrics, re.MULTILINE)


def test_every_api_counts_the_drafts_of_an_answer(drafting: ServerProcess) -> None:
    client = OpenAI(base_url=drafting.url + "/v1", api_key="none", max_retries=0)
    greedy: Any = {"model": "tiny", "temperature": 0, "input": "the quick fox"}
    whole = client.responses.create(**greedy, max_output_tokens=48)
    *_, last = client.responses.create(**greedy, max_output_tokens=48, stream=True)
    assert last.type == "response.incomplete"
    counted = [usage.model_dump() for usage in (whole.usage, last.response.usage) if usage]
    body = {"model": "tiny", "temperature": 0, "messages": MESSAGES, "max_tokens": 48}
    counted.append(json.loads(post(drafting.url + "/v1/messages", body))["usage"])
    events = post(drafting.url + "/v1/messages", {**body, "stream": True}).decode().split("\n\n")
    (ended,) = (event for event in events if event.startswith("event: message_delta\n"))
    counted.append(json.loads(ended.partition("data: ")[2])["usage"])
    assert len(counted) == 4
    for usage in counted:
        drafts = usage["draft_tokens_details"]
        assert drafts["draft_tokens"] >= drafts["accepted_draft_tokens"] > 0
        assert drafts["accepted_draft_tokens"] < usage["output_tokens"] == 48
