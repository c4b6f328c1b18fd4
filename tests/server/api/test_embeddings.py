"""Embeddings through the official client and in this process: right, ordered, bounded, refused."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from typing import Any

import numpy as np
import pytest
import torch
from openai import OpenAI
from transformers import AutoModel, AutoTokenizer

from nybble.engine import Engine

from ..client import COMPLETIONS, Client, refused, run

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["the lazy dog", "def add(first, second):", "naïve café 🙂 " * 12]


@pytest.fixture(scope="module")
def expected(tiny_model: Any) -> np.ndarray[Any, Any]:
    """The last hidden state of the last token of each text, of unit length."""
    folder = tiny_model()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        with torch.inference_mode():
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        rows.append((state / state.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_they_are_transformers_last_hidden_state(
    client: OpenAI, expected: Any, encoding: Any
) -> None:
    options = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model="tiny", input=TEXTS, **options)
    assert [item.index for item in answer.data] == [0, 1, 2]
    vectors = [item.embedding for item in answer.data]
    if encoding == "base64":
        vectors = [np.frombuffer(b64decode(v), "<f4") for v in vectors]
    found = np.array(vectors)
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert ((found * expected).sum(1) > 0.999).all()  # the server computes in bfloat16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 30


def test_text_and_its_token_ids_have_the_same_embedding(engine: Engine) -> None:
    ids = [engine.tokenizer.encode(text) for text in TEXTS]

    async def scenario(client: Client) -> None:
        async def vectors(given: Any) -> Any:
            async with client.post(EMBEDDINGS, json={"model": "tiny", "input": given}) as response:
                body = await response.json()
                assert response.status == 200, body
                return np.array([item["embedding"] for item in body["data"]])

        by_text = await vectors(TEXTS)
        np.testing.assert_allclose(await vectors(ids), by_text, atol=1e-5)
        np.testing.assert_allclose((await vectors(TEXTS[0]))[0], by_text[0], atol=1e-5)
        np.testing.assert_allclose((await vectors(ids[1]))[0], by_text[1], atol=1e-5)

    run(engine, scenario)


def test_a_batch_beyond_the_queue_is_taken_a_few_at_a_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    submit = engine._thread.submit

    def counted(*args: Any) -> None:
        nonlocal most
        most = max(most, len(engine._in_flight) + 1)
        submit(*args)

    monkeypatch.setattr(engine._thread, "submit", counted)

    async def scenario(client: Client) -> None:
        texts = [f"question {number}" for number in range(300)]
        body = {"model": "tiny", "input": texts, "encoding_format": "base64"}
        embedding = asyncio.create_task(client.post(EMBEDDINGS, json=body))
        await asyncio.sleep(0.02)
        # Others are served meanwhile.
        short = {"model": "tiny", "prompt": "a", "max_tokens": 4, "ignore_eos": True}
        async with client.post(COMPLETIONS, json=short) as response:
            assert response.status == 200, await response.text()
        assert not embedding.done()
        answer = await (await embedding).json()
        assert [item["index"] for item in answer["data"]] == list(range(300))
        again = await (await client.post(EMBEDDINGS, json=body | {"input": texts[123]})).json()
        same = [
            np.frombuffer(b64decode(item["embedding"]), "<f4")
            for item in (answer["data"][123], again["data"][0])
        ]
        np.testing.assert_allclose(*same, atol=1e-5)

    run(engine, scenario, max_sequences=16)
    assert most == 5  # four of the batch and the other


def test_a_client_that_leaves_cancels_the_rest(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        # Different from the first token on, so that none is read from the prefix cache.
        body = {"model": "tiny", "input": [f"{index} " + "x " * 200 for index in range(500)]}
        at_first = engine.stats().prompt_tokens
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.post(EMBEDDINGS, json=body)
        # Between two texts the engine may be idle for a moment: it has to stay so.
        before = engine.stats()
        for _ in range(300):
            await asyncio.sleep(0.2)
            stats = engine.stats()
            if not stats.running + stats.waiting and stats.steps == before.steps:
                break
            before = stats
        assert stats.steps == before.steps
        assert stats.kv_blocks_free == stats.kv_blocks_total
        read = stats.prompt_tokens - at_first
        assert read < 250 * 200, "texts are read although nobody waits for them"

    run(engine, scenario)


def test_a_timeout_ends_it(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "input": ["x " * 200] * 500, "timeout": 0.2}
        assert (await refused(client, EMBEDDINGS, body, 504))["code"] == "timeout"

    run(engine, scenario)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "x " * 600}, "input"),
        ({"dimensions": 64}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"normalize": False}, "normalize"),
    ],
)
def test_a_bad_parameter_is_named(engine: Engine, extra: dict[str, Any], param: str) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "input": "x", **extra}
        assert (await refused(client, EMBEDDINGS, body))["param"] == param

    run(engine, scenario)


def test_the_models_own_size_may_be_asked_for_and_the_context_filled(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny", "input": [5] * engine.max_model_len, "dimensions": 128}
        async with client.post(EMBEDDINGS, json=body) as response:
            answer = json.loads(await response.text())
            assert response.status == 200, answer
        assert len(answer["data"][0]["embedding"]) == 128

    run(engine, scenario)
