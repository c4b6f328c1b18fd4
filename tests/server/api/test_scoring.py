"""Rerank and score with each kind of model, against transformers' own computation."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from nybble.engine import Engine
from nybble.server.api.prompts import Prompts

from ..client import CHAT, COMPLETIONS, HELLO, Client, refused, run
from ..conftest import started_engine

QUERY = "what does the fox jump over"
DOCUMENTS = ["the lazy dog", "def add(first, second):", "naïve café 🙂 " * 8, "the other dog barks"]
PATHS = ("/rerank", "/v1/rerank")


async def post(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with client.post(path, json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return dict(answer)


async def ranked(client: Client, **fields: Any) -> list[float]:
    """The scores of the documents, in their own order."""
    body = {"model": "tiny", "query": QUERY, "documents": DOCUMENTS, **fields}
    results = (await post(client, "/rerank", body))["results"]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    return [found for _, found in sorted((r["index"], r["relevance_score"]) for r in results)]


def classifier(folder: Path, target: Path, labels: int) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(target)
    torch.manual_seed(labels)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, dtype=torch.bfloat16
    )
    with torch.no_grad():
        model.score.weight.normal_(std=0.2)
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def one_label(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tiny_model(), tmp_path_factory.mktemp("classifier"), 1)


@pytest.fixture(scope="module")
def classifying(one_label: Path) -> Iterator[Engine]:
    with started_engine(one_label) as engine:
        yield engine


def logits_of(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for first, second in pairs:
        with torch.inference_mode():
            rows.append(model(**tokenizer(first, second, return_tensors="pt")).logits[0].numpy())
    return np.stack(rows)


def test_a_classifiers_score_is_the_sigmoid_of_its_logit(
    classifying: Engine, one_label: Path
) -> None:
    logits = logits_of(one_label, [(QUERY, document) for document in DOCUMENTS])[:, 0]
    expected = 1 / (1 + np.exp(-logits))
    assert np.ptp(expected) > 0.1

    async def scenario(client: Client) -> None:
        np.testing.assert_allclose(await ranked(client), expected, atol=2e-3)
        raw = await ranked(client, use_activation=False)
        np.testing.assert_allclose(raw, logits, atol=2e-2)
        # One query for all documents, and pairs.
        one = {"model": "tiny", "text_1": QUERY, "text_2": DOCUMENTS}
        for body in (one, one | {"text_1": [QUERY] * len(DOCUMENTS)}):
            for path in ("/score", "/v1/score"):
                answer = await post(client, path, body)
                scores = [item["score"] for item in answer["data"]]
                np.testing.assert_allclose(scores, expected, atol=2e-3)
        single = await post(client, "/score", one | {"text_2": DOCUMENTS[0]})
        assert len(single["data"]) == 1
        assert single["usage"]["prompt_tokens"] == single["usage"]["total_tokens"] > 5

    run(classifying, scenario)


def test_of_two_labels_the_score_is_the_probability_of_the_second(
    tiny_model: Any, tmp_path: Path
) -> None:
    folder = classifier(tiny_model(), tmp_path / "two", 2)
    logits = logits_of(folder, [(QUERY, document) for document in DOCUMENTS])
    expected = torch.from_numpy(logits).softmax(-1)[:, 1].numpy()

    async def scenario(client: Client) -> None:
        np.testing.assert_allclose(await ranked(client), expected, atol=2e-3)
        body = {"query": "a", "documents": ["b"], "use_activation": False}
        assert (await refused(client, "/rerank", body))["param"] == "use_activation"

    with started_engine(folder) as engine:
        run(engine, scenario)


def test_the_shapes_of_jina_and_of_cohere(classifying: Engine) -> None:
    body = {"model": "tiny", "query": QUERY, "documents": [{"text": DOCUMENTS[0]}, *DOCUMENTS[1:]]}

    async def scenario(client: Client) -> None:
        for path in PATHS:
            jina = await post(client, path, body | {"top_n": 2})
            assert len(jina["results"]) == 2
            best = jina["results"][0]
            assert best["document"] == {"text": DOCUMENTS[best["index"]]}
            assert jina["usage"]["total_tokens"] > 20
            bare = await post(client, path, body | {"return_documents": False})
            assert "document" not in bare["results"][0]
        cohere = await post(client, "/v2/rerank", body | {"max_tokens_per_doc": 4096})
        assert set(cohere) == {"id", "results", "meta"}
        assert set(cohere["results"][0]) == {"index", "relevance_score"}
        assert cohere["meta"]["api_version"] == {"version": "2"}

    run(classifying, scenario)


def test_long_documents_are_cut_if_the_request_says_so(classifying: Engine) -> None:
    body = {"query": "the fox", "documents": ["the dog " * 300], "model": "tiny"}

    async def scenario(client: Client) -> None:
        error = await refused(client, "/rerank", body)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "documents")
        cut = await post(client, "/rerank", body | {"max_tokens_per_doc": 40})
        assert cut["usage"]["prompt_tokens"] < 50
        for most in (30, -1):
            cut = await post(client, "/rerank", body | {"truncate_prompt_tokens": most})
            limit = classifying.max_model_len if most == -1 else most
            assert limit - 4 <= cut["usage"]["prompt_tokens"] <= limit
        nothing = body | {"truncate_prompt_tokens": 1}
        assert (await refused(client, "/rerank", nothing))["param"] == "truncate_prompt_tokens"

    run(classifying, scenario)


@pytest.mark.parametrize("extra", [{}, {"max_tokens_per_doc": 9, "truncate_prompt_tokens": 12}])
def test_many_documents_are_read_on_another_thread(
    classifying: Engine, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    threads: set[str] = set()
    encode_batches = Prompts._encode_batches

    def spied(self: Prompts, *args: Any, **options: Any) -> Any:
        threads.add(threading.current_thread().name)
        return encode_batches(self, *args, **options)

    monkeypatch.setattr(Prompts, "_encode_batches", spied)

    async def scenario(client: Client) -> None:
        documents = [f"number {index} of many" for index in range(800)]
        body = {"query": "q", "documents": documents, "model": "tiny", **extra}
        results = (await post(client, "/rerank", body))["results"]
        assert sorted(result["index"] for result in results) == list(range(800))

    run(classifying, scenario)
    assert threads
    assert all(name.startswith("nybble-tokenize") for name in threads)


@pytest.mark.parametrize("extra", [{}, {"max_tokens_per_doc": 9}, {"truncate_prompt_tokens": 12}])
def test_documents_have_a_limit_together(classifying: Engine, extra: dict[str, Any]) -> None:
    body = {"query": "q", "documents": ["naïve café 🙂 " * 300] * 400, "model": "tiny"} | extra

    async def scenario(client: Client) -> None:
        error = await refused(client, "/rerank", body)
        assert (error["code"], error["param"]) == ("too_many_tokens", "documents")

    run(classifying, scenario)


def test_a_judge_has_the_same_limit(
    judges: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.server.api.prompts._MAX_TOGETHER", 600)
    body = {"query": "q", "documents": DOCUMENTS * 4, "model": "tiny"}

    async def scenario(client: Client) -> None:
        error = await refused(client, "/rerank", body)
        assert (error["code"], error["param"]) == ("too_many_tokens", "documents")

    with started_engine(judges["always"]) as engine:
        run(engine, scenario)


def test_the_timeout_holds_while_documents_are_read(
    classifying: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(Prompts, "_encode_batches", lambda *_, **__: over.wait(60))

    async def scenario(client: Client) -> None:
        body = {"query": "q", "documents": ["number " * 700], "model": "tiny", "timeout": 0.05}
        try:
            async with client.post("/rerank", json=body) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (504, "timeout")
        finally:
            over.set()

    run(classifying, scenario)


def test_many_documents_are_scored_a_few_at_a_time(classifying: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"query": "q", "documents": [f"number {i}" for i in range(200)], "model": "tiny"}
        results = (await post(client, "/rerank", body))["results"]
        assert sorted(result["index"] for result in results) == list(range(200))

    run(classifying, scenario)


@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        ("/rerank", {"documents": []}, "documents"),
        ("/rerank", {"documents": ["a", ""]}, "documents[1]"),
        ("/rerank", {"documents": ["a", {"title": "x"}]}, "documents[1]"),
        ("/rerank", {"query": ""}, "query"),
        ("/rerank", {"top_n": 0}, "top_n"),
        ("/rerank", {"rank_fields": ["title"]}, "rank_fields"),
        ("/rerank", {"model": "other"}, "model"),
        ("/rerank", {"instruction": "x"}, "instruction"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/score", {"text_1": "a"}, "text_2"),
    ],
)
def test_a_bad_parameter_is_named(
    classifying: Engine, path: str, extra: dict[str, Any], param: str
) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "tiny"} | ({"query": "q", "documents": ["d"]} if "rerank" in path else {})
        status = 404 if param == "model" else 400
        assert (await refused(client, path, body | extra, status))["param"] == param

    run(classifying, scenario)


def test_a_model_without_an_output_layer_generates_nothing(classifying: Engine) -> None:
    async def scenario(client: Client) -> None:
        for path, asked in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HELLO})):
            error = await refused(client, path, {"model": "tiny", "max_tokens": 1, **asked})
            assert (error["param"], "no output layer" in error["message"]) == ("model", True)

    run(classifying, scenario)


@pytest.fixture(scope="module")
def judges(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chat models whose tokenizer has tokens for yes and no: one which can be told not to reason,
    and one whose template always opens reasoning."""
    thinks = {
        "if told": "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        "always": "{{ '<think>\n' }}",
    }
    return {
        name: write_judge(tiny_model(), tmp_path_factory.mktemp("judge"), think)
        for name, think in thinks.items()
    }


def write_judge(base: Path, folder: Path, think: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|im_start|>assistant\n' }}",
        "{{ '<|im_start|>assistant\n' }}" + think,
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("reasons", ["if told", "always"])
def test_a_chat_model_judges_in_the_words_of_qwen3_reranker(
    judges: dict[str, Path], reasons: str
) -> None:
    judge = judges[reasons]
    model = AutoModelForCausalLM.from_pretrained(judge, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    # As the model's card has it.
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    usual = "Given a web search query, retrieve relevant passages that answer the query"

    def expected(instruction: str) -> list[float]:
        scores = []
        for document in DOCUMENTS:
            asked = f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {document}"
            ids = tokenizer(before + asked + after, return_tensors="pt").input_ids
            with torch.inference_mode():
                logits = model(ids).logits[0, -1]
            pair = logits[tokenizer.convert_tokens_to_ids(["no", "yes"])]
            scores.append(float(pair.softmax(-1)[1]))
        return scores

    async def scenario(client: Client) -> None:
        np.testing.assert_allclose(await ranked(client), expected(usual), atol=5e-3)
        found = await ranked(client, instruction="Find dogs")
        np.testing.assert_allclose(found, expected("Find dogs"), atol=5e-3)
        # What the document says is not the template's.
        body = {"query": "q", "documents": ["<|im_end|>", "x" * 20], "model": "tiny"}
        assert len((await post(client, "/v1/rerank", body))["results"]) == 2

    with started_engine(judge) as engine:
        run(engine, scenario)


def test_a_model_without_yes_and_no_does_not_judge(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        error = await refused(client, "/rerank", {"query": "q", "documents": ["d"]})
        assert (error["param"], error["code"]) == ("model", "unsupported_parameter")

    run(engine, scenario)


@pytest.fixture(scope="module", params=["Qwen3-Embedding", "E5-Mistral"])
def embedder(
    tiny_model: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """As models of embeddings are saved: no output layer, no ``model.`` in names, prompts.

    E5-Mistral's tokenizer puts an end token behind each text, whose state is the embedding.
    """
    folder = tmp_path_factory.mktemp("embedder")
    base = tiny_model(family="mistral" if request.param == "E5-Mistral" else "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if request.param == "E5-Mistral":
        end = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
        assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    model = AutoModel.from_pretrained(base, dtype=torch.bfloat16)
    model.config.matryoshka_dimensions = [32, 64]
    model.save_pretrained(folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    prompts = {"query": "Instruct: find it\nQuery: ", "document": ""}
    config = {"prompts": prompts, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def vectors(embedder: Path) -> Callable[[list[str]], np.ndarray[Any, Any]]:
    model = AutoModel.from_pretrained(embedder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedder)

    def of(texts: list[str]) -> np.ndarray[Any, Any]:
        rows = []
        for text in texts:
            with torch.inference_mode():
                state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
            rows.append((state / state.norm()).numpy())
        return np.stack(rows)

    return of


def test_a_model_of_embeddings_compares_them(
    embedder: Path, vectors: Callable[[list[str]], np.ndarray[Any, Any]]
) -> None:
    documents = vectors(DOCUMENTS)
    asked = "Instruct: find it\nQuery: " + QUERY

    async def embedded(client: Client, **fields: Any) -> np.ndarray[Any, Any]:
        body = {"model": "tiny", "input": [QUERY], **fields}
        return np.array((await post(client, "/v1/embeddings", body))["data"][0]["embedding"])

    async def scenario(client: Client) -> None:
        np.testing.assert_allclose(await ranked(client), documents @ vectors([asked])[0], atol=1e-3)
        # The two texts of a score have no roles: nothing is put before them.
        body = {"model": "tiny", "text_1": QUERY, "text_2": DOCUMENTS}
        scores = [item["score"] for item in (await post(client, "/score", body))["data"]]
        np.testing.assert_allclose(scores, documents @ vectors([QUERY])[0], atol=1e-3)

        whole = vectors([QUERY])[0]
        np.testing.assert_allclose(await embedded(client), whole, atol=1e-3)
        prompted = await embedded(client, prompt_name="query")
        np.testing.assert_allclose(prompted, vectors([asked])[0], atol=1e-3)
        short = whole[:32] / np.linalg.norm(whole[:32])
        np.testing.assert_allclose(await embedded(client, dimensions=32), short, atol=1e-3)
        error = await refused(client, "/v1/embeddings", {"input": "a", "dimensions": 40})
        assert "can be cut to 32, 64" in error["message"]
        error = await refused(client, "/v1/embeddings", {"input": "a", "prompt_name": "x"})
        assert "the model has 'query', 'document'" in error["message"]
        error = await refused(client, COMPLETIONS, {"prompt": "a", "max_tokens": 1})
        assert "makes embeddings" in error["message"]

    async def any_size(client: Client) -> None:
        whole = vectors([QUERY])[0]
        short = whole[:40] / np.linalg.norm(whole[:40])
        np.testing.assert_allclose(await embedded(client, dimensions=40), short, atol=1e-3)
        longer = {"input": "a", "dimensions": 4096}
        assert (await refused(client, "/v1/embeddings", longer))["param"] == "dimensions"

    with started_engine(embedder) as engine:
        run(engine, scenario)
        run(engine, any_size, matryoshka=True)
