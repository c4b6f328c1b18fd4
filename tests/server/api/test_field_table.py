"""Tables of docs/api.md: every field of others' requests, and what the server makes of it.

The tables are generated: run this file (``.venv/bin/python tests/server/api/test_field_table.py``)
after a change of the request models or of the vendored schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from nybble.engine import LIMITS as OF_SAMPLING
from nybble.server.api.body import Body
from nybble.server.api.chat_schema import ChatRequest
from nybble.server.api.embeddings import EmbeddingRequest
from nybble.server.api.messages_schema import MessagesRequest
from nybble.server.api.parse import parse_body
from nybble.server.api.responses_schema import ResponsesRequest
from nybble.server.api.schema import CompletionRequest
from nybble.server.api.scoring_schema import RerankRequest, ScoreRequest
from nybble.server.batches.schema import CreateBatch
from nybble.server.http.errors import ApiError

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
SCHEMAS = Path(__file__).parent / "openai_schema" / "schemas.json"
FIELDS: dict[str, list[str]] = json.loads(SCHEMAS.read_text())["request_fields"]
# Of Anthropic's messages and their beta, as their client has them.
ANTHROPIC = (
    *("cache_control", "container", "context_management", "inference_geo", "max_tokens"),
    *("mcp_servers", "messages", "metadata", "model", "output_config", "service_tier"),
    *("stop_sequences", "stream", "system", "temperature", "thinking", "tool_choice", "tools"),
    *("top_k", "top_p"),
)
# Of Jina's and Cohere's documents.
RERANKING = (
    *("documents", "max_chunks_per_doc", "max_tokens_per_doc", "model", "priority", "query"),
    *("rank_fields", "return_documents", "return_embeddings", "top_n"),
)
SCORING = ("model", "text_1", "text_2", "truncate_prompt_tokens", "use_activation")  # vLLM's
BATCHES = (*("completion_window", "endpoint", "input_file_id", "metadata", "output_expires_after"),)
ENDPOINTS: dict[str, tuple[Sequence[str], type[Body]]] = {
    "/v1/chat/completions": (FIELDS["CreateChatCompletionRequest"], ChatRequest),
    "/v1/completions": (FIELDS["CreateCompletionRequest"], CompletionRequest),
    "/v1/responses": (FIELDS["CreateResponse"], ResponsesRequest),
    "/v1/messages": (ANTHROPIC, MessagesRequest),
    "/v1/embeddings": (FIELDS["CreateEmbeddingRequest"], EmbeddingRequest),
    "/v1/rerank": (RERANKING, RerankRequest),
    "/v1/score": (SCORING, ScoreRequest),
    "/v1/batches": (BATCHES, CreateBatch),
}
BEGIN, END = "<!-- fields: {} -->", "<!-- end -->"

MOST_N = OF_SAMPLING["n"].schema["maximum"]
N = f"up to {MOST_N}, and no more than the server accepts at once"
STOP = f"up to {OF_SAMPLING['stop'].schema['maxItems']}"
LOGPROBS = f"up to {OF_SAMPLING['logprobs'].schema['maximum']}"
HOTTEST = OF_SAMPLING["temperature"].schema["maximum"]
TEMPERATURE = f"0 to {HOTTEST} (0 to 2 in OpenAI's API)"
CONSTRAINTS = "json, json_object, regex, choice, grammar or structural_tag"
PRIORITY = "among a tenant's waiting requests, the one with the lowest number is next"
TRUNCATION = "-1: as many as leave room for the output"
CUT = "of both texts; the document is cut. -1: as many as the context has"
ACTIVATION = "false: the logit of a classifier with one label"
JUDGED = "for models that judge by yes and no"
NO_LIMIT = "-1: no limit but the context length"

# Notes on supported fields, most of them on values which are not supported.
LIMITS = {
    (ChatRequest, "messages"): "text only: images and audio are refused",
    (ChatRequest, "modalities"): "text only",
    (ChatRequest, "chat_template"): "with `--trust-request-chat-template`",
    (ChatRequest, "echo"): "the answer begins with the assistant's last message",
    (ChatRequest, "max_completion_tokens"): NO_LIMIT,
    (ChatRequest, "max_tokens"): NO_LIMIT,
    (ChatRequest, "reasoning_effort"): "only `none`, unless the chat template reads "
    "`reasoning_effort`, `enable_thinking` or `thinking`",
    (ChatRequest, "thinking_token_budget"): "-1: no limit",
    (ChatRequest, "include_reasoning"): "false: reasoning is left out",
    (ResponsesRequest, "store"): "with `--response-store`",
    (ResponsesRequest, "previous_response_id"): "with `--response-store`",
    (ResponsesRequest, "background"): "with `--response-store`",
    (ChatRequest, "temperature"): TEMPERATURE,
    (CompletionRequest, "temperature"): TEMPERATURE,
    (ResponsesRequest, "temperature"): TEMPERATURE,
    (ResponsesRequest, "reasoning"): "effort: see `reasoning_effort` of chat completions",
    (ResponsesRequest, "priority"): PRIORITY,
    (CompletionRequest, "max_tokens"): NO_LIMIT,
    (ChatRequest, "structured_outputs"): CONSTRAINTS,
    (CompletionRequest, "structured_outputs"): CONSTRAINTS,
    (ChatRequest, "priority"): PRIORITY,
    (CompletionRequest, "priority"): PRIORITY,
    (EmbeddingRequest, "priority"): PRIORITY,
    (ChatRequest, "truncate_prompt_tokens"): TRUNCATION,
    (CompletionRequest, "truncate_prompt_tokens"): TRUNCATION,
    (EmbeddingRequest, "truncate_prompt_tokens"): TRUNCATION,
    (ChatRequest, "n"): N,
    (ChatRequest, "stop"): STOP,
    (ChatRequest, "tools"): "functions",
    (CompletionRequest, "best_of"): "equal to n, or 1",
    (CompletionRequest, "logprobs"): LOGPROBS,
    (CompletionRequest, "n"): N,
    (CompletionRequest, "stop"): STOP,
    (EmbeddingRequest, "normalize"): "only true",
    (EmbeddingRequest, "dimensions"): "the model's own number, fewer if it was trained for that",
    (EmbeddingRequest, "prompt_name"): "of `config_sentence_transformers.json`",
    (RerankRequest, "return_documents"): "they are returned by default, but not by `/v2/rerank`",
    (RerankRequest, "max_tokens_per_doc"): "longer documents are cut",
    (RerankRequest, "truncate_prompt_tokens"): CUT,
    (ScoreRequest, "truncate_prompt_tokens"): CUT,
    (RerankRequest, "use_activation"): ACTIVATION,
    (ScoreRequest, "use_activation"): ACTIVATION,
    (RerankRequest, "instruction"): JUDGED,
    (ScoreRequest, "instruction"): JUDGED,
    (RerankRequest, "priority"): PRIORITY,
    (ScoreRequest, "priority"): PRIORITY,
    (ScoreRequest, "text_1"): "one text, or as many as text_2 has",
    (CreateBatch, "endpoint"): "chat completions, completions, embeddings or responses",
    (CreateBatch, "completion_window"): "`24h`",
    (MessagesRequest, "messages"): "text, thinking, tool use and results: images are refused",
    (MessagesRequest, "tools"): "the client's; no built-in ones",
    (MessagesRequest, "thinking"): "`adaptive`: as the chat template has it",
    (MessagesRequest, "output_config"): "effort, and a JSON schema in format",
    (MessagesRequest, "priority"): PRIORITY,
    (ResponsesRequest, "include"): "`message.output_text.logprobs`; the rest belongs to items that "
    "there are not",
    (ResponsesRequest, "top_logprobs"): f"{LOGPROBS}; asks for log probabilities by itself too",
    (ResponsesRequest, "input"): "text, function calls and their outputs, reasoning",
    (ResponsesRequest, "tools"): "functions",
    (ResponsesRequest, "truncation"): "only `disabled`",
}


def table(path: str) -> str:
    names, kind = ENDPOINTS[path]
    theirs = set(names)
    lines = ["| field | | |", "| --- | --- | --- |"]
    for field in sorted(theirs | set(kind.model_fields) | set(kind.refused) | set(kind.ignored)):
        if field in kind.refused:
            state, note = "refused", kind.refused[field]
        elif field in kind.ignored:
            state, note = "ignored", kind.ignored[field]
        elif field in kind.model_fields:
            state, note = "supported", LIMITS.get((kind, field), "")
        else:
            state, note = "refused as unknown", ""
        if field not in theirs:
            state += ", an extension"
        lines.append(f"| `{field}` | {state} | {note} |".replace("  ", " "))
    return "\n".join(lines)


def in_readme(path: str) -> tuple[int, int]:
    """Where the table of an endpoint lies in the page."""
    text = PAGE.read_text()
    start = text.index(BEGIN.format(path)) + len(BEGIN.format(path))
    return start, text.index(END, start)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_table_of_fields_is_what_the_code_does(path: str) -> None:
    start, end = in_readme(path)
    assert PAGE.read_text()[start:end].strip() == table(path), "run this file to write it anew"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_of_others_documents_is_known_by_name(path: str) -> None:
    names, kind = ENDPOINTS[path]
    assert set(names) <= set(kind.model_fields) | set(kind.refused) | set(kind.ignored)
    assert not set(kind.ignored) & set(kind.refused)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_refused_is_refused_for_the_reason_in_the_table(path: str) -> None:
    kind = ENDPOINTS[path][1]
    for field, why in kind.refused.items():
        with pytest.raises(ApiError, match=re.escape(why)) as caught:
            parse_body(json.dumps({field: ["x"]}).encode(), kind)
        assert caught.value.code == "unsupported_parameter"


def main() -> None:
    for path in ENDPOINTS:
        start, end = in_readme(path)
        text = PAGE.read_text()
        PAGE.write_text(f"{text[:start]}\n{table(path)}\n{text[end:]}")


if __name__ == "__main__":
    main()
